"""The report of finished, losing, unfinished and broken runs; the page asks for nothing from outside."""

from __future__ import annotations

import csv
import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from observe_sample import MODELS, write_run

from compt_megatron.errors import UserError
from compt_megatron.observe import table
from compt_megatron.observe.family import family_of, read_family
from compt_megatron.observe.figure import DARK, DARK_SERIES, LIGHT, LIGHT_SERIES, apart
from compt_megatron.observe.plots import smooth, thin
from compt_megatron.observe.report import write_report
from compt_megatron.observe.verdict import judge


class Page(HTMLParser):
    """Collects ids, references and the visible text; fails on tags that are not closed in order."""

    VOID = ("meta", "br", "path", "use", "rect", "circle", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attrs:
            assert value is not None
            self.ids += [value] if name == "id" else []
            self.references += [value] if name in ("href", "xlink:href", "src") else []
            self.references += re.findall(r"url\((.*?)\)", value)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = write_report(run)
    assert path == run / "report" / "report.html"
    text = path.read_text()
    page = Page(text)
    words = " ".join(page.words).replace("\u00a0", " ").replace("\u2011", "-")
    assert "The chain won by 5.5 points: large reaches 22.6 % top-1 on held_out_artist" in words
    assert "measured parity 8.20e-07" in words
    assert "alignment before the first step 3.10e-13" in words
    assert len(page.ids) == len(set(page.ids))
    assert page.references, "the plots use clip paths"
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert not re.search(r"(src|href)=\"(https?:)?//|@import|<script", text)
    assert not re.search(r"#0[12]00[0-9a-f]{2}", text), "a stand-in colour was left"
    for name in ("accuracy", "accuracy_other_sets", "loss", "rates"):
        assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    records = list(csv.DictReader((path.parent / "report.csv").open()))
    assert [record["name"] for record in records] == ["small", "medium", "large", "large-alone"]
    assert float(records[2]["held_out_artist/top1"]) == 0.226
    report = json.loads((path.parent / "report.json").read_text())
    assert report["verdict"]["outcome"] == "won"
    assert report["rows"][3]["control_of"] == "large"
    before = report["rows"][1]["macs_cumulative"]
    assert report["curves"]["large"]["held_out_artist"][0] == [pytest.approx(before), pytest.approx(0.188)]


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=1)
    (run / "metrics.jsonl").unlink()
    assert write_report(run, tmp_path / "a").read_bytes() == write_report(run, tmp_path / "b").read_bytes()


def test_cumulative_compute_and_speed_up(tmp_path: Path) -> None:
    family = read_family(write_run(tmp_path))
    totals = [link.macs_total or 0 for link in family.links]
    assert [link.macs_cumulative for link in family.links] == [sum(totals[: n + 1]) for n in range(3)]
    base_samples = family.links[0].samples or 0
    alone = [3 * model[3] * base_samples for model in MODELS]
    assert [link.alone_ratio for link in family.links] == pytest.approx([a / t for a, t in zip(alone, totals)])
    assert family.speed_up == pytest.approx(sum(alone) / sum(totals))


def test_a_losing_chain_is_printed_as_such(tmp_path: Path) -> None:
    verdict = judge(read_family(write_run(tmp_path, control=0.30)))
    assert verdict.outcome == "lost"
    assert "The chain lost by 7.4 points" in verdict.headline
    assert "Training it alone was better here." in verdict.headline
    assert "Alone it first reached 22.6 % after 0." in verdict.words


def test_noise_unequal_budgets_and_ties_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, control=0.215)
    ledger = json.loads((run / "chain.json").read_text())
    assert "within two standard errors" in judge(family_of(ledger)).headline
    ledger["controls"][0]["macs"]["total"] *= 1.5
    assert "with 1.50 times the chain's total compute" in judge(family_of(ledger)).headline
    ledger["controls"][0]["evaluation"]["held_out_artist"]["top1"] = 0.226
    assert judge(family_of(ledger)).outcome == "tied"
    ledger["controls"].append(json.loads(json.dumps(ledger["controls"][0])) | {"name": "tuned"})
    ledger["controls"][1]["evaluation"]["held_out_artist"]["top1"] = 0.4
    verdict = judge(family_of(ledger))
    assert verdict.outcome == "lost", "the best control counts"
    assert "best of 2 controls" in verdict.words


def _as_text(run: Path, link: float, control: float) -> dict[str, Any]:
    """The ledger of a run of language models: every link has perplexity `link`, every control `control`."""
    ledger = json.loads((run / "chain.json").read_text())
    for entries, value in ((ledger["links"], link), (ledger["controls"], control)):
        for entry in entries:
            entry["evaluation"] = {"held_out": {"loss": 1.0, "perplexity": value, "bits_per_byte": value / 16}}
    return ledger


def test_of_perplexity_less_is_better(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    family = family_of(_as_text(run, 32.0, 40.0))
    assert judge(family).outcome == "won"
    assert (
        "The chain won by 20.0 % of perplexity (lower is better): large reaches perplexity 32.00" in judge(family).words
    )
    assert table.headings(family)[-1] == "held_out, perplexity / bits per byte"
    assert table.rows(family)[-1].cells[-1] == "40.00/2.500"
    lost = judge(family_of(_as_text(run, 40.0, 32.0)))
    assert lost.outcome == "lost"
    assert "trained alone" in lost.headline
    assert judge(family_of(_as_text(run, 32.0, 32.01))).outcome == "tied"
    ledger = _as_text(run, 32.0, 40.0)
    ledger["controls"].append(
        {**ledger["controls"][0], "name": "tuned", "evaluation": {"held_out": {"perplexity": 30.0}}}
    )
    assert judge(family_of(ledger)).outcome == "lost", "the best control counts"


def test_tasks_have_a_table_of_their_own(tmp_path: Path) -> None:
    """A task's perplexity is not one that the report judges by."""
    run = write_run(tmp_path)
    ledger = json.loads((run / "chain.json").read_text())
    tasks = {"arc_easy": {"acc": 0.25, "acc_stderr": 0.0125, "samples": 1200, "shots": 0}}
    tasks["lambada"] = {"perplexity": 31.5, "perplexity_stderr": 1.5, "em,strict": 0.5, "em_stderr,strict": 0.1}
    ledger["links"][-1]["tasks"] = tasks
    (run / "chain.json").write_text(json.dumps(ledger))
    family = read_family(run)
    assert "lambada" not in family.eval_sets
    assert judge(family) == judge(read_family(write_run(tmp_path / "other")))
    page = write_report(run).read_text()
    assert "<td>arc_easy</td><td>acc 0.2500 ± 0.0125, 1,200 documents</td>" in page
    assert "<td>lambada</td><td>perplexity 31.5000 ± 1.5000, em,strict 0.5000 ± 0.1000</td>" in page
    Page(page)
    row = json.loads((run / "report" / "report.json").read_text())["rows"][2]
    assert (row["arc_easy/acc"], row["arc_easy/acc_stderr"]) == (0.25, 0.0125)
    assert "<h2>Tasks</h2>" not in write_report(tmp_path / "other").read_text()


def test_without_a_control_nothing_is_claimed(tmp_path: Path) -> None:
    verdict = judge(read_family(write_run(tmp_path, control=None)))
    assert verdict.outcome == "no control"
    assert "not known: no control was trained" in verdict.headline


def test_every_subset_of_the_ledger_reads(tmp_path: Path) -> None:
    """Any key of a link may be missing or null, in any state: the page still comes out."""
    run = write_run(tmp_path / "run")
    ledger = json.loads((run / "chain.json").read_text())
    for key in ledger["links"][1]:
        for change in ("missing", "null"):
            damaged = json.loads(json.dumps(ledger))
            for member in (damaged["links"][1], damaged["controls"][0]):
                if change == "missing":
                    member.pop(key, None)
                else:
                    member[key] = None
            family = family_of(damaged, run)
            assert judge(family).headline
            assert len(family.members) == 4
    for content in ({}, {"links": None}, {"links": [{}], "controls": [{}]}):
        (run / "chain.json").write_text(json.dumps(content))
        Page(write_report(run).read_text())


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=1)
    with (run / "small" / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 99999, "met')
    page = Page(write_report(run).read_text())
    assert "Not finished: 1 of 3 links trained (small). No result yet." in " ".join(page.words)
    assert page.words.count("not grown yet") == 2


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    for curve in run.glob("*/evaluation.jsonl"):
        curve.unlink()
    ledger = json.loads((run / "chain.json").read_text())
    ledger["name"] = "<script>alert(1)</script>"
    ledger["links"][2]["state"] = "<b>odd"
    (run / "chain.json").write_text(json.dumps(ledger))
    text = write_report(run).read_text()
    assert "<script" not in text
    assert "<b>odd" not in text


def test_no_run_folder_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
            write_report(folder)
        assert "\n" not in str(caught.value)
    (tmp_path / "chain.json").write_text("[1")
    with pytest.raises(UserError, match=r"chain\.json"):
        write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.json"]


def test_what_the_runner_records_reads_too(tmp_path: Path) -> None:
    """A control that names its link only in its own name, alignment by tower, zero for what is not known yet."""
    run = write_run(tmp_path)
    ledger = json.loads((run / "chain.json").read_text())
    for link in ledger["links"]:
        link["model"] = "clip-emoji"
    del ledger["controls"][0]["link"]
    ledger["controls"][0] |= {"model": "clip-emoji", "name": "medium-alone"}
    ledger["links"][1] |= {"align_at_step0": {"image": 1e-13, "text": 2e-13}, "chain_macs_before": 5.0}
    ledger["links"][2] |= {"align_at_step0": {}, "parameters": 0, "state": "training"}
    family = family_of(ledger)
    assert family.controls[0].link == "medium"
    assert family.links[1].align_at_step0 == pytest.approx(3e-13)
    assert family.links[1].macs_cumulative == 5.0 + (family.links[1].macs_total or 0)
    assert family.links[2].align_at_step0 is None
    assert family.links[2].parameters is None
    assert family.links[2].alone_ratio is None, "an unfinished link has no speed-up"


def test_labels_move_apart_and_no_further() -> None:
    assert apart([10, 50, 90], 12, 0, 100) == [10, 50, 90]
    places = apart([50, 51, 99, 98], 12, 0, 100)
    assert all(abs(a - b) >= 12 - 1e-9 for i, a in enumerate(places) for b in places[:i])
    assert max(places) <= 100
    assert places[0] < places[1] < places[3] < places[2]


def test_long_curves_are_thinned_and_smoothed_without_moving() -> None:
    xs = [float(x) for x in range(100_000)]
    thin_xs, thin_ys = thin(xs, xs)
    assert len(thin_xs) <= 500
    assert thin_xs[-1] == xs[-1]
    assert max(abs(x - y) for x, y in zip(thin_xs, thin_ys)) <= 200
    spiked = [1.0] * 20 + [900.0] + [2.0] * 20
    assert smooth(spiked, 5) == [1.0] * 20 + [2.0] * 21
    assert smooth([5.0, 1.0, 2.0], 3) == [5.0, 2.0, 2.0]


def test_colours_read_on_their_page() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours, series in ((LIGHT, LIGHT_SERIES), (DARK, DARK_SERIES)):
        paper = luminance(colours["paper"])
        for colour in (*series, colours["ink"], colours["muted"]):
            light, dark = sorted((luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_a_full_disk_leaves_no_half_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    written = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith("report.html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"report: cannot be written \(No space left on device\)"):
        write_report(run)
    assert not (run / "report").exists()
