"""The wheel, without the extra `train`: everything that the grow tool needs is in it, and it needs nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = (
    "megatron", "deepspeed", "open_clip", "torchvision", "timm", "webdataset", "tensorboard", "matplotlib", "psutil",
    "emoji", "resvg_py", "PIL", "transformers", "tokenizers", "zstandard", "pytest",
)  # fmt: skip

# Runs commands in one process in which the packages of the extras cannot be found, as if they were not installed.
BARE = """
import contextlib, importlib.machinery, io, json, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else super().find_spec(name, path, target)

EXTRAS = set(json.loads(sys.argv[1]))
sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

import compt_megatron
from compt_megatron.cli import main
from compt_megatron.growth.fresh import write_fresh
from compt_megatron.spec.families import load_spec

write_fresh(load_spec("clip-emoji-s"), "small.pt", 0, format="open_clip")
results = []
for argv in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code or 0
    found = sorted(EXTRAS & {name.partition(".")[0] for name in sys.modules})
    results.append([code, out.getvalue(), err.getvalue(), found])
print(json.dumps({"package": compt_megatron.__file__, "results": results}))
"""

COMMANDS = {
    "help": ["--help"],
    "plan": ["plan", "cc3m", "--json"],
    "plan demo": ["plan", "emoji", "--json"],
    "recipe": ["train", "emoji", "--print-recipe"],
    "dry run": ["grow", "small.pt", "never", "--from", "clip-emoji-s", "--to", "clip-emoji-m", "--dry-run"],
    "grow": ["grow", "small.pt", "large", "--from", "clip-emoji-s", "--to", "clip-emoji-m"],
    "grow to the run's format": ["grow", "large", "larger", "--to", "clip-emoji-l", "--format", "megatron"],
    "inspect": ["inspect", "larger", "--json"],
    "verify": ["verify", "larger", "--against", "large", "--json"],
    "convert": ["convert", "larger", "larger.safetensors", "--format", "open_clip"],
    "doctor": ["doctor"],
    "train": ["train", "emoji", "--run-dir", "run"],
    "eval": ["eval", "large", "--data", "emoji/unseen_names"],
    "text": ["data", "text", "words.txt", "never", "--train-bpe", "300"],
}
NEED_THE_EXTRA = {"train": "train", "eval": "train", "text": "llm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands did: {package, folder, results: {name: (exit status, stdout, stderr, extras imported)}}."""
    folder = tmp_path_factory.mktemp("bare")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    work = folder / "work"
    work.mkdir()
    (work / "words.txt").write_text("some words")
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", BARE, json.dumps(EXTRAS), json.dumps(list(COMMANDS.values()))]
    done = subprocess.run(program, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return said | {"results": dict(zip(COMMANDS, said["results"])), "folder": folder}


def test_the_wheel_holds_configs_data_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    for path in (ROOT / "configs").rglob("*.*"):
        assert f"compt_megatron/{path.relative_to(ROOT)}" in names
    data = ROOT / "compt_megatron" / "data" / "builtin"
    for path in data.rglob("*.*"):
        assert str(path.relative_to(ROOT)) in names
    for licence in ("LICENSE", "NOTICE", "LICENSES.md", "CC-BY-SA-4.0.txt"):
        assert any(".dist-info/licenses/" in name and name.endswith(licence) for name in names), licence
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    assert "Provides-Extra: train" in metadata


def test_the_wheel_runs_from_its_own_files(bare: dict[str, Any]) -> None:
    assert Path(bare["package"]).is_relative_to(bare["folder"] / "site")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NEED_THE_EXTRA])
def test_the_grow_tool_works_without_the_extras(name: str, bare: dict[str, Any]) -> None:
    code, out, err, imported = bare["results"][name]
    assert code == 0, err
    assert out
    assert imported == []


def test_what_the_grow_tool_said(bare: dict[str, Any]) -> None:
    said = {name: out for name, (_, out, *_) in bare["results"].items()}
    assert 0.27 < json.loads(said["plan"])["total"]["share_of_last_alone"] < 0.29
    assert json.loads(said["plan demo"])["samples_per_epoch"] == 7305  # from the data inside the wheel
    assert "the same function" in said["grow"]
    assert json.loads(said["inspect"])["model"]["name"] == "clip-emoji-l"
    assert len(json.loads(said["inspect"])["lineage"]) == 2
    (record,) = json.loads(said["verify"])
    assert record["growth"]["tensors"] > 100
    work = bare["folder"] / "work"
    made = {path.name for path in work.iterdir()}
    assert made == {"words.txt", "small.pt", "small.pt.compt.json", "large", "larger",
                    "larger.safetensors", "larger.safetensors.compt.json"}  # fmt: skip


@pytest.mark.parametrize("name", NEED_THE_EXTRA)
def test_what_needs_the_extra_says_so_in_one_line(name: str, bare: dict[str, Any]) -> None:
    code, _, err, _ = bare["results"][name]
    assert code == 2, err
    assert err.count("\n") == 1
    assert f"pip install 'compt-megatron[{NEED_THE_EXTRA[name]}]'" in err
