"""Seconds of a training step: both engines against a bare PyTorch loop and against open_clip's own trainer.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py            # fp32, about 6 minutes on an idle core
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --bf16     # bf16 weights with fp32 masters
    python benchmarks/train_step.py --profile megatron           # where the time goes: torch.profiler's table

One process, one thread, the same weights, batch and weight-decay groups for all, two settings:

- `task`: the contrastive loss alone. The bare loop is open_clip's own model class, its loss and torch's fused AdamW,
  and nothing else. open_clip's trainer is its `train_one_epoch` called on a batch in memory: its command line needs
  pandas and an older webdataset, and its synthetic data has no text that ends.
- `distilled`: the same with a teacher: ours aligns features, open_clip's trainer has its --distill-model with the same
  teacher. (Different losses; the work is one more forward pass of the teacher in both.)

open_clip's trainer gets the fused AdamW as well, which its command line does not choose on a CPU. In bf16 it is run
with autocast (its --precision amp_bf16) and with weights in bf16 (pure_bf16, whose moments are bf16, half of ours).
All have the whole optimizer state (zero: 0); `deepspeed zero 1` is the recipes' default, made for several processes.

Each has a process of its own, so that what one settles for its process (ours keep their freed memory, see
compt_megatron/heap.py) is not the others' too. All take a step in turn, A B C A B C ..., and a ratio is taken within a
round, so that a machine whose speed drifts slows both sides. CPU seconds of the process are what an idle machine's
clock would show and what the bars are held to; wall seconds stand beside them. Bars: at most 1.10 times the bare loop's
step, at least the throughput of open_clip's trainer. Results: benchmarks/results/train_step.json, by precision.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.open_clip_parity import probe  # noqa: E402
from compt_megatron.data.batch import Batch  # noqa: E402
from compt_megatron.recipe.load import recipe_from  # noqa: E402
from compt_megatron.spec.families import load_spec, spec_from_config  # noqa: E402
from compt_megatron.spec.open_clip_names import open_clip_place  # noqa: E402
from compt_megatron.spec.random import initial  # noqa: E402
from compt_megatron.spec.table import ModelSpec  # noqa: E402
from compt_megatron.torchvision_mend import ensure_torchvision  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "train_step.json"
SLOWEST = 1.10  # times the bare loop
LR, DECAY, BETAS, EPS = 1e-4, 0.1, (0.9, 0.98), 1e-6
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
OURS = (("deepspeed", "deepspeed", 0), ("deepspeed zero 1", "deepspeed", 1), ("megatron", "megatron", 0))
Step = Callable[[], float]  # takes a training step and returns its loss


# -- the contenders ----------------------------------------------------------------------------------------------------


def engine_step(
    name: str, zero: int, spec: ModelSpec, teacher_spec: ModelSpec | None, batch: Batch, precision: str, start: Path
) -> Step:
    """Our engine `name`, from the checkpoint `start`."""
    from compt_megatron.align.alignment import Alignment
    from compt_megatron.align.projection import Projections
    from compt_megatron.align.teacher import Teacher
    from compt_megatron.engine.build import engine_class
    from compt_megatron.engine.runtime import Runtime
    from compt_megatron.objectives.registry import build_objective

    settings = recipe_from(
        {
            "name": "step",
            "precision": precision,
            "data": {"train": "emoji/train", "batch_size": len(batch)},
            "optimizer": {
                "lr": LR, "weight_decay": DECAY, "betas": list(BETAS), "eps": EPS, "schedule": "constant",
            },
            "parallel": {"engine": name, "zero": zero},
            "links": [{"model": "clip-emoji-s", "steps": 10_000}],
        }
    ).link_settings(0)  # fmt: skip
    runtime, teaching = Runtime.start(), {}
    if teacher_spec is not None:
        params, dtype = teacher_spec.params, torch.float32 if precision == "fp32" else torch.bfloat16
        teaching = {
            "teacher": Teacher.build(teacher_spec, lambda key: initial(params[key], 1), dtype=dtype),
            "alignment": Alignment(1.0),
            "projections": Projections.between(spec, teacher_spec),
        }
    engine = engine_class(settings.parallel)(
        spec, settings, build_objective("clip"), runtime, total_steps=10_000, **teaching
    )
    engine.load(start)
    return lambda: engine.step(batch).loss


def open_clip_model(spec: ModelSpec, seed: int) -> nn.Module:
    """open_clip's own model with the weights that `write_fresh` gives ours for `seed`."""
    from open_clip.model import CLIP

    model = CLIP(**spec.config, output_dict=True)
    state = model.state_dict()
    for name, param in spec.params.items():
        place = open_clip_place(spec, name)
        own = state[place.key] if place.rows is None else state[place.key][place.start : place.start + place.rows]
        own.copy_(initial(param, seed))
    return model


def adamw(model: nn.Module, spec: ModelSpec) -> torch.optim.AdamW:
    """torch's fused AdamW with our weight-decay groups."""
    decays = {open_clip_place(spec, name).key for name, param in spec.params.items() if param.decays}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for key, parameter in model.named_parameters():
        groups[key in decays].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip


def bare_step(spec: ModelSpec, batch: Batch, precision: str) -> Step:
    """The shortest loop that does the work. In bf16 the optimizer has fp32 masters of the weights, as ours has."""
    from open_clip.loss import ClipLoss

    model, loss_of = open_clip_model(spec, 0).train(), ClipLoss(cache_labels=True)
    assert batch.texts is not None
    images, texts = batch.images, batch.texts.flatten(0, 1)
    if precision == "fp32":
        optimizer = adamw(model, spec)

        def step() -> float:
            optimizer.zero_grad()
            loss = loss_of(**model(images, texts))
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
            return float(loss.detach())

        return step
    masters = open_clip_model(spec, 0)
    optimizer = adamw(masters, spec)
    model, images = model.bfloat16(), images.bfloat16()
    pairs = list(zip(model.parameters(), masters.parameters(), strict=True))

    def step_bf16() -> float:
        model.zero_grad()
        out = {key: value.float() for key, value in model(images, texts).items()}
        loss = loss_of(**out)
        loss.backward()
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        with torch.no_grad():
            masters.logit_scale.clamp_(0, 4.6052)
            for weight, master in pairs:
                weight.copy_(master)
        return float(loss.detach())

    return step_bf16


def trainer_step(spec: ModelSpec, teacher_spec: ModelSpec | None, batch: Batch, precision: str) -> Step:
    """open_clip's train_one_epoch over an epoch of one batch. `precision` is its own word."""
    from open_clip.loss import ClipLoss, DistillClipLoss
    from open_clip_train.train import train_one_epoch

    model = open_clip_model(spec, 0)
    teacher = None if teacher_spec is None else open_clip_model(teacher_spec, 1).requires_grad_(False)
    if precision == "pure_bf16":
        model = model.bfloat16()
        teacher = None if teacher is None else teacher.bfloat16()
    optimizer = adamw(model, spec)
    losses: list[float] = []

    class Loss(ClipLoss if teacher is None else DistillClipLoss):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            losses.append(float(sum(found.values()).detach()))
            return found

    assert batch.texts is not None

    class Loader(list[Any]):
        num_batches, num_samples = 1, len(batch)

    loader = Loader([(batch.images, batch.texts.flatten(0, 1))])
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    args = SimpleNamespace(
        device="cpu", precision=precision, distill=teacher is not None, accum_freq=1, skip_scheduler=True,
        horovod=False, grad_clip_norm=None, rank=0, local_rank=0, log_local=False, log_every_n_steps=1,
        batch_size=len(batch), world_size=1, wandb=False,
    )  # fmt: skip
    loss = Loss(cache_labels=True)

    def step() -> float:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, args)
        return losses.pop()

    return step


def contenders(
    spec: ModelSpec, teacher: ModelSpec | None, batch: Batch, precision: str, start: Path
) -> dict[str, Callable[[], Step]]:
    """Everybody who takes part: what makes each ready to step."""
    found: dict[str, Callable[[], Step]] = {}
    for name, engine, zero in OURS:
        if zero or (engine, precision) != ("deepspeed", "bf16"):  # whose Adam would run a step ahead
            found[name] = partial(engine_step, engine, zero, spec, teacher, batch, precision, start)
    if teacher is None:
        found["bare loop"] = partial(bare_step, spec, batch, precision)
    for word in ["fp32"] if precision == "fp32" else ["amp_bf16", "pure_bf16"]:
        found[f"open_clip {word}"] = partial(trainer_step, spec, teacher, batch, word)
    return found


class Taken(NamedTuple):
    """A step that a contender took."""

    loss: float
    cpu: float
    wall: float


class Contender:
    """A process that takes a step when it is told to. Forked, so that it need not import everything again."""

    def __init__(self, make: Callable[[], Step]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, other), daemon=True)
        self._process.start()
        other.close()

    def step(self) -> Taken:
        """Raises EOFError where the process has ended; its error is on stderr."""
        self._pipe.send(True)
        return self._pipe.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


def _serve(make: Callable[[], Step], pipe: Connection) -> None:
    step = make()
    while pipe.recv():
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send(Taken(loss, time.process_time() - cpu_start, time.perf_counter() - wall_start))


# -- the measurement ---------------------------------------------------------------------------------------------------


def measure(makers: dict[str, Callable[[], Step]], rounds: int) -> dict[str, Any]:
    """Two steps of each that are not counted, then `rounds` rounds of one step of each."""
    steps = {name: Contender(make) for name, make in makers.items()}
    first = {name: each.step().loss for name, each in steps.items()}
    for each in steps.values():
        each.step()
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, each in steps.items():
            taken = each.step()
            cpu[name].append(taken.cpu)
            wall[name].append(taken.wall)
    for each in steps.values():
        each.close()
    ratios = {}
    engines = [name for name, *_ in OURS if name in steps]
    for ours in engines:
        for theirs in (name for name in steps if name not in engines):
            ratios[f"{ours} / {theirs}"] = {
                "cpu": _spread([a / b for a, b in zip(cpu[ours], cpu[theirs], strict=True)]),
                "wall": _spread([a / b for a, b in zip(wall[ours], wall[theirs], strict=True)]),
            }
    seconds = {name: {"cpu": _spread(cpu[name]), "wall": _spread(wall[name])} for name in steps}
    return {"rounds": rounds, "first_loss": first, "seconds": seconds, "ratios": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def verdict(pair: str, ratio: float) -> str:
    """Whether a ratio of step times keeps its bar."""
    bar = SLOWEST if pair.endswith("bare loop") else 1.0
    return f"{'within' if ratio <= bar else 'BEYOND'} {bar:.2f}"


def show(setting: str, found: dict[str, Any]) -> None:
    for name, seconds in found["seconds"].items():
        cpu, wall = seconds["cpu"], seconds["wall"]
        print(f"{setting:<10} {name:<28} first loss {found['first_loss'][name]:.5f}, {cpu['median']:.3f} CPU s, "
              f"{wall['median']:.3f} wall s", flush=True)  # fmt: skip
    for pair, ratio in found["ratios"].items():
        cpu, wall = ratio["cpu"], ratio["wall"]
        print(
            f"{setting:<10} {pair:<28} {cpu['median']:.3f} ({cpu['least']:.3f} to {cpu['most']:.3f}), "
            f"wall {wall['median']:.3f}: {verdict(pair, cpu['median'])}",
            flush=True,
        )


def profile(step: Step) -> None:
    """Print where a step's time goes, by operator."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="compt-ViT-S-16")
    parser.add_argument("--teacher", default="compt-ViT-T-16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--bf16", action="store_true", help="bf16 instead of fp32")
    parser.add_argument("--setting", choices=("task", "distilled"), help="one of the two (default: both)")
    parser.add_argument("--profile", metavar="NAME", help="profile one contender instead")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one round; nothing is written")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ensure_torchvision()
    from compt_megatron.growth.fresh import write_fresh

    spec, teacher = (
        (spec_from_config(TINY, "tiny"), spec_from_config({**TINY, "embed_dim": 12}, "teacher"))
        if options.smoke
        else (load_spec(options.model), load_spec(options.teacher))
    )
    images, texts = probe(spec, options.batch)
    assert texts is not None
    batch = Batch(images, texts.unsqueeze(1), None, [str(row) for row in range(options.batch)], 0)
    precision = "bf16" if options.bf16 else "fp32"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = write_fresh(spec, Path(folder) / "start", seed=0)
        for setting in [options.setting] if options.setting else ["task", "distilled"]:
            steps = contenders(spec, teacher if setting == "distilled" else None, batch, precision, start)
            if options.profile:
                profile(steps[options.profile]())
                continue
            found[setting] = measure(steps, 1 if options.smoke else options.rounds)
            show(setting, found[setting])
    if found and not options.smoke:
        write(precision, {**describe(options, spec, teacher), **found})
    return 0


def describe(options: argparse.Namespace, spec: ModelSpec, teacher: ModelSpec) -> dict[str, Any]:
    return {
        "command": "OMP_NUM_THREADS=1 python benchmarks/train_step.py" + " --bf16" * options.bf16,
        "machine": {
            "processor": platform.machine(), "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__,
            "load": round(os.getloadavg()[0]),
        },
        "model": {"name": options.model, "parameters": spec.numel},
        "teacher": {"name": options.teacher, "parameters": teacher.numel},
        "batch": options.batch,
    }  # fmt: skip


def write(precision: str, result: dict[str, Any]) -> None:
    """Put the result beside those of the other precision; a setting that was left out keeps its last one."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[precision] = {**known.get(precision, {}), **result}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
