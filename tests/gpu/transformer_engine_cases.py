"""Transformer Engine's layers against torch's on one device: `python -m tests.gpu.transformer_engine_cases FOLDER`.

A process of its own, as CUDA engines must not share one with tests that chose the CPU accelerator. With `--device cpu`
and the stand-in of tests/unit on PYTHONPATH it runs without a GPU, to see that it would run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.engine import layers
from compt_megatron.engine.layers import choose_layers
from compt_megatron.engine.runtime import Runtime
from compt_megatron.models import transformer_engine
from compt_megatron.models.block import LayerKind
from compt_megatron.models.build import build_language_model, build_model
from compt_megatron.models.groups import ensure_groups, lone_groups
from compt_megatron.models.layer_check import _block
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import load_canonical
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.families import load_spec, spec_from_config
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import ModelSpec
from tests.distributed.engine_cases import engine_of, rank_batch, write_start

CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 112, "patch_size": 14, "width": 256, "layers": 3, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 256, "heads": 4, "layers": 3},
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TF32 = 1e-2  # Transformer Engine's fp32 products are in TF32 whatever torch is told: 10 bits
Tensors = dict[str, torch.Tensor]


def outcome(spec: ModelSpec, kind: LayerKind, dtype: torch.dtype, device: str) -> Tensors:
    """Logits (of CLIP, features) and the gradients of all parameters, in fp64."""
    build: Any = build_language_model if spec.is_language_model else build_model
    model = build(spec, dtype=dtype, device=device, layers=kind)
    weights = {name: initial(param, 3) for name, param in spec.params.items()}
    load_canonical(model, spec, weights.__getitem__)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (4, 77), generator=generator).to(device)
    if spec.is_language_model:
        outputs = {"logits": model.logits(model(tokens)["hidden"])}
    else:
        images = torch.randn(4, 3, 112, 112, generator=generator).to(device, dtype)
        outputs = {key: value for key, value in model(images, tokens).items() if value.dim()}
    loss = sum((value.float() * torch.randn(value.shape, generator=generator).to(device)).sum()
               for value in outputs.values())  # fmt: skip
    loss.backward()
    found = {**outputs, **{name: param.grad for name, param in model.named_parameters() if param.grad is not None}}
    return {name: value.detach().double() for name, value in found.items()}


def errors(found: Tensors, wanted: Tensors) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def check_agreement(device: str) -> None:
    for spec in (spec_from_config(CLIP, "clip"), spec_from_config(LLAMA, "llama")):
        wanted = outcome(spec, "torch", torch.float32, device)
        fp32 = errors(outcome(spec, "transformer_engine", torch.float32, device), wanted)
        bf16 = errors(outcome(spec, "transformer_engine", torch.bfloat16, device), wanted)
        own = errors(outcome(spec, "torch", torch.bfloat16, device), wanted)
        worst = [f"{max(each.values()):.1e}" for each in (fp32, bf16, own)]
        print(f"{spec.name}: largest errors, fp32 {worst[0]}, bf16 {worst[1]} (torch's {worst[2]})")
        assert max(fp32.values()) < TF32, fp32
        for name, error in bf16.items():
            assert error < 1.5 * own[name] + 5e-3, (name, error, own[name])


def check_choice(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for name, config in (("clip", CLIP), ("llama", LLAMA)):
            chosen = choose_layers(spec_from_config(config, name), ParallelSettings(), dtype, torch.device(device))
            print(f"{name}, {dtype}: {chosen.name}")
            assert dtype == torch.float32 or chosen.kind == "transformer_engine", chosen


def check_run(folder: Path) -> None:
    """A run that changes its layers, under both engines, against one that does not."""
    runtime, start = Runtime.start(), write_start(folder / "start")

    def train(engine: str, kind: str, steps: range, load: Path, save: Path | None = None) -> list[float]:
        made = engine_of(runtime, {"engine": engine, "zero": 1, "layers": kind}, "bf16")
        made.load(load)
        losses = [made.step(rank_batch(step, 0, 1)).loss for step in steps]
        if save is not None:
            made.save(save, {"step": made.global_step}, [])
        made.close()
        return losses

    for engine in ("deepspeed", "megatron"):
        wanted = train(engine, "torch", range(4), start)
        for first, second in (("transformer_engine", "torch"), ("torch", "transformer_engine")):
            saved = folder / f"{engine}-{first}"
            found = train(engine, first, range(2), start, saved) + train(engine, second, range(2, 4), saved)
            print(engine, first, second, found)
            assert found == pytest.approx(wanted, rel=3e-2), (engine, first, wanted)


def time_block(device: str, repeats: int = 20) -> None:
    """Milliseconds of forward and backward of one vision block of ViT-L/14, bf16, both ways in turn."""
    spec = load_spec("ViT-L-14")
    tower = replace(spec.towers["vision"], tokens=257)
    kinds: tuple[LayerKind, ...] = ("torch", "transformer_engine")
    groups, part = lone_groups(), ModelPart(spec)
    blocks = {kind: _block(spec, tower, part, torch.bfloat16, False, groups, kind).to(device) for kind in kinds}
    batch = 64 if device == "cuda" else 2
    hidden = torch.randn(257, batch, tower.width, device=device, dtype=torch.bfloat16)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        for block in blocks.values():
            for param in block.parameters():
                param.normal_(0, 0.02)
    for _ in range(repeats + 3):
        for kind, block in blocks.items():
            wait(device)
            start = time.perf_counter()
            block.decoder(hidden.requires_grad_(), None).sum().backward()
            wait(device)
            seconds[kind].append(time.perf_counter() - start)
    medians = {kind: sorted(each[3:])[repeats // 2] * 1e3 for kind, each in seconds.items()}
    print(f"a block of ViT-L/14, {batch} x 257 tokens, bf16, forward and backward, ms: {medians}")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    reason = transformer_engine.absence()
    assert reason is None, reason
    layers._DEVICE = options.device
    ensure_groups()
    check_choice(options.device)
    check_agreement(options.device)
    check_run(options.folder)
    time_block(options.device, repeats=20 if options.device == "cuda" else 1)


if __name__ == "__main__":
    main()
