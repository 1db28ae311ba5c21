"""What is printed, on a terminal and off it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from observe_sample import write_run

from compt_megatron.observe.console import Console, log_line
from compt_megatron.observe.family import parity_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


SCALARS = {"loss": 2.3141, "lr": 9.8e-4, "samples_per_s": 512.3, "macs_per_s": 1.2e9, "eta_s": 192.0}


def test_a_log_line_says_everything_in_order() -> None:
    parts = {"clip": 2.31, "align_image": 3.1e-13}
    assert log_line("small", 120, 4800, SCALARS, parts) == (
        "small  step   120/4,800  loss 2.3141  clip 2.3100  align_image 3.1e-13  lr 9.80e-04  512 samples/s"
        "  1.2 G MACs/s  ETA 0:03:12"
    )
    assert "MFU 41.2 %" in log_line("small", 1, 10, SCALARS | {"mfu": 0.412})
    assert "MACs" not in log_line("small", 1, 10, SCALARS | {"mfu": 0.412})
    assert "loss nan" in log_line("small", 1, 10, {"loss": float("nan")})


def test_off_a_terminal_lines_are_plain(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(True, 3, stream) as console:
        console.begin_link("small", 100, start_step=40)
        console.advance(50)
        console.line(60, SCALARS | {"loss/[odd] part": 1.0} | {f"loss/part{i}": 1.0 for i in range(30)})
        console.grow("medium", "small", {"operator": "exact", "depth": "identity", "parity": {"image": 6.2e-7}})
        console.evaluate("small", 60, {"held_out": {"top1": 0.142, "top5": 0.3, "classes": 1640}})
        console.export("small", tmp_path)
    printed = stream.getvalue()
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 5, "a long line must not be wrapped"
    assert "small (1 of 3): training 100 steps, resumed at step 40" in printed
    assert "[odd] part 1.0000" in printed
    assert "grown from small, operator exact, depth identity, measured parity 6.20e-07" in printed
    assert "on held_out: top-1 14.2 %, top-5 30.0 %" in printed


def test_on_a_terminal_there_is_a_bar_and_it_goes_away() -> None:
    stream = Terminal()
    console = Console(True, 1, stream)
    console.begin_link("small", 100)
    console.line(60, SCALARS)
    console.end_link()
    assert "60/100" in stream.getvalue()
    before = len(stream.getvalue())
    console.advance(70)
    assert len(stream.getvalue()) == before


def test_a_disabled_console_is_silent(tmp_path: Path) -> None:
    stream = Terminal()
    console = Console(False, 1, stream)
    console.begin_link("small", 100)
    console.line(60, SCALARS)
    console.table(json.loads((write_run(tmp_path) / "chain.json").read_text()))
    console.end_link()
    assert stream.getvalue() == ""


def test_the_table_ends_in_the_verdict(tmp_path: Path) -> None:
    for control, words in ((0.171, "The chain won by 5.5 points"), (0.271, "The chain lost by 4.5 points")):
        stream = io.StringIO()
        Console(True, 3, stream).table(json.loads((write_run(tmp_path, control=control) / "chain.json").read_text()))
        table = [line for line in stream.getvalue().splitlines() if line.strip()]
        rows = {line.split()[0]: line for line in table}
        assert "14.2/29.8" in rows["small"]
        assert "7.8 T" in rows["large"]
        assert f"{100 * control:.1f}/" in rows["large-alone"]
        assert table[-1].startswith(words)


def test_the_table_fits_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = (write_run(tmp_path) / "chain.json").read_text().replace('"held_out_artist"', '"emoji/held_out_artist"')
    stream = Terminal()
    Console(True, 3, stream).table(json.loads(text))
    table = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines() if "The chain" not in line]
    assert max(map(len, table)) <= 80
    assert [line.split()[-1] for line in table if line.startswith("large")] == ["9.0/22.6", "6.8/17.1"]


def test_parity_is_a_difference_not_a_count() -> None:
    assert parity_of({"parity": None}) is None
    assert parity_of({"parity": 3e-7}) == 3e-7
    assert parity_of({"parity": {"image": 1e-7, "text": 2e-7, "rows": 8, "tolerance": 1e-5}}) == 2e-7
    assert (
        parity_of({"parity": {"image": {"max_relative": 4e-7, "max_absolute": 9.0}, "relative_tolerance": 1.0}}) == 4e-7
    )
