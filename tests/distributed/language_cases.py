"""A language model's loss and gradients in a layout, by megatron's schedules and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.objectives.causal_lm import CausalLmObjective
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.random import initial, normal
from compt_megatron.spec.table import ModelSpec

ROWS, TOKENS, LAYERS = 8, 11, (0, 2)
ALIGN = 0.3  # weight of a loss on inner layers
CONFIGS: dict[str, dict[str, Any]] = {
    "untied": {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
    "tied": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
_LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "intermediate_size": 48, "vocab_size": 61}
CONFIGS = {name: {**_LLAMA, **config, "max_position_embeddings": 32} for name, config in CONFIGS.items()}
CONFIGS["head norm"] = {**CONFIGS["tied"], "model_type": "qwen3", "head_dim": 10, "attention_bias": True}
CONFIGS["gpt2"] = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": 61, "n_positions": 16}
State = dict[str, torch.Tensor]
Pieces = list[tuple[str, tuple[slice, ...], torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A model and its layout; the ranks that are left are data-parallel."""

    config: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    sequence: bool = False
    recompute: Any = "none"
    micro_batches: int = 1
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Batch:
    """Tokens, what follows them, and which of that counts."""

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Batch:
        mask = None if self.mask is None else self.mask[start:stop]
        return replace(self, tokens=self.tokens[start:stop], targets=self.targets[start:stop], mask=mask)


@dataclass
class Found:
    """A step's loss, the same without backward, and this rank's pieces of the gradients."""

    loss: float
    evaluated: float
    gradients: Pieces


def whole_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 61, (ROWS, TOKENS + 1), generator=generator)
    mask = torch.rand(ROWS, TOKENS, generator=generator) < torch.linspace(0.1, 1, ROWS)[:, None]  # rows count unequally
    return Batch(ids[:, :-1], torch.where(mask, ids[:, 1:], -100), mask)


def weights(spec: ModelSpec) -> State:
    """No bias is zero and no norm trivial."""
    return {
        name: initial(param, 3).double() + normal(4, name, param.shape, scale=0.1).double()
        for name, param in spec.params.items()
    }


def objective() -> CausalLmObjective:
    return CausalLmObjective(z_loss=0.01, chunk=7)


def inner_loss(outputs: dict[str, Any], width: int) -> torch.Tensor:
    """Of what a stage has of LAYERS; summed over stages and micro-batches it is that of the batch."""
    squares = [value.square().sum() for name, value in outputs.items() if name.startswith("layer_")]
    return sum(squares, torch.zeros(())) * ALIGN / (ROWS * TOKENS * width)


def run(rank: int, world: int, cases: list[Case]) -> list[Found]:
    """One rank's part of every case."""
    return [_run_one(case) for case in cases]


def _run_one(case: Case) -> Found:
    from compt_megatron.models.stages import sum_tied_gradients

    chunks, part, place = parts_of(case)
    own = ROWS // place.data
    batch = whole_batch().rows(place.data_rank * own, (place.data_rank + 1) * own)
    evaluated = schedule(chunks, batch, case, place, backward=False)
    loss = schedule(chunks, batch, case, place, backward=True)
    sum_tied_gradients(chunks)
    gradients: Pieces = []
    for chunk, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        for module_name, names in part.names(chunk).items():
            gradient = parameters[module_name].grad
            assert gradient is not None, module_name
            dist.all_reduce(gradient, group=place.data_group)
            for name, value in part.split(names, gradient).items():
                gradients.append((name, part.box(name), value.clone()))
    return Found(loss, evaluated, gradients)


def parts_of(case: Case) -> tuple[list[Any], Any, Any]:
    """This rank's chunks of the model, filled, what they are, and its place in the layout. Collective."""
    from compt_megatron.engine.student import sum_sequence_gradients
    from compt_megatron.engine.topology import Topology
    from compt_megatron.models.build import build_language_model
    from compt_megatron.models.groups import ensure_groups
    from compt_megatron.models.megatron_cpu import use_cpu_in_training
    from compt_megatron.models.part import ModelPart
    from compt_megatron.models.state import load_canonical

    use_cpu_in_training()
    ensure_groups(case.tensor, case.pipeline, case.virtual)
    spec, place = spec_from_config(CONFIGS[case.config], case.config), Topology.current()
    part, state, chunks = ModelPart.current(spec), weights(spec), []
    for chunk in range(case.virtual):
        model = build_language_model(
            spec, dtype=case.dtype, recompute=case.recompute, sequence=case.sequence, part=part, chunk=chunk
        )
        load_canonical(model, spec, state.__getitem__, part, chunk)
        sum_sequence_gradients(model.train(), place)
        chunks.append(model)
    return chunks, part, place


def schedule(chunks: list[Any], batch: Batch, case: Case, place: Any, backward: bool, scale: float = 1.0) -> float:
    """The loss of the global batch, on the ranks that have the last stage; what other stages add to it is not in it.

    batch: this rank's rows. `scale`: a factor on what is differentiated.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from compt_megatron.models.stages import with_loss

    rows, causal = len(batch.tokens) // case.micro_batches, objective()
    micro = [batch.rows(start, start + rows) for start in range(0, len(batch.tokens), rows)]
    divisor = causal.divisor(batch, place.data_group)
    width = chunks[0].tower.width

    def forward(indices: Iterator[int], model: Any) -> tuple[Any, Any]:
        part = micro[next(indices)]
        outputs = model(part.tokens, layers=LAYERS)
        if not model.post_process:
            return with_loss(outputs["activations"], inner_loss(outputs, width) * scale), None

        def loss(outputs: Any) -> tuple[torch.Tensor, Any]:
            task = causal(outputs, part, place.data_group, divisor)
            # the schedule divides by the number of micro-batches, in place
            return (task.loss + inner_loss(outputs, width)) * scale * len(micro), task.loss.detach().clone()

        return outputs, loss

    shares = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(range(len(micro))) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro),
        seq_length=chunks[0].padded(TOKENS),
        micro_batch_size=rows,
        forward_only=not backward,
    )
    if not place.has_outputs:
        return float("nan")
    share = torch.stack(shares).sum()
    dist.all_reduce(share, group=place.data_group)
    return float(share)


def one_process(config: str) -> tuple[float, State]:
    """Loss and gradients of the whole model on the whole batch, the loss made of all logits by plain PyTorch."""
    from compt_megatron.models.build import build_language_model
    from compt_megatron.models.state import load_canonical, split_fused

    spec, batch = spec_from_config(CONFIGS[config], config), whole_batch()
    model = build_language_model(spec, dtype=torch.float64)
    load_canonical(model, spec, weights(spec).__getitem__)
    outputs = model(batch.tokens, layers=LAYERS)
    logits = model.logits(outputs["hidden"])[batch.mask]
    entropy = torch.nn.functional.cross_entropy(logits, batch.targets[batch.mask])
    loss = entropy + 0.01 * logits.logsumexp(-1).square().mean()
    (loss + inner_loss(outputs, spec.towers["text"].width)).backward()
    gradients: State = {}
    for module_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients |= split_fused(spec, module_name, parameter.grad)
    return float(loss.detach()), gradients


def joined(config: str, ranks: list[Found]) -> State:
    """The whole gradients of all ranks' pieces. Pieces that several ranks have must be alike, to rounding."""
    spec = spec_from_config(CONFIGS[config], config)
    whole: State = {}
    for name, region, values in (piece for rank in ranks for piece in rank.gradients):
        target = whole.setdefault(name, torch.full(spec.params[name].shape, torch.nan, dtype=values.dtype))
        known = ~target[region].isnan()
        close = 0.0 if values.dtype == torch.bfloat16 else 1e-9
        assert torch.allclose(target[region][known], values[known], rtol=close, atol=1e-3 * close), name
        target[region] = values
    assert whole.keys() == spec.params.keys()
    assert not any(value.isnan().any() for value in whole.values())
    return whole
