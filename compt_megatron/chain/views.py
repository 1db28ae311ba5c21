"""What the commands print for people: rich tables on a terminal, plain aligned lines off it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from compt_megatron.observe.numbers import decimal, human, percent
from compt_megatron.observe.table import task_words

_PLAIN_METRICS = ("perplexity", "bits_per_byte", "loss")  # the others that are no counts are fractions
_PLAIN_WIDTH = 200  # off a terminal nobody's width is known: rows stay on one line


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> None:
    """A table on stdout; the columns `text` are aligned to the left, the others, numbers, to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index in text else "right", no_wrap=not terminal)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=None if terminal else _PLAIN_WIDTH).print(table)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned; empty values are left out."""
    shown = [(name, value) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def print_inspection(found: dict[str, Any]) -> None:
    """What `inspect` found, without the list of tensors."""
    model, train, certificate = found["model"], found.get("train") or {}, found.get("certificate")
    fields = [
        ("checkpoint", found["path"]),
        ("format", found["format"]),
        ("model", f"{model['name']} ({model['family']}, {model['parameters']:,} parameters, digest {model['digest']})"),
        ("layout", _inline(found.get("layout"))),
        ("created by", _inline(found.get("created_by"))),
        ("trained", f"step {train['step']}, {train.get('samples', 0):,} samples" if "step" in train else ""),
        ("grown", f"{certificate['operator']}, {_inline(certificate['tensors'])} tensors" if certificate else ""),
        ("lineage", " -> ".join(str(parent.get("name")) for parent in found["lineage"])),
        *(("note", note) for note in found["notes"]),
    ]
    print_fields(fields)
    rows = [
        (
            prefix,
            str(entry["tensors"]),
            human(entry["elements"]),
            f"{human(entry['bytes'])}B",
            ", ".join(entry["dtypes"]),
        )
        for prefix, entry in found["summary"].items()
    ]
    print()
    print_table("", ("Content", "Tensors", "Elements", "Size", "Type"), rows, text=(0, 4))


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value) if value else ""


def print_verification(records: list[dict[str, Any]]) -> None:
    """One line a checkpoint: what was proved, or how much is wrong; what that is stands on stderr."""
    for record in records:
        wrong = record["defect_count"]
        parts = [f"{wrong} defect{'s' * (wrong > 1)}" if wrong else "files and tensors as recorded"]
        if record["growth"]:
            parts.append(
                f"{record['growth']['tensors']} tensors byte for byte as grown from {record['growth']['against']}"
            )
        if record["parity"]:
            noise = record["noise"]
            found = (f"{name} {value:.1e} (noise {noise[name]:.1e})" for name, value in record["parity"].items())
            parts.append(f"outputs differ by {', '.join(found)}, noise being that of {record['noise_dtype']}")
        print(f"{record['path']}: {'; '.join(parts)}")
        for note in record["notes"]:
            print(f"  {note if note.startswith('warning: ') else f'note: {note}'}")


def print_evaluation(sets: dict[str, dict[str, Any]], tasks: dict[str, dict[str, float]]) -> None:
    """Accuracies and recalls, or a language model's perplexity, one row a data set; lm-eval's tasks below."""
    if sets:
        names = list(dict.fromkeys(name for metrics in sets.values() for name in metrics))
        rows = [(name, *(_metric(metric, metrics.get(metric)) for metric in names)) for name, metrics in sets.items()]
        print_table("", ("Data", *names), rows)
    if tasks:
        found = [(name, ", ".join(task_words(values))) for name, values in tasks.items()]
        print_table("", ("Task", "Results"), found, text=(0, 1))


def _metric(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return human(value)
    return decimal(value) if name in _PLAIN_METRICS else percent(value)


def print_health(found: dict[str, Any], advice: list[str]) -> None:
    """What `compt doctor` found, then what stands in the way."""
    gpus = [f"{device['name']} ({human(device['memory'])}B, sm_{device['capability']})" for device in found["devices"]]
    collectives = [f"{name} {version}" for name, version in found["collectives"].items()]
    print_fields(
        [
            ("compt_megatron", found["compt_megatron"]),
            ("python", f"{found['python']}, {found['system']}"),
            *((name, version or "missing") for name, version in found["packages"].items()),
            ("devices", "; ".join(gpus) or "none (CPU only)"),
            ("cpus", f"{found['cpus']}, torch uses {found['threads']} threads"),
            ("memory", f"{human(found['memory'])}B"),
            ("collectives", ", ".join(collectives) or "none"),
            ("Transformer Engine", found["transformer_engine"]["version"] or "none, and none is needed"),
            ("disk", f"{human(found['disk']['free'])}B free at {found['disk']['path']}"),
        ]
    )
    print()
    for line in advice or ["nothing is missing"]:
        print(f"- {line}")
