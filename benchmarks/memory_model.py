"""The memory model of `compt plan` against measured small runs, on one process and on two, on the CPU.

    python benchmarks/memory_model.py

Three things are held against `compt_megatron.chain.memory`, and the relative errors go to
benchmarks/results/memory_model.json:

- activations: the bytes of all storages that autograd keeps in a forward pass (saved_tensors_hooks), of real towers of
  several shapes, in fp32 and bf16, with and without recomputation, loss included;
- states of one process: parameters, gradients and optimizer state after a step of the optimizer;
- states under DeepSpeed's ZeRO 0 to 3 on two processes: the bytes of all tensors that are alive after a step.

CPU kernels keep what the CUDA ones keep (the fused attention q, k, v, output and log-sum-exp). What a GPU needs beyond
(context, NCCL, fragmentation) is not in the model, and not measured here.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compt_megatron.chain.memory import bucket_bytes, estimate, kept_activations  # noqa: E402
from compt_megatron.chain.workload import Workload  # noqa: E402
from compt_megatron.recipe.load import recipe_from  # noqa: E402
from compt_megatron.recipe.parallel_section import ParallelSettings  # noqa: E402
from compt_megatron.recipe.schema import Settings  # noqa: E402
from compt_megatron.spec.families import spec_from_config  # noqa: E402
from compt_megatron.spec.table import ModelSpec  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "memory_model.json"
ROWS = 16

# (vision width, layers, head width, image size), (text width, layers, heads, context), joint
SHAPES: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int], int]] = {
    "narrow": ((64, 2, 32, 64), (64, 2, 2, 16), 32),
    "deep": ((96, 6, 32, 64), (64, 4, 2, 16), 32),
    "wide": ((256, 3, 64, 96), (128, 2, 2, 32), 64),
    "long": ((128, 3, 32, 128), (96, 2, 3, 77), 64),
}


def shape_spec(name: str) -> ModelSpec:
    """A small CLIP model of one of the shapes; patches of 8 pixels."""
    (width, layers, head, size), (text, text_layers, heads, context), joint = SHAPES[name]
    return spec_from_config(
        {
            "embed_dim": joint,
            "vision_cfg": {
                "image_size": size, "patch_size": 8, "width": width, "layers": layers, "head_width": head,
            },
            "text_cfg": {
                "context_length": context, "vocab_size": 512, "width": text, "heads": heads, "layers": text_layers,
            },
        },
        name,
    )  # fmt: skip


def kept_bytes(spec: ModelSpec, dtype: torch.dtype, recompute: Any) -> int:
    """Bytes of the storages that autograd keeps of one forward pass and loss of ROWS samples, parameters left out."""
    from compt_megatron.models.build import build_model
    from compt_megatron.objectives.registry import build_objective

    model = build_model(spec, dtype=dtype, recompute=recompute).train()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    given = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds them: a freed storage's address may come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    size = spec.config["vision_cfg"]["image_size"]
    images = torch.randn(ROWS, 3, size, size).to(dtype)
    texts = torch.randint(1, 512, (ROWS, spec.towers["text"].tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        build_objective("clip")(model(images=images, texts=texts), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted_kept(spec: ModelSpec, precision: Any, recompute: Any) -> float:
    """The model's activations, without what only lives during the backward pass."""
    layout = ParallelSettings(recompute=recompute)
    return kept_activations(Workload(spec, None, ROWS, 1, precision), layout, 1)


def activations() -> list[dict[str, Any]]:
    """One row for each shape, precision and recomputation."""
    rows = []
    for name in SHAPES:
        spec = shape_spec(name)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for recompute in ("none", "selective", "full"):
                measured = kept_bytes(spec, dtype, recompute)
                said = predicted_kept(spec, precision, recompute)
                rows.append(row(measured, said, shape=name, precision=precision, recompute=recompute))
    return rows


def states() -> list[dict[str, Any]]:
    """Parameters, gradients and optimizer state of one process, in fp32."""
    from compt_megatron.engine.optimizer import build_optimizer
    from compt_megatron.models.build import build_model

    rows = []
    for name in SHAPES:
        spec = shape_spec(name)
        model = build_model(spec)
        optimizer = build_optimizer(model.named_parameters(), _settings(0, "fp32").optimizer, lambda _: True)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        memory = estimate(Workload(spec, None, ROWS, 1, "fp32"), ParallelSettings(zero=0), 1)
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for what, tensors in (("weights", [*model.parameters()]), ("gradients", gradients), ("optimizer", moments)):
            measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            rows.append(row(measured, getattr(memory, what), shape=name, what=what))
    return rows


def _settings(zero: int, precision: str) -> Settings:
    values = {
        "name": "memory",
        "precision": precision,
        "data": {"train": "emoji/train", "batch_size": ROWS},
        "optimizer": {"lr": 0.001},
        "parallel": {"zero": zero},
        "links": [{"model": "clip-emoji-s", "steps": 10}],
    }
    return recipe_from(values).link_settings(0)


def live_at_update(rank: int, world: int, name: str, zero: int, precision: str, start: str) -> int:
    """Bytes of all tensors that a rank's DeepSpeed engine has alive when the optimizer begins its second update, when
    gradients and states are both there, from the checkpoint `start`."""
    from compt_megatron.data.batch import Batch
    from compt_megatron.engine.deepspeed import DeepSpeedEngine
    from compt_megatron.engine.runtime import Runtime
    from compt_megatron.objectives.registry import build_objective

    runtime, spec = Runtime.start(), shape_spec(name)
    size, rows = spec.config["vision_cfg"]["image_size"], ROWS // world
    images, names = torch.randn(rows, 3, size, size), [str(row) for row in range(rows)]
    texts = torch.randint(1, 512, (rows, 1, spec.towers["text"].tokens))
    before = set(_storages())
    engine = DeepSpeedEngine(spec, _settings(zero, precision), build_objective("clip"), runtime, total_steps=10)
    engine.load(Path(start))
    live: list[int] = []
    update = engine._optimizer.step  # called once for each parameter group under ZeRO

    def measured(*args: Any, **options: Any) -> Any:
        gc.collect()
        live.append(sum(size for address, size in _storages().items() if address not in before))
        return update(*args, **options)

    engine._optimizer.step = measured
    for step in range(2):
        engine.step(Batch(images, texts, None, names, step))
    return max(live[len(live) // 2 :])


def _storages() -> dict[int, int]:
    """Address and bytes of the storage of every tensor that is alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecated names, and .grad of tensors that are no leaves
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def zero_states(world: int = 2) -> list[dict[str, Any]]:
    """Weights, gradients and optimizer state under DeepSpeed, without its bucket, of the rank that has most."""
    from benchmarks.memory_model import live_at_update
    from compt_megatron.growth.fresh import write_fresh
    from tests.distributed.spawn import run_ranks

    rows = []
    for name in SHAPES:
        spec = shape_spec(name)
        with tempfile.TemporaryDirectory() as folder:
            start = str(write_fresh(spec, Path(folder) / "start", seed=0))
            for precision in ("fp32", "bf16"):
                for zero in (0, 1, 2, 3):
                    if (precision, zero) == ("bf16", 0):
                        continue  # its Adam runs a step ahead: nobody should train with it
                    live = run_ranks(live_at_update, world, name, zero, precision, start)
                    layout = ParallelSettings.model_validate({"zero": zero})
                    workload = Workload(spec, None, ROWS, 1, precision)
                    memory, bucket = asdict(estimate(workload, layout, world)), bucket_bytes(workload, layout)
                    parts = {key: memory[key] for key in ("weights", "gradients", "optimizer")}
                    if zero == 3:  # its bucket stays; that of the other stages is freed behind the backward pass
                        live = [one - bucket for one in live]
                    found = row(max(live), sum(parts.values()), shape=name, precision=precision, zero=zero)
                    rows.append({**found, "parameters": spec.numel, "parts": parts})
                    print(found, flush=True)
    return rows


def row(measured: float, predicted: float, **what: Any) -> dict[str, Any]:
    return {**what, "measured": measured, "predicted": predicted, "error": predicted / measured - 1}


def write(found: dict[str, list[dict[str, Any]]], results: Path) -> None:
    """Keep the rows of each kind, and say how far the largest error of each is."""
    worst = {what: max(abs(row["error"]) for row in rows) for what, rows in found.items()}
    machine = f"{platform.machine()} CPU, torch {torch.__version__}"
    results.write_text(json.dumps({"machine": machine, "worst_error": worst, **found}, indent=1) + "\n")
    for what, error in worst.items():
        print(f"{what:<12} {len(found[what])} runs, largest relative error {100 * error:.2f} %")


def main() -> None:
    warnings.filterwarnings("ignore", message="If you are using transformer_engine")
    write({"activations": activations(), "states": states(), "zero": zero_states()}, RESULTS)


if __name__ == "__main__":
    main()
