"""What tests/unit/test_engine_layers.py runs in a process of its own, where the stand-in for Transformer Engine can be
imported before megatron-core is: `python -m tests.unit.transformer_engine_cases FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformer_engine as standin

from compt_megatron.engine import layers
from compt_megatron.engine.layers import Layers, choose_layers
from compt_megatron.engine.runtime import Runtime
from compt_megatron.errors import UserError
from compt_megatron.models import transformer_engine
from compt_megatron.models.block import block_layers, transformer_config
from compt_megatron.models.build import build_language_model, build_model
from compt_megatron.models.groups import ensure_groups
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import canonical_state, load_canonical
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from tests.distributed.engine_cases import CONFIG, engine_of, rank_batch, start_weights, write_start

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MARKS = ("sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
CHOSEN = Layers("transformer_engine", "layers of Transformer Engine")


def choose(spec: ModelSpec, device: torch.device = CPU, dtype: torch.dtype = torch.float32, **parallel: Any) -> Layers:
    layers._checked.clear()
    return choose_layers(spec, ParallelSettings(**parallel), dtype, device)


def check_choice(clip: ModelSpec, llama: ModelSpec) -> None:
    assert transformer_engine.absence() is None
    assert choose(clip).name == "layers of torch (no CUDA device)"
    failing = choose(clip, torch.device("cuda"))  # there is none: the check cannot run
    assert failing.kind == "torch"
    assert "(Transformer Engine's layers fail: " in failing.name
    layers._DEVICE = "cpu"
    for spec in (clip, llama):
        assert choose(spec) == choose(spec, dtype=torch.bfloat16) == CHOSEN
        assert choose(spec, layers="transformer_engine") == CHOSEN
        assert choose(spec, layers="torch") == Layers("torch", "layers of torch")
    assert choose(clip, zero=3).name == "layers of torch (zero 3 was never tried with Transformer Engine)"
    standin.ERROR = 3e-4  # as products in TF32 are
    assert choose(llama, dtype=torch.bfloat16) == CHOSEN
    differing = choose(llama)
    assert differing.kind == "torch"
    for words in ("differs by", "(allowed: 2e-05)", "in a block of the text tower"):
        assert words in differing.name
    with pytest.raises(UserError, match=r"^parallel\.layers: 'transformer_engine' cannot be had .* use auto or torch$"):
        choose(llama, layers="transformer_engine")
    standin.ERROR = 0.1
    assert choose(clip, dtype=torch.bfloat16).kind == "torch"
    standin.ERROR = 0.0


def check_attention(llama: ModelSpec) -> None:
    tower = llama.towers["text"]

    def attention(dtype: torch.dtype, window: int | None = None) -> str:
        config = transformer_config(tower, dtype, "none", ModelPart(llama))
        return block_layers("transformer_engine", tower, config, window).attention.__name__

    assert attention(torch.bfloat16) == "TEDotProductAttention"
    assert attention(torch.bfloat16, window=8) == attention(torch.float32) == "SdpaAttention"


def check_names(spec: ModelSpec, build: Any) -> None:
    """Weights go in and out by the same names, and the model computes what torch's computes."""
    values = start_weights(spec)
    wanted, found = build(spec), build(spec, layers="transformer_engine")
    assert any(key.endswith("_extra_state") for key in found.state_dict()), "the stand-in has what is to be ignored"
    for model in (wanted, found):
        load_canonical(model, spec, values.__getitem__)
    assert all(torch.equal(value, values[name]) for name, value in canonical_state(found, spec).items())
    tokens = torch.randint(0, 31, (2, 8))
    inputs = (tokens,) if spec.is_language_model else (torch.randn(2, 3, 16, 16), tokens)
    with torch.no_grad():
        if spec.is_language_model:
            assert torch.equal(*(model(*inputs)["hidden"] for model in (wanted, found)))
        else:
            assert torch.equal(*(model(*inputs)["image"] for model in (wanted, found)))


def check_marks(spec: ModelSpec, build: Any) -> None:
    """What megatron-core and the engines ask of parameters, on one of two tensor-parallel ranks."""
    options = {"part": ModelPart(spec, tensor=2), "sequence": True}
    marks = [
        {name: [tuple(param.shape), *(getattr(param, mark, None) for mark in MARKS)] for name, param in each}
        for each in (
            build(spec, **options).named_parameters(),
            build(spec, layers="transformer_engine", **options).named_parameters(),
        )
    ]
    assert marks[0] == marks[1]


def check_run(folder: Path) -> None:
    """A run goes on under other layers from its checkpoint: the same losses."""
    runtime, start = Runtime.start(), write_start(folder / "start")

    def train(layers: str, steps: range, load: Path, save: Path | None = None) -> list[float]:
        engine = engine_of(runtime, {"engine": "megatron", "layers": layers, "recompute": True})
        assert layers in engine.implementation.replace("Transformer Engine", "transformer_engine")
        engine.load(load)
        losses = [engine.step(rank_batch(step, 0, 1)).loss for step in steps]
        if save is not None:
            engine.save(save, {"step": engine.global_step}, [])
        engine.close()
        return losses

    layers._checked.clear()
    wanted = train("torch", range(4), start)
    found = train("transformer_engine", range(2), start, folder / "saved")
    found += train("torch", range(2, 4), folder / "saved")
    assert found == pytest.approx(wanted, rel=1e-6)


def be_one_of_two() -> None:
    """Groups of two tensor-parallel ranks of which only this one is there: nothing may be sent."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)


def main(folder: Path) -> None:
    ensure_groups()
    clip = spec_from_config(CONFIG, "clip")
    llama = spec_from_config(LLAMA, "llama")
    check_choice(clip, llama)
    check_attention(llama)
    check_names(clip, build_model)
    check_names(llama, build_language_model)
    check_run(folder)
    be_one_of_two()
    check_marks(clip, build_model)
    check_marks(llama, build_language_model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
