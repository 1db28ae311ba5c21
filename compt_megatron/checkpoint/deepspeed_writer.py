"""Writes universal checkpoints: one folder from which DeepSpeed continues at ZeRO 1, 2 and 3, with any number of ranks.

Parameters are called what the user's trainer calls them (`trainer_names`). DST holds

- `latest`, `latest_universal`: the name of the folder beside, `global_stepN`;
- `global_stepN/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt`: {"param": whole tensor, "cat_dim": 0}, and the step;
- `global_stepN/zero/optimizer_state.pt`, in the form of ZeRO 1 and 2 and in that of ZeRO 3;
- `global_stepN/mp_rank_00_model_states.pt` (ZeRO 1, 2) and `zero_pp_rank_0_mp_rank_00_model_states.pt` (ZeRO 3).

fp32.pt is the master where there is one, else the weight; where there are both, the weights in their own dtype are the
module of mp_rank_00_model_states.pt, where ZeRO 1 and 2 keep them too.

Read in DeepSpeed 0.19.8: checkpoint/ds_to_universal.py, checkpoint/universal_checkpoint.py, runtime/base_optimizer.py
(load_hp_checkpoint_state_from_checkpoint_dir), runtime/zero/stage3.py (the same with _stage3), runtime/engine.py.
"""

from __future__ import annotations

import io
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES, fsync_files, fsync_folder
from compt_megatron.checkpoint.contract import Region, Task, TensorInfo, split_name
from compt_megatron.checkpoint.deepspeed_files import LATEST, LATEST_UNIVERSAL, UNIVERSAL
from compt_megatron.checkpoint.filled_archive import ArchiveLayout, FilledArchive, Hole, Progress
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.journal import Entry
from compt_megatron.checkpoint.module_names import ModulePlace, projection_key, trainer_names
from compt_megatron.checkpoint.out_file import no_room
from compt_megatron.checkpoint.sums import file_hash
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import Rows

MODEL_FILE = "mp_rank_00_model_states.pt"
SHARDED_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER_FILE = f"{UNIVERSAL}/optimizer_state.pt"
STATE_FILES = {"weight": "fp32.pt", "master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
STEP_FILE = "step.pt"
PARAM = "param"
_FOLDER = "global_step"  # and the number of the step: what Hugging Face's Trainer looks for
_VERSION = "0.19.8"  # of the DeepSpeed whose layout this is; it loads nothing that does not say one
_GROUPS = 256  # more parameter groups than any trainer has: ZeRO 1 and 2 load as many as they find
_OPEN = 16  # archives open at a time
_ONLY_WEIGHTS = "weights only: load with load_module_only=True"


def kind_and_parameter(name: str) -> tuple[str, str]:
    """`exp_avg/visual.proj` -> (`exp_avg`, `visual.proj`), `align/image.weight` -> (`weight`, `align/image.weight`)."""
    prefix, rest = split_name(name)
    return ("weight", name) if prefix == "align" else (prefix, rest)


@dataclass(frozen=True)
class _Target:
    """Where a tensor of the boundary goes: tensor `key` of an archive `file`, at `place` in it."""

    file: str
    key: str
    place: ModulePlace


class DeepSpeedWriter(BoxWriter):
    """Writes a universal checkpoint. Tensors go straight to their places; all ranks may write to all files."""

    format_name = "deepspeed"

    def __init__(self, task: Task) -> None:
        if task.path.suffix in SINGLE_FILES:
            raise UserError(f"{task.path}: a DeepSpeed checkpoint is a folder; name one, or choose another --format")
        super().__init__(task)
        self._names = trainer_names(task.spec)
        self._inner = self.folder / _FOLDER  # gets its number at the end
        self._targets: dict[str, _Target] = {}  # by the name on the boundary
        self._archives: dict[str, FilledArchive] = {}  # by the name of the file in the inner folder
        self._open: OrderedDict[str, FilledArchive] = OrderedDict()
        self._steps: dict[str, float] = {}
        self._unsynced: set[str] = set()  # files that were written to since they were last made durable
        self._known: list[dict[str, Progress]] = []  # what each rank knows of the files, once all have written

    # -- what goes where ---------------------------------------------------------------------------------------------

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        added = [name for name in tensors if not name.startswith("step/")]
        assert not (added and self._archives), "a DeepSpeed checkpoint is declared at once"
        for name in added:
            self._targets[name] = self._target(name)
        layouts: dict[str, dict[str, TensorInfo]] = {}
        for (file, key, member), names in self._groups(added).items():
            dtype = one_dtype(member, names, self.declared)
            if file != MODEL_FILE and dtype != torch.float64:
                dtype = torch.float32
            shape = self._names.shapes.get(member, self.declared[names[0]].shape)
            # DeepSpeed takes a single element in any shape but that of no dimension, which it cannot cut
            layouts.setdefault(file, {})[key] = TensorInfo(shape or (1,), dtype)
        for file, layout in layouts.items():
            self._archives[file] = FilledArchive(self._inner / file, ArchiveLayout(layout))
        self.party.lead(self._make_folders)

    def _target(self, name: str) -> _Target:
        kind, param = kind_and_parameter(name)
        if kind not in STATE_FILES:
            raise UserError(f"{self.destination.path}: DeepSpeed has no place for '{name}'")
        if param.startswith("align/"):
            rows = Rows(self.declared[name].shape[0], self.declared[name].shape[0], 0)
            place = ModulePlace(projection_key(param.removeprefix("align/")), 0, rows)
        elif param in self._names.places:
            place = self._names.places[param]
        else:
            raise UserError(f"{self.destination.path}: DeepSpeed has no place for '{name}'")
        if kind == "weight" and f"master/{param}" in self.declared:
            return _Target(MODEL_FILE, place.key, place)
        return _Target(f"{UNIVERSAL}/{place.key}/{STATE_FILES[kind]}", PARAM, place)

    def _groups(self, names: list[str]) -> dict[tuple[str, str, str], list[str]]:
        """(file, tensor in it, parameter of the module) -> the declared tensors that it holds."""
        wanted: dict[str, int] = {}
        for place in self._names.places.values():
            wanted[place.key] = wanted.get(place.key, 0) + 1
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name in names:
            target = self._targets[name]
            groups.setdefault((target.file, target.key, target.place.key), []).append(name)
        for (_, _, member), found in groups.items():
            assert len(found) == wanted.get(member, 1), f"{member}: only {found} of it are declared"
        return groups

    def _make_folders(self) -> None:
        for file in (MODEL_FILE, *self._archives):
            (self._inner / file).parent.mkdir(parents=True, exist_ok=True)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        if name.startswith("step/"):
            self._steps[name] = float(tensor)
            return
        target = self._targets[name]
        archive = self._opened(target.file)
        self._unsynced.add(target.file)
        values = tensor.to(archive.layout.tensors[target.key].dtype)
        if not offsets:
            archive.write(target.key, (0,), values.reshape(1))
            return
        region = tuple(slice(at, at + size) for at, size in zip(offsets, tensor.shape, strict=True))
        assert not target.place.transposed, "trainers keep the table's orientation"
        for stored, inside in target.place.boxes(region):
            archive.write(target.key, tuple(part.start for part in stored), values[inside])

    def _opened(self, file: str) -> FilledArchive:
        archive = self._open[file] = self._archives[file]
        self._open.move_to_end(file)
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        return archive

    # -- continuing after a kill ---------------------------------------------------------------------------------------

    def _position(self, name: str) -> tuple[Any, ...]:
        if name.startswith("step/"):
            return ()
        target = self._targets[name]
        return (target.file, self._archives[target.file].layout.start(target.key), target.place.rows.first)

    def _sync(self) -> dict[str, float]:
        for file in sorted(self._unsynced):
            self._opened(file).sync()
        self._unsynced.clear()
        return dict(self._steps)

    def _restore(self, entry: Entry) -> bool:
        boxes = [box for box in entry.boxes if not box.name.startswith("step/")]
        if not super()._restore(Entry(boxes, None)):
            return False
        self._steps |= entry.state
        return True

    def _read_back(self, name: str, region: Region) -> torch.Tensor | None:
        target, info = self._targets[name], self.declared[name]
        archive = self._opened(target.file)
        try:
            if not region:
                return archive.read_back(target.key, (slice(0, 1),))[0].to(info.dtype)
            return target.place.read(region, info.dtype, lambda stored: archive.read_back(target.key, stored))
        except OSError:
            return None

    # -- finishing ---------------------------------------------------------------------------------------------------

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        """A file is whole when all ranks have written: then each rank seals its share of the files. That of the module
        waits for what the commit says of the training."""
        self._known = self.party.share(self._close_archives)
        files = sorted(self._archives.keys() - {MODEL_FILE})[self.party.rank :: self.party.world]
        content = {PARAM: Hole(PARAM), "cat_dim": 0}
        rows = [(file, *self._seal(file, content)) for file in files]
        fsync_files(self._inner / file for file in files)
        return [], (self._steps, rows)

    def _close_archives(self) -> dict[str, Progress]:
        while self._open:
            self._open.popitem()[1].close()
        return {file: archive.progress() for file, archive in self._archives.items()}

    def _seal(self, file: str, content: Any) -> tuple[str, int]:
        return self._archives[file].seal([part[file] for part in self._known], content)

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        steps = {name: step for found, _ in parts for name, step in found.items()}
        rows: list[FileRow] = []
        train = metadata.get("train") or {}
        count = self._step(steps, train)
        step = int(train.get("step") or count or 0)
        rows += self._write_optimizer(count or 0.0)
        if not self._has_moments:
            metadata["notes"] = [*(metadata.get("notes") or []), _ONLY_WEIGHTS]
        state = _model_state(step, int(train.get("samples") or 0))
        rows.append(self._save(SHARDED_MODEL_FILE, {"module": OrderedDict(), **state}))
        if MODEL_FILE in self._archives:
            module = OrderedDict((key, Hole(key)) for key in self._archives[MODEL_FILE].layout.tensors)
            rows.append((MODEL_FILE, *self._seal(MODEL_FILE, {"module": module, **state})))
        else:
            rows.append(self._save(MODEL_FILE, {"module": OrderedDict(), **state}))
        fsync_files(self._inner / file for file, _, _ in rows)
        for folder in [*(self._inner / UNIVERSAL).iterdir(), self._inner / UNIVERSAL, self._inner]:
            if folder.is_dir():
                fsync_folder(folder)
        rows += [row for _, found in parts for row in found]
        tag = f"{_FOLDER}{step}"
        shutil.rmtree(self._inner.with_name(tag), ignore_errors=True)  # of a run that was killed right after this
        self._inner.rename(self._inner.with_name(tag))
        return [*((f"{tag}/{file}", digest, size) for file, digest, size in rows), *self._point_at(tag)]

    @property
    def _has_moments(self) -> bool:
        return any(name.startswith("exp_avg") for name in self.declared)

    def _step(self, steps: dict[str, float], train: dict[str, Any]) -> float | None:
        """How many steps the optimizer has taken; None if nobody knows."""
        counts = sorted(set(steps.values()))
        if len(counts) > 1:
            raise UserError(
                f"{self.destination.path}: the parameters have taken {counts[0]:g} to {counts[-1]:g} optimizer steps, "
                "DeepSpeed counts one for all; write weights alone"
            )
        found = counts[0] if counts else train.get("step")
        if found is None and self._has_moments:
            raise UserError(
                f"{self.destination.path}: the source has moments of the optimizer but not the steps it has taken, "
                "which DeepSpeed needs; write weights alone"
            )
        return None if found is None else float(found)

    def _write_optimizer(self, count: float) -> list[FileRow]:
        rows = [self._save(OPTIMIZER_FILE, _optimizer_state(count))]
        moments = STATE_FILES["exp_avg"]
        for file in self._archives:
            folder, _, name = file.rpartition("/")
            if name == moments:
                rows.append(self._save(f"{folder}/{STEP_FILE}", torch.tensor(count)))
        return rows

    def _save(self, name: str, content: Any) -> FileRow:
        """A small file; it still has to be made durable."""
        path, saved = self._inner / name, io.BytesIO()
        torch.save(content, saved)
        with no_room(path):
            path.write_bytes(saved.getvalue())
        return name, file_hash(path), path.stat().st_size

    def _point_at(self, tag: str) -> list[FileRow]:
        rows = []
        for name in (LATEST, LATEST_UNIVERSAL):
            file = HashedFile(self.folder / name)
            file.write(tag.encode())
            rows.append(file.finish())
        return rows

    def _release(self) -> None:
        while self._open:
            self._open.popitem()[1].abandon()


def _optimizer_state(step: float) -> dict[str, Any]:
    """What DeepSpeed reads of the optimizer as a whole: nothing but the step, so that a trainer's own settings (rate,
    weight decay and betas of every group, clipping, loss scale) stay as they are."""
    return {
        "ds_version": _VERSION,
        "param_groups": [{"params": []} for _ in range(_GROUPS)],
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"params": []}]},
    }


def _model_state(step: int, samples: int) -> dict[str, Any]:
    """The entries of a model_states file beside the module."""
    return {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": None,
        # the position in the schedule, as DeepSpeed's own schedulers and torch's LambdaLR call it
        "lr_scheduler": {"last_batch_iteration": step - 1, "last_epoch": step, "lr_lambdas": []},
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
