"""Which layers blocks are made of: Transformer Engine's where they are there and do what torch's do, else torch's.

Transformer Engine needs CUDA: a stand-in on the CPU takes its place, behind megatron-core's own wrappers."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.chain import doctor
from compt_megatron.engine.layers import Layers, choose_layers
from compt_megatron.errors import UserError
from compt_megatron.models import transformer_engine
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import CONFIG
from tests.unit.transformer_engine_standin import SOURCE, write

ROOT = Path(__file__).resolve().parents[2]


def test_on_the_cpu() -> None:
    spec = spec_from_config(CONFIG, "tiny")

    def choose(**parallel: Any) -> Layers:
        return choose_layers(spec, ParallelSettings(**parallel), torch.float32, torch.device("cpu"))

    assert choose() == Layers("torch", "layers of torch (no CUDA device)")
    assert choose(layers="torch") == Layers("torch", "layers of torch")
    with pytest.raises(UserError, match=r"^parallel\.layers: .* for 'tiny' here: no CUDA device; use auto or torch$"):
        choose(layers="transformer_engine")
    with pytest.raises(ValueError, match=r"layers 'transformer_engine' does not go with zero 3; use zero: 2 or"):
        choose(layers="transformer_engine", zero=3)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that does not know Transformer Engine yet; modules that are imported from `tmp_path` are forgotten."""
    names = ("transformer_engine", "dependant")
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(transformer_engine, "_hidden", None)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]


DEPENDANT = """
try:
    import transformer_engine as te
    Base = te.pytorch.Linear
except ImportError:
    Base = object
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libcudnn.so.9:\\nno such file')", "cannot be imported (OSError: libcudnn.so.9:)"),
        ("import not_there", "cannot be imported (ModuleNotFoundError: No module named 'not_there')"),
        (SOURCE.replace("Linear=Linear, ", ""), "cannot use this Transformer Engine (AttributeError: module"),
    ],
    ids=["broken", "incomplete", "other version"],
)
def test_one_that_is_broken_is_as_one_that_is_absent(process: None, tmp_path: Path, source: str, reason: str) -> None:
    write(tmp_path, source)
    (tmp_path / "dependant.py").write_text(DEPENDANT)
    transformer_engine.import_beside("dependant", lambda: importlib.import_module("dependant"))
    assert sys.modules["dependant"].Base is object
    found = transformer_engine.absence()
    assert reason in str(found)
    assert "\n" not in str(found)
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")
def test_choice_names_marks_and_a_run(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(write(tmp_path / "standin")), str(ROOT)]),
    }
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.transformer_engine_cases", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_doctor_says_what_is_wrong(process: None, tmp_path: Path) -> None:
    assert doctor._transformer_engine(cuda=True) == {"version": None, "problem": None}
    write(tmp_path, "raise OSError('libcudnn.so.9:\\nno such file')")
    found = doctor.examine()
    wrong = doctor._transformer_engine(cuda=True)
    assert wrong == {"version": "unknown", "problem": "OSError: libcudnn.so.9:"}
    line = "Transformer Engine cannot be imported (OSError: libcudnn.so.9:): blocks are made of torch's layers"
    assert line in doctor.advice({**found, "transformer_engine": wrong})
