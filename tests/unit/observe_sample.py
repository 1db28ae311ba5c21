"""A small run folder with the files a chain writes, for the tests of the report; formulas make up its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SETS = ("held_out_artist", "unseen_names")
MODELS = (("small", 0.6e6, 24, 5.0e6, 0.142), ("medium", 1.5e6, 8, 19e6, 0.188), ("large", 4.1e6, 6, 52e6, 0.226))
SAMPLES_PER_EPOCH = 7424
BATCH = 256


def evaluation(top1: float) -> dict[str, Any]:
    """The record of one evaluation with `top1` on the first set."""
    return {
        "held_out_artist": {
            "top1": top1,
            "top5": min(1.0, 2.1 * top1),
            "classes": 1640,
            "images": 1640,
            "i2t_r1": top1,
        },
        "unseen_names": {"top1": 0.4 * top1, "top5": top1, "classes": 180, "images": 1080},
    }


def write_run(folder: Path, *, control: float | None = 0.171, finished: int = 3) -> Path:
    """A run of three links of which `finished` are done; `control`: top-1 of the last model alone, None for none."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    spent = 0.0
    for index, (name, parameters, epochs, forward, goal) in enumerate(MODELS):
        done, steps = index < finished, epochs * SAMPLES_PER_EPOCH // BATCH
        samples = steps * BATCH
        train = 3.0 * forward * samples
        teacher = MODELS[index - 1][3] * samples if index else 0.0
        link: dict[str, Any] = {
            "name": name,
            "model": f"models/clip-emoji-{name}.json",
            "state": "done" if done else "pending",
        }
        link["parent"] = MODELS[index - 1][0] if index else None
        if done:
            link |= {"seed": 0, "steps": steps, "samples": samples, "parameters": parameters, "final_loss": 1.9}
            link |= {"macs": {"train": train, "teacher": teacher, "grow": 0, "total": train + teacher}}
            link |= {"wall_s": 100.0 + 55 * index, "evaluation": evaluation(goal)}
            if index:
                tensors = {f"tensor.{i}": "exact" for i in range(52)}
                link["certificate"] = {"operator": "exact", "depth": "identity", "tensors": tensors}
                link["certificate"]["parity"] = {"image": 4.1e-7 * index, "text": 6.2e-7, "rows": 8}
                link["align_at_step0"] = 3.1e-13
            start = MODELS[index - 1][4] if index else 0.0
            write_curve(folder / name, steps, spent, train + teacher, start, goal, epochs)
            metrics += list(logged(name, steps, index, aligned=index > 0))
            spent += train + teacher
        links.append(link)
    controls = []
    if control is not None and finished == len(MODELS):
        name, parameters, _, forward, _ = MODELS[-1]
        steps = int(spent / (3.0 * forward) / BATCH)
        controls.append(
            {
                "name": f"{name}-alone",
                "link": name,
                "model": f"models/clip-emoji-{name}.json",
                "state": "done",
                "steps": steps,
                "samples": steps * BATCH,
                "parameters": parameters,
                "macs": {"train": spent, "teacher": 0, "total": spent},
                "wall_s": 410.0,
                "evaluation": evaluation(control),
            }
        )
        write_curve(folder / f"{name}-alone", steps, 0.0, spent, 0.0, control, 12)
        metrics += list(logged(f"{name}-alone", steps, 3, aligned=False))
    ledger = {
        "format_version": 1,
        "name": "emoji-clip",
        "recipe_hash": "6f1d0c53a1b2c3d4",
        "links": links,
        "controls": controls,
        "environment": {"compt_megatron": "0.1.0", "torch": "2.13.0+cpu", "device": "2 CPU cores", "world": 1},
    }
    (folder / "chain.json").write_text(json.dumps(ledger))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "recipe.yaml").write_text("name: emoji-clip\nseed: 0\nobjective: {name: clip}\n")
    return folder


def write_curve(folder: Path, steps: int, before: float, macs: float, start: float, goal: float, epochs: int) -> None:
    """evaluation.jsonl of one model: a saturating rise from `start` to `goal`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    count = max(4, epochs // 2)
    for index in range(0 if start else 1, count + 1):
        share = index / count
        top1 = start + (goal - start) * (1 - math.exp(-3 * share)) / (1 - math.exp(-3))
        row = {"step": round(steps * share), "epoch": epochs * share, "samples": round(steps * share) * BATCH}
        rows.append(row | {"macs": before + macs * share, "metrics": evaluation(top1)})
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(link: str, steps: int, index: int, aligned: bool) -> Any:
    """metrics.jsonl lines of one model."""
    first, last = (2.9 - 0.3 * index, 1.9 - 0.2 * index) if aligned else (5.5, 2.0)
    for step in range(4, steps + 1, 4):
        share = step / steps
        task = last + (first - last) * math.exp(-4 * share) + 0.08 * math.sin(12.9898 * step)
        row = {"link": link, "step": step, "time": 1.7e9 + step, "lr": 1e-3 * min(1, step / 40) * math.cos(1.5 * share)}
        row |= {"samples_per_s": 900 / (1 + index) + 20 * math.sin(7.1 * step), "macs_per_s": 1.2e10, "eta_s": 100.0}
        parts = {"loss/clip": task}
        if aligned:
            parts |= {f"loss/align_{tower}": 0.05 * k * share**0.5 for tower, k in (("image", 1.3), ("text", 0.8))}
        yield row | parts | {"loss": sum(parts.values())}
