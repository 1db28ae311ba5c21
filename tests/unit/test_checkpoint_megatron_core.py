"""megatron-core itself loads a run checkpoint into its own transformer blocks, `_extra_state` included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compt_megatron.spec.megatron_names import megatron_place
from tests.unit.checkpoint_samples import CLIP, weights, write

pytest.importorskip("megatron.core")


def test_dist_checkpointing_loads_the_towers(tmp_path: Path) -> None:
    from compt_megatron.models.build import build_model

    model = build_model(CLIP)
    from megatron.core import dist_checkpointing

    values = weights(CLIP)
    path = write(tmp_path / "run", "megatron", CLIP, values, train={"step": 3})
    options = {"singleton_local_shards": False}
    for name in ("vision", "text"):
        decoder = getattr(model, name).decoder
        sharded = decoder.sharded_state_dict(prefix=f"{name}.decoder.", metadata=options)
        loaded = dist_checkpointing.load(sharded, str(path))
        assert loaded["iteration"] == 3
        state = {key.removeprefix(f"{name}.decoder."): value for key, value in loaded.items()}
        decoder.load_state_dict({key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, False)
        found = dict(decoder.named_parameters())
        blocks = [param for param in CLIP.params.values() if param.tower == name and param.stage == "layer"]
        assert {key.partition("layers.")[2] for key in found} == {
            megatron_place(CLIP, param.name).module.partition("layers.")[2] for param in blocks
        }
        for param in blocks:
            place = megatron_place(CLIP, param.name)
            tensor = found[place.module.removeprefix(f"{name}.decoder.")]
            if place.part is not None:
                size = CLIP.towers[name].head_dim
                per_head = tensor.view(-1, 3, size, *tensor.shape[1:])
                tensor = per_head[:, "qkv".index(place.part)].reshape(param.shape)
            assert torch.equal(tensor, values[f"weight/{param.name}"]), param.name
