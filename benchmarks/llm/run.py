"""Runs cells: each a `compt train` of its own, several at a time, and what it took, as a record."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path

import yaml

from benchmarks.llm.cells import HELD_OUT, MODELS, Cell
from benchmarks.llm.store import Record, Store

ROOT = Path(__file__).resolve().parents[2]
_REFUSED = 2  # exit status of what the user can mend: here a recipe that this version does not know


class NoResultError(Exception):
    """A cell that ended without a result, in words."""


def run_cells(cells: Iterable[Cell], store: Store, work: Path, jobs: int) -> dict[str, str]:
    """Run the cells that have no record yet, and whatever they grow from, `jobs` at a time.

    Returns {label: reason} of those without a result; the others go on. A run folder that is there is continued.
    """
    queue = pending(cells, store.load(), work)
    failed: dict[str, str] = {}
    running: dict[Future[Record], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while queue or running:
            unfinished = {cell.id for cell in (*queue, *running.values())}
            for cell in [each for each in queue if each.parent is None or each.parent.id not in unfinished]:
                if len(running) == jobs:
                    break
                queue.remove(cell)
                running[pool.submit(run_cell, cell, store.load(), work)] = cell
                _say(f"start {cell.id} {cell.label}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    record = future.result()
                except NoResultError as error:
                    failed[cell.label] = str(error)
                    _say(f"no result {cell.id} {cell.label}: {error}")
                    continue
                store.add(record)
                _say(f"done  {cell.id} {cell.label}: loss {record['loss']:.4f}, {record['process']['cpu_s']:.0f} CPU s")
    return failed


def pending(cells: Iterable[Cell], known: dict[str, Record], work: Path) -> list[Cell]:
    """The cells to run, in order, each once: those without a record, before them those that they grow from where no
    trained model of theirs lies in `work` any more."""
    found: dict[str, Cell] = {}

    def want(cell: Cell) -> None:
        if cell.parent is not None and checkpoint(cell.parent, work) is None:
            want(cell.parent)
        found.setdefault(cell.id, cell)

    for cell in cells:
        if cell.id not in known:
            want(cell)
    return list(found.values())


def checkpoint(cell: Cell, work: Path) -> Path | None:
    """A cell's trained model, None where there is none."""
    ledger = work / "runs" / cell.id / "chain.json"
    if not ledger.is_file():
        return None
    entry = json.loads(ledger.read_text())["links"][-1]
    return ledger.parent / entry["checkpoint"] if entry["state"] == "done" else None


def run_cell(cell: Cell, known: dict[str, Record], work: Path) -> Record:
    """Train one cell (or go on where it was interrupted). Raises NoResultError."""
    folder, recipe, log = (
        work / kind / f"{cell.id}{end}" for kind, end in (("runs", ""), ("recipes", ".yaml"), ("logs", ".log"))
    )
    models = work / "models"
    for needed in (models, recipe.parent, log.parent):
        needed.mkdir(parents=True, exist_ok=True)
    for name, config in MODELS.items():
        (models / f"llm-{name}.json").write_text(json.dumps(config, indent=1))
    before = checkpoint(cell.parent, work) if cell.parent else None
    if cell.parent is not None and (before is None or cell.parent.id not in known):
        raise NoResultError("its predecessor has no result")
    recipe.write_text(yaml.safe_dump(cell.recipe(models, before), sort_keys=False))
    command = ["nice", "-n", "19", sys.executable, "-m", "compt_megatron", "train", str(recipe)]
    command += ["--run-dir", str(folder)]
    paths = [str(ROOT), str(ROOT / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    begin = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise NoResultError(f"recipe refused: {last}" if process.returncode == _REFUSED else f"failed: {last}")
    spent = {"wall_s": time.perf_counter() - begin, "cpu_s": usage.ru_utime + usage.ru_stime}
    return record_of(cell, folder, known, spent)


def record_of(cell: Cell, folder: Path, known: dict[str, Record], spent: dict[str, float]) -> Record:
    """What is kept of a finished run.

    `macs`: the training's own {train, teacher, total}; `macs_before`: of the cells that it grows from; `curve`: [step,
    MACs up to there with those before, held-out loss]; wall_s and cpu_s of the training loop, `process` of all.
    """
    entry = json.loads((folder / "chain.json").read_text())["links"][-1]
    before = known[cell.parent.id] if cell.parent else None
    macs_before = before["macs_before"] + before["macs"]["total"] if before else 0.0
    rows = [json.loads(line) for line in (folder / cell.model / "evaluation.jsonl").read_text().splitlines()]
    metrics = entry["evaluation"][HELD_OUT]
    return {
        "id": cell.id, "model": cell.model, "seed": cell.seed, "steps": cell.steps, "rate": cell.rate,
        "warmup": cell.warmup, "link": cell.link, "parent": cell.parent.id if cell.parent else None,
        "parameters": entry["parameters"], "macs": {key: entry["macs"][key] for key in ("train", "teacher", "total")},
        "macs_before": macs_before, "loss": metrics["loss"], "bits_per_byte": metrics["bits_per_byte"],
        "curve": [[row["step"], macs_before + row["macs"], row["metrics"][HELD_OUT]["loss"]] for row in rows],
        "align_at_step0": entry["align_at_step0"], "wall_s": round(entry["wall_s"], 1),
        "cpu_s": round(entry["cpu_s"], 1),
        "process": {key: round(value, 1) for key, value in spent.items()},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": version("torch")},
    }  # fmt: skip


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
