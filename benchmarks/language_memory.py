"""The memory model of `compt plan` against measured small language models, on one process, on the CPU.

    python benchmarks/language_memory.py

Four things are held against `compt_megatron.chain.memory`, and the relative errors go to
benchmarks/results/language_memory.json:

- kept: the bytes of all storages that autograd keeps of a forward pass and loss, Llama-type and GPT-2-type models, fp32
  and bf16, three kinds of recomputation;
- peak: the most that is alive in a forward and backward pass (torch's MemTracker), weights and gradients left out;
- aligned: the same where the states are projected and aligned to those of a teacher of half the width, which are there;
- states: weights, gradients and optimizer state after a step of the optimizer.

RMSNorm is a function that keeps what torch's operator on CUDA keeps (2.9 and later), its input and one number a token;
on the CPU torch composes it of operations that keep more. What a GPU needs beyond (context, NCCL, fragmentation,
workspaces inside kernels) is not measured here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory_model import row, write  # noqa: E402
from compt_megatron.chain.memory import estimate, kept_activations  # noqa: E402
from compt_megatron.chain.workload import Workload  # noqa: E402
from compt_megatron.recipe.parallel_section import ParallelSettings  # noqa: E402
from compt_megatron.recipe.sections import OptimizerSettings  # noqa: E402
from compt_megatron.spec.families import spec_from_config  # noqa: E402
from compt_megatron.spec.table import ModelSpec  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "language_memory.json"
ROWS, CHUNK = 8, 128

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA
    | {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    | {"intermediate_size": 352, "vocab_size": 1024, "max_position_embeddings": 128},
    "llama, query groups": _LLAMA
    | {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    | {"intermediate_size": 640, "vocab_size": 4096, "max_position_embeddings": 96},
    "llama, tied": _LLAMA
    | {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3}
    | {"intermediate_size": 256, "vocab_size": 2048, "max_position_embeddings": 64, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2048, "n_positions": 128},
}
DTYPES: dict[Any, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tokens(NamedTuple):
    """A batch as the objective reads it."""

    targets: torch.Tensor
    mask: torch.Tensor | None


def small_spec(name: str) -> ModelSpec:
    """One of the models."""
    return spec_from_config(dict(CONFIGS[name]), name)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's operator does: the input, and one fp32 number a token."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = (hidden.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(hidden, weight, inverse)
        return (hidden.float() * inverse).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        hidden, weight, inverse = ctx.saved_tensors
        unit = hidden.float() * inverse
        inner = slope.float() * weight
        to_hidden = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse
        to_weight = (slope.float() * unit).flatten(0, -2).sum(0)
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype), None


@contextmanager
def norms_as_on_cuda() -> Iterator[None]:
    """RMSNorm as `_FusedNorm`."""

    def fused(hidden: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        found: torch.Tensor = _FusedNorm.apply(hidden, weight, eps)
        return found

    with mock.patch("torch.nn.functional.rms_norm", fused):
        yield


def _built(spec: ModelSpec, dtype: torch.dtype, recompute: Any) -> tuple[Any, torch.Tensor]:
    from compt_megatron.models.build import build_language_model

    model = build_language_model(spec, dtype=dtype, recompute=recompute).train()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return model, torch.randint(0, 1024, (ROWS, spec.towers["text"].tokens + 1))


def _loss(model: Any, ids: torch.Tensor, teaching: Teaching | None = None) -> torch.Tensor:
    from compt_megatron.objectives.causal_lm import CausalLmObjective

    batch, outputs = Tokens(ids[:, 1:], None), model(ids[:, :-1])
    tokens = float(batch.targets.numel())
    loss = CausalLmObjective(chunk=CHUNK)(outputs, batch, None, tokens).loss
    return loss if teaching is None else loss + teaching.loss(outputs, tokens)


class Teaching:
    """The states of a teacher of half the width, the projection of the student's, and the distance of both."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        from compt_megatron.align.alignment import Alignment
        from compt_megatron.align.projection import Projections

        tower = spec.towers["text"]
        self.states = torch.randn(ROWS, tower.tokens, tower.width // 2, dtype=dtype)
        self.projections = Projections({"hidden": (tower.width, tower.width // 2)})
        self.alignment = Alignment(weight=0.3, towers=("hidden",))

    def loss(self, outputs: Any, tokens: float) -> torch.Tensor:
        from compt_megatron.share import CountedRows

        given, counted = self.projections(dict(outputs)), CountedRows(None, tokens)
        return self.alignment(given, {"hidden": self.states}, 0, 10, ROWS, counted=counted).loss


def kept_bytes(spec: ModelSpec, dtype: torch.dtype, recompute: Any) -> int:
    """Bytes of the storages that autograd keeps of a forward pass and loss of ROWS sequences, parameters left out."""
    model, ids = _built(spec, dtype, recompute)
    given = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds them: a freed storage's address may come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with norms_as_on_cuda(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss(model, ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(spec: ModelSpec, dtype: torch.dtype, recompute: Any, teaching: Teaching | None = None) -> int:
    """The most bytes that are alive in a forward and backward pass of ROWS sequences, without weights, gradients and
    the teacher's states."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, ids = _built(spec, dtype, recompute)
    modules = [model] if teaching is None else [model, teaching.projections]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:  # as engines have them: there before, and added to
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(*modules)
    with norms_as_on_cuda(), tracker:
        _loss(model, ids, teaching).backward()
    most = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return int(most) - 2 * sum(parameter.untyped_storage().nbytes() for parameter in parameters)


def workload(spec: ModelSpec, precision: Any) -> Workload:
    """The step that is measured."""
    return Workload(spec, None, ROWS, 1, precision, chunk=CHUNK)


def predicted_kept(spec: ModelSpec, precision: Any, recompute: Any) -> float:
    """What autograd keeps, by the memory model."""
    return kept_activations(workload(spec, precision), ParallelSettings(recompute=recompute), 1)


def predicted_peak(spec: ModelSpec, precision: Any, recompute: Any, teacher: ModelSpec | None = None) -> float:
    """The activations of the memory model, what only lives during the loss or the backward pass with them."""
    step = replace(workload(spec, precision), teacher=teacher)
    return estimate(step, ParallelSettings(recompute=recompute), 1).activations


def passes() -> dict[str, list[dict[str, Any]]]:
    """A row for each model, precision and recomputation: kept, at the peak, and at the peak of an aligned step."""
    found: dict[str, list[dict[str, Any]]] = {"kept": [], "peak": [], "aligned": []}
    for name in CONFIGS:
        spec = small_spec(name)
        narrow = replace(spec.towers["text"], width=spec.towers["text"].width // 2)
        teacher = replace(spec, towers={"text": narrow})
        for precision, dtype in DTYPES.items():
            for recompute in ("none", "selective", "full"):
                what = {"model": name, "precision": precision, "recompute": recompute}
                said, measured = predicted_kept(spec, precision, recompute), kept_bytes(spec, dtype, recompute)
                found["kept"].append(row(measured, said, **what))
                said, measured = predicted_peak(spec, precision, recompute), peak_bytes(spec, dtype, recompute)
                found["peak"].append(row(measured, said, **what))
                said = predicted_peak(spec, precision, recompute, teacher)
                measured = peak_bytes(spec, dtype, recompute, Teaching(spec, dtype))
                found["aligned"].append(row(measured, said, **what))
                errors = [f"{key} {100 * rows[-1]['error']:+.1f} %" for key, rows in found.items()]
                print(f"{name:<22} {precision} {recompute:<10}", *errors, flush=True)
    return found


def states() -> list[dict[str, Any]]:
    """Parameters, gradients and optimizer state of one process, in fp32."""
    from compt_megatron.engine.optimizer import build_optimizer

    rows = []
    for name in CONFIGS:
        spec = small_spec(name)
        model, ids = _built(spec, torch.float32, "none")
        optimizer = build_optimizer(model.named_parameters(), OptimizerSettings(lr=1e-3), lambda _: True)
        _loss(model, ids).backward()
        optimizer.step()
        memory = estimate(workload(spec, "fp32"), ParallelSettings(zero=0), 1)
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        gradients = [parameter.grad for parameter in model.parameters()]
        for what, tensors in (("weights", [*model.parameters()]), ("gradients", gradients), ("optimizer", moments)):
            measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            rows.append(row(measured, getattr(memory, what), model=name, what=what))
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", message="If you are using transformer_engine")
    write({**passes(), "states": states()}, RESULTS)


if __name__ == "__main__":
    main()
