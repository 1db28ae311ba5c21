"""No format, layout or number of workers changes a byte: random models through random places, grown and compared."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compt_megatron.checkpoint.api import convert
from compt_megatron.checkpoint.contract import Layout, Reader, TensorInfo
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.growth.api import grow
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.random import normal
from compt_megatron.spec.table import ModelSpec
from tests.unit.growth_helpers import clip_config
from tests.unit.lm_helpers import gpt2, llama

STATES = ("master", "exp_avg", "exp_avg_sq")
SMALL: dict[str, dict[str, Any]] = {
    "clip": clip_config(32, 2, 32, 2, joint=8),
    "vit": {key: value for key, value in clip_config(32, 2).items() if key != "text_cfg"},
    "llama": llama(32, 4, 2, 2, 48, 8, attention_bias=True, mlp_bias=True),
    "llama tied": llama(32, 4, 2, 2, 48, 8, tie_word_embeddings=True),
    "gpt2": gpt2(32, 4, 2, 96),
}
LARGE: dict[str, dict[str, Any]] = {
    "clip": clip_config(64, 4, 64, 4, joint=8),
    "vit": {key: value for key, value in clip_config(64, 4).items() if key != "text_cfg"},
    "llama": llama(64, 8, 4, 4, 80, 8, attention_bias=True, mlp_bias=True),
    "llama tied": llama(64, 8, 4, 4, 80, 8, tie_word_embeddings=True),
    "gpt2": gpt2(64, 8, 4, 160),
}
LAYOUTS = [Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2)]


def make(kind: str, large: bool) -> ModelSpec:
    return spec_from_config(copy.deepcopy((LARGE if large else SMALL)[kind]), f"{kind}-{'large' if large else 'small'}")


def places(kind: str, state: bool) -> list[tuple[str, Layout]]:
    """The formats, with layouts, that hold a model (and its optimizer's state)."""
    own = "hf" if kind in ("gpt2", "llama", "llama tied") else "open_clip"
    found = [("megatron", layout) for layout in LAYOUTS] + [("deepspeed", Layout())]
    if state:
        return found
    found += [("megatron-lm", layout) for layout in LAYOUTS] if own == "hf" else []
    return [*found, (own, Layout())]


def write_random(spec: ModelSpec, path: Path, state: bool) -> None:
    """A checkpoint with a random value everywhere, bf16 weights and fp32 state."""
    infos, values = {}, {}
    for prefix in ("weight", *(STATES if state else ())):
        for name, param in spec.params.items():
            dtype = torch.bfloat16 if prefix == "weight" and state else torch.float32
            values[f"{prefix}/{name}"] = normal(7, f"{prefix}/{name}", param.shape).to(dtype)
    if state:
        values |= {f"step/{name}": torch.tensor(5.0) for name in spec.params}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}
    writer = open_writer(path, "megatron", spec)
    writer.declare(infos)
    for name, value in values.items():
        writer.write(name, (0,) * value.dim(), value)
    writer.commit({})


def content(path: Path) -> dict[str, torch.Tensor]:
    reader: Reader = open_reader(path)
    try:
        return {name: reader.read(name) for name in sorted(reader.tensors())}
    finally:
        reader.close()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_growth_from_anywhere_to_anywhere(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(SMALL)))
    state = data.draw(st.booleans())
    (first, before), (second, after) = (data.draw(st.sampled_from(places(kind, state))) for _ in range(2))
    tiled = data.draw(st.booleans())
    options: dict[str, Any] = {"moments": "grow" if state else "fresh", "seed": 3}
    if tiled:
        options |= {"axes": {"embed": "tile", "heads": "tile"}, "noise": 0.01}
    target = make(kind, large=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_random(make(kind, large=False), home / "source", state)
        grow(home / "source", home / "wanted", to=target, **options)
        convert(home / "source", home / "elsewhere", first, layout=before)
        same(content(home / "elsewhere"), content(home / "source"))
        grow(home / "elsewhere", home / "found", to=target, format=second, layout=after, **options)
        same(content(home / "found"), content(home / "wanted"))
        convert(home / "found", home / "back", "megatron")
        same(content(home / "back"), content(home / "wanted"))
