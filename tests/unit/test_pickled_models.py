"""A whole model in a file, pickled or as TorchScript, is read where the user trusts who wrote it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compt_megatron.checkpoint.api import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from tests.unit.checkpoint_samples import refused
from tests.unit.growth_helpers import clip_config, make_spec, perturbed

ROOT = Path(__file__).parents[2]
CONFIG = {**clip_config(ls_init_value=1e-4), "custom_text": True}
SPEC = make_spec(CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as its state dict and in all the ways that whole models are saved."""
    folder = tmp_path_factory.mktemp("files")
    model = perturbed(CONFIG)
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(model, folder / "whole.pt")
    torch.save(model, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    texts = torch.zeros(1, model.context_length, dtype=torch.int64)
    with torch.no_grad():
        torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), texts)).save(folder / "script.pt")
    return folder


@pytest.mark.parametrize("name", ["whole.pt", "legacy.pt", "script.pt"])
def test_it_has_the_weights_of_its_state_dict(files: Path, name: str) -> None:
    state, whole = open_reader(files / "state.pt", SPEC), open_reader(files / name, SPEC, trust_pickle=True)
    assert whole.tensors() == state.tensors()
    assert weight_hash(whole) == weight_hash(state)
    part = (slice(3, 7), slice(2, 5))
    key = "weight/visual.transformer.resblocks.1.attn.k_proj.weight"
    assert torch.equal(whole.read(key, part), state.read(key)[part])
    refused(lambda: open_reader(files / name, SPEC), name, "--trust-pickle")


BY_PLACE = """
import os, sys
from pathlib import Path
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive
print(type(SavedArchive(Path(sys.argv[1]), OpenFiles(os.O_RDONLY), True).content).__name__)
"""


def in_a_new_process(*argv: str) -> str:
    done = subprocess.run(
        [sys.executable, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_that_has_imported_nothing_reads_it(files: Path) -> None:
    """Unpickling imports open_clip, and with it torchvision, which beside a CPU torch must be mended first."""
    command = ["-m", "compt_megatron", "inspect", str(files / "legacy.pt"), "--json", "--trust-pickle"]
    shown = json.loads(in_a_new_process(*command, "--from", str(files / "config.json")))
    assert shown["model"]["parameters"] == SPEC.numel
    assert in_a_new_process("-c", BY_PLACE, str(files / "whole.pt")) == "CustomTextCLIP\n"


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_package.py").write_text("import torch\nclass Model(torch.nn.Linear): pass\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        model = importlib.import_module("their_package").Model(2, 2)
        torch.save(model, tmp_path / "zip.pt")
        torch.save(model, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    monkeypatch.delitem(sys.modules, "their_package")
    importlib.invalidate_caches()
    for name in ("zip.pt", "legacy.pt"):
        refused(
            lambda name=name: open_reader(tmp_path / name, SPEC, trust_pickle=True),
            name,
            "needs the package 'their_package'; install it",
        )
