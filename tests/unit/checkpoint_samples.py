"""Small models and checkpoints of random values, for the tests of compt_megatron.checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.contract import Layout, TensorInfo, Writer
from compt_megatron.checkpoint.formats import open_writer
from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

VISION = {"image_size": 16, "layers": 3, "width": 32, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 3, "layers": 2}
CLIP = spec_from_config({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "clip-tiny")
VIT = spec_from_config({"embed_dim": 10, "vision_cfg": {**VISION, "pool_type": "avg"}}, "vit-tiny")
SIGLIP = spec_from_config(
    {"embed_dim": 16, "init_logit_bias": -10, "vision_cfg": {**VISION, "no_ln_pre": True}, "text_cfg": TEXT},
    "siglip-tiny",
)

Values = dict[str, torch.Tensor]


def weights(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Values:
    """Random `weight/` tensors of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"weight/{name}": torch.randn(param.shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, param in spec.params.items()
    }


def training_state(spec: ModelSpec) -> Values:
    """All that a run checkpoint holds: bf16 weights, fp32 optimizer state, steps, projections, RNG, data position."""
    values = weights(spec, torch.bfloat16)
    for index, prefix in enumerate(("master", "exp_avg", "exp_avg_sq")):
        made = weights(spec, seed=index + 1)
        values |= {name.replace("weight/", f"{prefix}/", 1): value for name, value in made.items()}
    values |= {f"step/{name}": torch.tensor(7.0) for name in spec.params}
    values |= {
        "align/image.weight": torch.randn(4, 6),
        "master/align/image.weight": torch.randn(4, 6),
        "exp_avg/align/image.weight": torch.randn(4, 6, dtype=torch.float64),
        "step/align/image.weight": torch.tensor(7, dtype=torch.int64),
        "rng/rank0": torch.randint(0, 256, (100,), dtype=torch.uint8),
        "data/step": torch.tensor(7, dtype=torch.int64),
    }
    return values


def infos(values: Values) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}


def write(path: Path, format: str, spec: ModelSpec, values: Values, **metadata: Any) -> Path:
    """Write whole tensors in one process."""
    writer = open_writer(path, format, spec)
    try:
        writer.declare(infos(values))
        for name, value in values.items():
            writer.write(name, (0,) * value.dim(), value)
        return writer.commit(metadata)
    except BaseException:
        writer.abort()
        raise


class Exchange:
    """An all-gather of objects among threads."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=30)
        self._rows: list[Any] = [None] * world

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def exchange(value: Any) -> list[Any]:
            self._rows[rank] = value
            self._barrier.wait()
            rows = list(self._rows)
            self._barrier.wait()
            return rows

        return exchange


def write_together(
    path: Path,
    format: str,
    spec: ModelSpec,
    world: int,
    body: Callable[[Writer, int], Any],
    layout: Layout | None = None,
) -> list[BaseException | None]:
    """Let `world` threads write one checkpoint; returns what each raised. `body(writer, rank)` ends in a commit."""
    exchange, raised = Exchange(world), [None] * world

    def work(rank: int) -> None:
        try:
            ranks = {"rank": rank, "world": world, "exchange": exchange.of(rank)}
            writer = open_writer(path, format, spec, **ranks, layout=layout)
            try:
                body(writer, rank)
            except BaseException:
                writer.abort()
                raise
        except BaseException as error:
            raised[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(raised)


def row_share(value: torch.Tensor, rank: int, world: int) -> tuple[tuple[int, ...], torch.Tensor] | None:
    """Rank's rows of a tensor, as unevenly as rows may fall; rank 0 has every scalar."""
    if not value.dim():
        return ((), value) if rank == 0 else None
    rows = value.shape[0]
    start, stop = rank * rows // world, (rank + 1) * rows // world
    return ((start, *(0,) * (value.dim() - 1)), value[start:stop]) if stop > start else None


def refused(act: Callable[[], object], *words: str) -> None:
    """`act` is a user's mistake, said in one line with these words."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
