"""What ranks of a Megatron job do: load a checkpoint into megatron-core's own GPT model, train a step, save it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.checkpoint.megatron_args import model_args
from compt_megatron.spec.table import ModelSpec
from tests.unit import megatron_gpt as gpt


def job(
    rank: int, world: int, source: str, target: str, tensor: int, pipeline: int, virtual: int | None
) -> torch.Tensor | None:
    """Save `target/legacy` and, without a virtual pipeline, `target/torch_dist`; returns logits without a pipeline."""
    parallel = gpt.ready(tensor, pipeline, virtual)
    spec = _spec(source)
    models = [gpt.build(spec, vocab=_padded(tensor), stage=stage) for stage in _stages(virtual)]
    names = ["model"] if virtual is None else [f"model{index}" for index in range(virtual)]
    _load(Path(source), dict(zip(names, models, strict=True)))
    found = gpt.logits(models[0], PROBE) if pipeline == 1 else None
    args = argparse.Namespace(
        **model_args(spec),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        consumed_train_samples=56,
        params_dtype=torch.float32,
        attention_backend=_attention_backend(),
    )
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    here = f"mp_rank_{parallel.get_tensor_model_parallel_rank():02d}"
    if pipeline > 1:
        here += f"_{parallel.get_pipeline_model_parallel_rank():03d}"
    folder = Path(target) / "legacy" / "iter_0000007" / here
    if parallel.get_data_parallel_rank() == 0:
        folder.mkdir(parents=True)
        states = {name: model.state_dict_for_save_checkpoint() for name, model in zip(names, models, strict=True)}
        torch.save({**common, **states, "rng_state": [{"np_rng_state": np.random.get_state()}]}, folder / _FILE)
    if virtual is None:
        _, state = gpt.train_step(models[0], "fully_reshardable")
        gpt.save(Path(target) / "torch_dist", {**common, **state}, distrib_optim_sharding_type="fully_reshardable")
    return found


_FILE = "model_optim_rng.pt"
PROBE = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def _spec(source: str) -> ModelSpec:
    reader = open_reader(source)
    assert reader.spec is not None
    reader.close()
    return reader.spec


def _padded(tensor: int) -> int:
    return 64 * tensor


def _stages(virtual: int | None) -> list[int | None]:
    return [None] if virtual is None else list(range(virtual))


def _attention_backend() -> Any:
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend.auto


def _load(source: Path, models: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    with gpt.cpu():
        found = dist_checkpointing.load({name: gpt.sharded(model) for name, model in models.items()}, str(source))
    for name, model in models.items():
        model.load_state_dict(found[name])
