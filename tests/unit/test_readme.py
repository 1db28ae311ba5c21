"""The README: its figures are those of the result files, its commands and links exist, its Python runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.readme import BEGIN, END, NOT_YET, demo_section, figures, other_section, verdict, with_figures
from compt_megatron.cli import build_parser
from compt_megatron.cli_parser import parse
from compt_megatron.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in `language` ("" for those without one)."""
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


def demo_result(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    link = {"parameters": 1_000_000, "samples": 5000, "macs": 3e12, "top5": ours}
    return {
        "machine": {"cpus": 2},
        "command": "python benchmarks/chain_vs_alone.py",
        "seeds": [0, 1],
        "links": [{"name": "s", "top1": [0.1, 0.1], **link}, {"name": "l", "top1": ours, **link}],
        "control": {"name": "l", "parameters": 1_000_000, "macs": 6e12, "top1": theirs, "top5": theirs, "lr": 2e-3},
    }


def test_the_figures_are_current() -> None:
    message = "the README's figures are not those of benchmarks/results: run python -m benchmarks.readme"
    assert with_figures(README, figures()) == README, message


def test_a_figure_without_a_result_file_is_not_measured_yet(tmp_path: Path) -> None:
    assert NOT_YET in demo_section(None)
    rows = other_section(tmp_path).splitlines()[2:]
    assert {row.split(" | ")[2] for row in rows} == {NOT_YET, "modelled"}


def test_figures_follow_the_result_files(tmp_path: Path) -> None:
    row = {"image_relative_error": 3e-7, "text_relative_error": 4e-7, "machine": "a box"}
    (tmp_path / "open_clip_parity.json").write_text(json.dumps({"m": row}))
    assert "| 4.0e-07 over 1 models | measured (a box) |" in other_section(tmp_path)
    text = demo_section(demo_result([0.20, 0.22], [0.15, 0.16]))
    assert "| l | 1 M | 5 k | 3 T | 21.0 % (20.0 to 22.0) | 21.0 % (20.0 to 22.0) |" in text
    assert "2 seeds" in text
    assert "cpus 2" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([0.20, 0.22], [0.15, 0.16], "The chain wins: l at the end of the chain is +5.5 points"),
        ([0.10, 0.12], [0.15, 0.16], "**The chain loses**: l at the end of the chain is -4.5 points"),
        ([0.14, 0.17], [0.15, 0.16], "No clear difference (the seeds' ranges overlap)"),
        ([], [0.1], NOT_YET),
    ],
)
def test_a_result_that_loses_is_printed_as_such(ours: list[float], theirs: list[float], said: str) -> None:
    result = demo_result(ours, theirs)
    text = verdict(result["links"][-1], result["control"], 6e12)
    assert said in text
    assert not ours or "1.00 times the chain's compute" in text


def test_the_block_is_replaced_and_nothing_else() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = with_figures(text, "new")
    assert new == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert with_figures(new, "new") == new


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "quickstart.md"], ids=lambda page: page.name)
def test_commands_are_what_the_command_line_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `compt ...` line parses, and overrides fit the packaged recipe that they are given to."""
    found = 0
    for line in "".join(code_blocks(page.read_text(encoding="utf-8"), "")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["compt"] or "SRC" in words:
            continue
        found += 1
        parsed = parse(build_parser(), words[1:])
        if getattr(parsed, "overrides", None) and (ROOT / "configs" / "recipes" / f"{parsed.recipe}.yaml").is_file():
            load_recipe(parsed.recipe, parsed.overrides)
    assert found >= 3, capsys.readouterr().err


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    """All Python blocks one after the other, on the demo's models in place of the paper's (the same calls, faster)."""
    program = "\n".join(code_blocks(README, "python"))
    for ours, small in (("compt-ViT-T-16", "clip-emoji-s"), ("compt-ViT-S-16", "clip-emoji-m")):
        assert ours in program
        program = program.replace(ours, small)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "True"  # the growth was exact
    assert "% of training the last model alone" in done.stdout


def test_every_benchmark_is_listed() -> None:
    own = {"__init__", "__main__", "readme"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - own
    assert files <= set(BENCHMARKS)
