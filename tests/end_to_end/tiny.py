"""A whole chain in a few seconds: three tiny models on a few emoji, one control."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import yaml

from compt_megatron.data.emoji.builtin import emoji_shards

SAMPLES = 96
STEPS = {"s": 7, "m": 5, "l": 4, "l-alone": 4}


def model(width: int, heads: int, layers: int, joint: int = 16) -> dict[str, Any]:
    """32 pixels in patches of 16: four tokens."""
    text = {"context_length": 8, "vocab_size": 1024, "width": width, "heads": heads, "layers": 1}
    text["tokenizer_kwargs"] = {"bpe_path": "models/emoji-bpe.txt.gz"}
    vision = {"image_size": 32, "patch_size": 16, "width": width, "layers": layers, "head_width": 16}
    return {"embed_dim": joint, "vision_cfg": vision, "text_cfg": text}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe, its models and its data in `folder`; `changes` replace whole sections."""
    write_samples(folder / "emoji.tar", SAMPLES)
    for name, config in (("s", model(32, 2, 1)), ("m", model(48, 3, 2)), ("l", model(64, 4, 2, joint=32))):
        (folder / f"{name}.json").write_text(json.dumps(config))
    grow = {"operator": "exact"}
    recipe = {
        "name": "tiny",
        "data": {"train": "emoji.tar", "eval": ["emoji.tar"], "batch_size": 32, "captions": 2, "streams": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "report": {"every_steps": 1, "tensorboard": False},
        "links": [
            {"model": "s.json", "steps": STEPS["s"], "evaluate": {"every_epochs": 1.0}},
            {"model": "m.json", "steps": STEPS["m"], "grow": grow, "align": {"weight": 1.0}},
            {"model": "l.json", "steps": STEPS["l"], "grow": grow, "align": {"weight": 0.5, "end": 0.5}},
        ],
        "controls": [{"link": "l", "steps": STEPS["l-alone"]}],
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_samples(target: Path, count: int) -> None:
    """The first `count` samples of the built-in emoji data as one plain tar."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(emoji_shards("train")[0]) as source, tarfile.open(target, "w") as tar:
        samples: set[str] = set()
        for member in source:
            stem = member.name.partition(".")[0]
            if stem not in samples and len(samples) == count:
                return
            samples.add(stem)
            tar.addfile(member, source.extractfile(member))


def ledger(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "chain.json").read_text())


def entries(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The ledger's links and controls by name."""
    found = ledger(run_dir)
    return {entry["name"]: entry for entry in (*found["links"], *found["controls"])}


def hashes(run_dir: Path) -> dict[str, str]:
    """Member -> hash of its final weights."""
    return {name: entry["weight_hash"] for name, entry in entries(run_dir).items()}


def losses(run_dir: Path, link: str) -> list[float]:
    """The loss of every step of a link, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["link"] == link]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1)), "every step logged once, in order"
    return [row["loss"] for row in found]
