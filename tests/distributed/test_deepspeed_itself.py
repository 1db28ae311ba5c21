"""DeepSpeed's own checkpoints are read as they were in memory, and DeepSpeed continues from those that we write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.api import check, convert, inspect
from compt_megatron.checkpoint.contract import Reader
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.checkpoint.module_names import trainer_names
from compt_megatron.errors import UserError
from compt_megatron.models.state import module_to_canonical, split_fused
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.megatron_names import megatron_place
from compt_megatron.spec.table import ModelSpec
from tests.distributed.deepspeed_cases import Case, load_and_train, train_and_save
from tests.distributed.spawn import run_ranks
from tests.unit.checkpoint_samples import refused

STEPS, MORE = 3, 2
CLIP = spec_from_config(
    {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 31, "width": 16, "heads": 2, "layers": 1},
    },
    "clip-tiny",
)
GPT2 = spec_from_config(
    {"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 9, "vocab_size": 31}, "gpt2-tiny"
)
OPEN_CLIP, TRANSFORMERS = trainer_names(CLIP).shapes, trainer_names(GPT2).shapes
# this project's own module under training: fused and interleaved q, k and v, projections beside the model
OWN = {f"model.{(place := megatron_place(CLIP, name)).module}": place.shape for name in CLIP.params} | {
    "projections.layers.image.weight": (7, 12),
    "projections.layers.image.bias": (7,),
}
WRAPPED = {f"module.{name}": shape for name, shape in OPEN_CLIP.items()}

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # makes DeepSpeed take another optimizer, with other files
UNCLIPPED = {"gradient_clipping": 0.0}  # a gradient's norm depends on the order of its elements, in the last bit
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 20}}}
CASES = [
    Case("plain", OPEN_CLIP, 0),
    Case("plain_bf16", TRANSFORMERS, 0, "bf16", groups=1),
    Case("one_universal", TRANSFORMERS, 1, config=WARMUP),
    Case("one_bf16", WRAPPED, 1, "bf16", config=FP32_SUMS),
    Case("two_bf16", OPEN_CLIP, 2, "bf16", config=UNCLIPPED),
    Case("round_robin", OPEN_CLIP, 2, "bf16", zero={"round_robin_gradients": True}, config=UNCLIPPED),
    Case("frozen_two", OPEN_CLIP, 2, "bf16", frozen=("visual.",)),
    Case("three_universal", TRANSFORMERS, 3, "bf16", zero={"sub_group_size": 500}),
    Case("three", OWN, 3),
    Case("frozen_three", OPEN_CLIP, 3, "bf16", frozen=("visual.",)),
]
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(train_and_save, 2, folder, CASES, STEPS, MORE)
    return folder


def _spec(case: Case) -> ModelSpec:
    return GPT2 if case.shapes is TRANSFORMERS else CLIP


def _live(folder: Path, name: str) -> dict[str, Any]:
    # what DeepSpeed keeps with round robin is right, but what it says of it is that of other parameters
    found: dict[str, Any] = torch.load(folder / f"{'two_bf16' if name == 'round_robin' else name}.live")
    return found


def _canonical(spec: ModelSpec, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the table that a module's parameter holds, cut the plain way."""
    if name.startswith("projections.layers."):
        return {f"align/{name.removeprefix('projections.layers.')}": tensor}
    name = name.removeprefix("module.").removeprefix("model.")
    if name in spec.params:
        return {name: tensor.view(spec.params[name].shape)}
    for fused, dim in (("in_proj_weight", 0), ("in_proj_bias", 0), ("c_attn.weight", 1), ("c_attn.bias", 0)):
        if name.endswith(f".attn.{fused}"):
            before, leaf = name.removesuffix(fused), fused.replace(".", "_").rpartition("_")[2]
            return {f"{before}{part}_proj.{leaf}": piece for part, piece in zip("qkv", tensor.chunk(3, dim))}
    assert name in module_to_canonical(spec), name
    return split_fused(spec, name, tensor)


def _expected(case: Case, live: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their name on the boundary."""
    found = {}
    for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
        for stored, tensor in live[kind].items():
            for name, value in _canonical(_spec(case), stored, tensor).items():
                if kind != "master" or case.dtype != "fp32":
                    found[name if kind == "weight" and name.startswith("align/") else f"{kind}/{name}"] = value
    return found


def _assert_holds(reader: Reader, expected: dict[str, torch.Tensor], step: float) -> None:
    held = reader.tensors()
    assert {name for name in held if not name.startswith("step/")} == expected.keys()
    for name, value in expected.items():
        read = reader.read(name)
        assert read.dtype == value.dtype == held[name].dtype, name
        assert torch.equal(read, value), name
        if value.dim() > 1 and min(value.shape) > 3:
            box = tuple(slice(1, size - 1) for size in value.shape)
            assert torch.equal(reader.read(name, box), value[box]), name
    assert {float(reader.read(name)) for name in held if name.startswith("step/")} == {step}
    assert sum(name.startswith("step/") for name in held) == sum(
        name.startswith("exp_avg/") and "align/" not in name for name in held
    )


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_training_checkpoints_are_read_as_they_were_in_memory(trained: Path, case: Case) -> None:
    live = _live(trained, case.name)
    path = trained / case.name
    if case.name.endswith("_universal"):
        with pytest.raises(UserError, match=r"two checkpoints \(deepspeed-zero and deepspeed\); name"):
            detect(path)
        assert detect(path / "universal") == "deepspeed"
        path = path / f"global_step{STEPS}"
    assert detect(path) == "deepspeed-zero"
    reader = open_reader(path, _spec(case))
    _assert_holds(reader, _expected(case, live), live["step"])
    assert reader.metadata()["train"] == {"step": STEPS, "samples": STEPS * 2}
    reader.close()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.endswith("_universal")], ids=lambda case: case.name
)
def test_what_ds_to_universal_makes_reads_the_same(trained: Path, case: Case) -> None:
    live = _live(trained, case.name)
    reader = open_reader(trained / case.name / "universal", _spec(case))
    _assert_holds(reader, _expected(case, live), live["step"])
    reader.close()


@pytest.fixture(scope="module")
def universal(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we make of a training checkpoint of two ranks."""
    path = tmp_path_factory.mktemp("universal") / "converted"
    assert convert(trained / "one_universal" / f"global_step{STEPS}", path, "deepspeed", spec=GPT2) == []
    check(path)
    return path


@pytest.mark.parametrize("world", [1, 3])
def test_deepspeed_continues_at_any_stage_and_world_size(trained: Path, universal: Path, world: int) -> None:
    live = _live(trained, "one_universal")
    jobs = [(Case(f"stage{stage}", TRANSFORMERS, stage, config=WARMUP), universal) for stage in (1, 2, 3)]
    for found in run_ranks(load_and_train, world, jobs, range(STEPS, STEPS + MORE))[0]:
        for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
            for name, value in live[kind].items():
                assert torch.equal(found[kind][name], value), (kind, name)
        assert (found["step"], found["global_steps"]) == (live["step"], STEPS)
        assert found["losses"] == pytest.approx(live["losses"], rel=1e-6)


def test_deepspeed_loads_the_weights_alone(trained: Path, tmp_path: Path) -> None:
    live = _live(trained, "two_bf16")
    convert(trained / "two_bf16", tmp_path / "run", "megatron", spec=CLIP)
    convert(tmp_path / "run", tmp_path / "whole", "deepspeed")
    convert(tmp_path / "run", tmp_path / "export", "open_clip")
    convert(tmp_path / "export", tmp_path / "weights", "deepspeed")
    assert inspect(tmp_path / "weights")["notes"][-1] == "weights only: load with load_module_only=True"
    jobs = [(Case(f"stage{stage}", OPEN_CLIP, stage, "bf16"), tmp_path / "weights") for stage in (1, 2, 3)]
    jobs.append((Case("stage0", OPEN_CLIP, 0, "bf16"), tmp_path / "whole"))  # without ZeRO the module itself is loaded
    for found in run_ranks(load_and_train, 2, jobs, range(0), True)[0]:
        for name, value in live["weight"].items():
            assert torch.equal(found["weight"][name], value), name


def _copy(trained: Path, name: str, target: Path) -> Path:
    """A copy to break; returns the folder with the files."""
    shutil.copytree(trained / name, target)
    return target / f"global_step{STEPS}"


def test_incomplete_and_damaged_checkpoints_are_refused(trained: Path, tmp_path: Path) -> None:
    files = _copy(trained, "two_bf16", tmp_path / "a")
    last, first = (files / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (1, 0))
    whole = last.read_bytes()
    for half in (whole[: len(whole) // 2], b"", whole[:-30] + bytes(30)):
        last.write_bytes(half)
        refused(lambda: open_reader(tmp_path / "a", CLIP), last.name, "damaged")
    last.unlink()
    refused(lambda: open_reader(tmp_path / "a", CLIP), "optimizer files of 1 ranks are there, 2 wrote it")
    last.write_bytes(whole)
    first.rename(files / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(lambda: open_reader(tmp_path / "a", CLIP), "files of two checkpoints", last.name)
    (files / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    refused(lambda: open_reader(tmp_path / "a", CLIP), first.name, "missing")
    (tmp_path / "a" / "latest").write_text("global_step9")
    refused(lambda: detect(tmp_path / "a"), "latest", "names 'global_step9', which is not there")
    shards = _copy(trained, "three", tmp_path / "b")
    (shards / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    refused(lambda: open_reader(tmp_path / "b", CLIP), "zero_pp_rank_0_mp_rank_00_model_states.pt", "missing")


def test_what_is_not_supported_is_refused_with_the_reason(trained: Path, tmp_path: Path) -> None:
    files = _copy(trained, "two_bf16", tmp_path / "a")
    refused(lambda: open_reader(tmp_path / "a"), "does not record which model it holds", "--from")
    refused(lambda: open_reader(tmp_path / "a", GPT2), "another model than 'gpt2-tiny'", "transformer.wte.weight")
    bigger = spec_from_config({**CLIP.config, "embed_dim": 16}, "bigger")
    refused(lambda: open_reader(tmp_path / "a", bigger), "'visual.proj' has shape (24, 12)", "needs (24, 16)")
    alone = spec_from_config({key: CLIP.config[key] for key in ("embed_dim", "vision_cfg")}, "alone")
    refused(lambda: open_reader(tmp_path / "a", alone), "it also has 'positional_embedding'")
    for name, reason in (
        ("mp_rank_01_model_states.pt", "tensor or pipeline parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts"),
        ("layer_00-model_00-model_states.pt", "pipeline stages"),
    ):
        (files / name).touch()
        refused(lambda: open_reader(tmp_path / "a", CLIP), reason, name)
        (files / name).unlink()


def test_the_model_may_be_recorded_beside(trained: Path, tmp_path: Path) -> None:
    _copy(trained, "three_universal", tmp_path / "gpt2")
    shutil.rmtree(tmp_path / "gpt2" / "universal")
    (tmp_path / "gpt2" / "latest_universal").unlink()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(GPT2.config))
    _copy(trained, "frozen_two", tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP.config}))
    for name, spec in (("gpt2", GPT2), ("clip", CLIP)):
        assert detect(tmp_path / name) == "deepspeed-zero"
        found = open_reader(tmp_path / name).spec
        assert found is not None
        assert found.digest == spec.digest


def test_deepspeed_need_not_be_installed(trained: Path) -> None:
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from compt_megatron.checkpoint.formats import open_reader\n"
        "from compt_megatron.spec.families import spec_from_config\n"
        f"spec = spec_from_config({GPT2.config!r}, 'gpt2')\n"
        "for path in sys.argv[1:]:\n"
        "    reader = open_reader(path, spec)\n"
        "    print(sum(reader.read(name).numel() for name in reader.tensors()))\n"
    )
    root = trained / "three_universal"
    paths = [str(root / name) for name in (f"global_step{STEPS}", "universal")]
    out = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == [str(4 * GPT2.numel + len(GPT2.params))] * 2
