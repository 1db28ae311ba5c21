"""What megatron-core's jobs of two ranks save, in both of Megatron-LM's formats, is read as the model they loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec
from tests.distributed.megatron_cases import PROBE, job
from tests.distributed.spawn import run_ranks
from tests.unit.checkpoint_samples import Values, write
from tests.unit.lm_helpers import gpt2, llama, make_spec, perturbed, split_state

pytest.importorskip("megatron.core")

CONFIGS = {
    "llama": llama(layers=4),
    "gpt2": gpt2(layers=4),
    "qwen2-tied": llama(layers=4, model_type="qwen2", tie_word_embeddings=True),
}
SPECS = {name: make_spec(config, name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Values, Any]]:
    """A run checkpoint of every model, its tensors, and transformers' model."""
    found = {}
    for name, spec in SPECS.items():
        theirs = perturbed(CONFIGS[name])
        tensors = split_state(spec, dict(theirs.state_dict()))
        values = {f"weight/{key}": value for key, value in tensors.items()}
        path = write(tmp_path_factory.mktemp(name) / "run", "megatron", spec, values)
        found[name] = (path, values, theirs)
    return found


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "virtual"),
    [
        ("llama", 2, 1, None),
        ("gpt2", 2, 1, None),
        ("qwen2-tied", 1, 2, None),
        ("llama", 1, 2, 2),
        ("llama", 1, 1, None),
    ],
)
def test_jobs_of_two_ranks(
    tmp_path: Path,
    sources: dict[str, tuple[Path, Values, Any]],
    name: str,
    tensor: int,
    pipeline: int,
    virtual: int | None,
) -> None:
    source, values, theirs = sources[name]
    found = run_ranks(job, 2, str(source), str(tmp_path), tensor, pipeline, virtual)
    if pipeline == 1:
        with torch.no_grad():
            assert (found[0][..., :61] - theirs(PROBE).logits).abs().max() < 1e-5
    legacy, spec = tmp_path / "legacy", SPECS[name]
    for path in (legacy, legacy / "iter_0000007"):
        if path == legacy:
            (legacy / "latest_checkpointed_iteration.txt").write_text("7")
        assert detect(path) == "megatron-legacy"
        known = _assert_holds(path, spec, values)
        assert known["train"] == {"step": 7, "samples": 56}
        assert (known["layout"]["tensor"], known["layout"]["pipeline"]) == (tensor, pipeline)
    _assert_refuses(legacy / "iter_0000007", spec)
    if virtual is None:
        _assert_has_moments(tmp_path / "torch_dist", spec, values)


def _assert_holds(path: Path, spec: ModelSpec, values: Values) -> dict[str, Any]:
    reader = open_reader(path, spec)
    assert reader.tensors().keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(reader.read(key), value), key
        region = tuple(slice(size // 3, size - size // 4) for size in value.shape)
        assert torch.equal(reader.read(key, region), value[region]), key
    reader.close()
    return reader.metadata()


def _assert_refuses(folder: Path, spec: ModelSpec) -> None:
    """A rank's file that is missing, the folder of the last rank, another model."""
    ranks = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"checkpoint of another model|has 4 layers|saved with num_layers"):
        open_reader(folder, make_spec(llama(layers=2)))
    file = ranks[-1] / "model_optim_rng.pt"
    file.rename(folder / "aside")
    with pytest.raises(UserError, match=rf"{ranks[-1].name}/model_optim_rng.pt: this file .* is missing"):
        open_reader(folder, spec)
    if len(ranks) > 1:
        shutil.rmtree(ranks[-1])
        with pytest.raises(UserError, match=r"has the files of 1 ranks, the job had .*_model_parallel_size 2"):
            open_reader(folder, spec)


def _assert_has_moments(path: Path, spec: ModelSpec, values: Values) -> None:
    """The gradient of x was sin(7 x), scaled to norm 1: so the first moment is 0.1, the second 0.001 times that."""
    reader = open_reader(path, spec)
    gradients = {key: (7 * value).sin() for key, value in values.items()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for key, gradient in gradients.items():
        rest = key.removeprefix("weight/")
        gradient = gradient / norm
        torch.testing.assert_close(reader.read(f"exp_avg/{rest}"), 0.1 * gradient, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(reader.read(f"exp_avg_sq/{rest}"), 1e-3 * gradient**2, atol=1e-9, rtol=1e-4)
        assert torch.equal(reader.read(f"master/{rest}"), reader.read(key))
        assert not torch.equal(reader.read(key), values[key])
    reader.close()
