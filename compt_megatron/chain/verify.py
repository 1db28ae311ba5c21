"""Proving checkpoints: one, or all that the ledger of a run names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.chain.ledger import FILENAME, Entry, Ledger
from compt_megatron.checkpoint.api import defects
from compt_megatron.checkpoint.contract import Reader
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import Defects, UserError, lines_of
from compt_megatron.growth.verify import certificate_of
from compt_megatron.growth.verify import verify as verify_growth
from compt_megatron.spec.table import ModelSpec

LISTED = 20  # defects of a checkpoint that are named; those beyond are counted
# outputs of an exact growth may differ by so many times the noise; the norm before the first block adds some 1e-6
_NOISE_TIMES, _FLOOR = 50, 1e-4

Record = dict[str, Any]


def verify(
    path: str | Path, against: str | Path | None = None, spec: ModelSpec | None = None, *, trust_pickle: bool = False
) -> list[Record]:
    """Verify a checkpoint, or every checkpoint that a run folder's ledger names: `examine`, for a program.

    Returns the records, none of which has defects. Raises `Defects` (a UserError with all `lines`) where one has.
    """
    records = examine(path, against, spec, trust_pickle=trust_pickle)
    require_sound(records)
    return records


def examine(
    path: str | Path, against: str | Path | None = None, spec: ModelSpec | None = None, *, trust_pickle: bool = False
) -> list[Record]:
    """Find everything that is wrong with a checkpoint, or with every checkpoint that a run folder's ledger names.

    Checked are checksums, names, shapes and completeness; where a grown checkpoint's source is known (recorded, or
    `against`) every grown tensor is made again and compared byte for byte, and the difference of outputs is measured
    through open_clip or transformers, where that is installed and the models fit in memory.

    Returns one record a checkpoint: path, defects (a line each for the first 20), defect_count, files ("ok" or
    "damaged"), growth (None or the {against, tensors, elements} that are right), parity (None or relative
    differences of outputs), noise and noise_dtype (what the source's outputs are off by when run in that dtype, see
    `evaluate.parity.Parity`), twins (units that never separate), notes.
    """
    path = Path(path)
    try:
        if (path / FILENAME).is_file():
            return _examine_run(path)
        return [_examine_checkpoint(path, against, spec, trust_pickle)]
    except UserError as error:
        return [_record(path, lines_of(error))]


def require_sound(records: list[Record]) -> None:
    """Raise `Defects` if records of `examine` have any: those that they name, and a line for those that they count."""
    lines = []
    for record in records:
        lines += record["defects"]
        if more := record["defect_count"] - len(record["defects"]):
            lines.append(f"{record['path']}: and {more} defects more")
    if lines:
        raise Defects(lines, sum(record["defect_count"] for record in records))


def _record(path: Path, found: list[str], **entries: Any) -> Record:
    found = list(dict.fromkeys(found))
    record = {"path": str(path), "defects": found[:LISTED], "defect_count": len(found), "files": "ok", "growth": None}
    return record | {"parity": None, "noise": None, "noise_dtype": None, "twins": [], "notes": []} | entries


def _examine_checkpoint(
    path: Path,
    against: str | Path | None = None,
    spec: ModelSpec | None = None,
    trust_pickle: bool = False,
    recorded_hash: str | None = None,
) -> Record:
    """The record of one checkpoint, see `examine`; `recorded_hash` is what a ledger says of its weights."""
    found = defects(path, spec, trust_pickle)
    files = "damaged" if found else "ok"
    try:
        reader = open_reader(path, spec, trust_pickle)
    except UserError:  # whose line is among those found
        return _record(path, found, files=files, notes=["it cannot be opened, so nothing else was checked"])
    entries: dict[str, Any] = {}
    try:
        if recorded_hash is not None and weight_hash(reader) != recorded_hash:
            found.append(f"{path}: its weights are not those that {FILENAME} records; restore it from a copy")
        source = _source(reader, against)
        if source is not None and against is None and not source.exists():
            note = f"its source {source} is not there; give it with --against to check the growth too"
            entries = {"notes": [note]}
        elif source is not None:
            entries, wrong = _examine_growth(path, source, spec, trust_pickle, measure=not found)
            found += wrong
    except UserError as error:
        found += lines_of(error)
    finally:
        reader.close()
    return _record(path, found, files=files, **entries)


def _source(reader: Reader, against: str | Path | None) -> Path | None:
    """What a checkpoint is to be compared with, None if it was not grown or was trained since."""
    if against is not None:
        return Path(against)
    known = reader.metadata()
    if known.get("certificate") is None or (known.get("train") or {}).get("step"):
        return None
    return Path(certificate_of(reader).source["path"])


def _examine_growth(
    path: Path, source: Path, spec: ModelSpec | None, trust_pickle: bool, measure: bool
) -> tuple[dict[str, Any], list[str]]:
    """The entries of a record that are about growth, and its defects. `measure`: the difference of outputs, too."""
    report = verify_growth(path, source, spec, trust_pickle=trust_pickle)
    if not report.ok:
        return {}, report.defects()
    growth = {"against": report.against, "tensors": report.tensors, "elements": report.elements}
    warnings = [f"warning: {line}" for line in report.twins]
    if not measure:
        return {"growth": growth, "notes": warnings, "twins": report.twins}, []
    measured = _parity(source, path, (report.certificate.source_spec(), spec), trust_pickle)
    wrong = _beyond_noise(path, measured) if report.certificate.exact else []
    notes = [*warnings, *measured.get("notes", [])]
    return measured | {"growth": growth, "notes": notes, "twins": report.twins}, wrong


def _beyond_noise(path: Path, measured: dict[str, Any]) -> list[str]:
    """A line for each output that differs by far more than rounding, although the growth was exact."""
    return [
        f"{path}: grown exactly, but its {name} differ from the source's by {error:.1e} (noise "
        f"{measured['noise'][name]:.1e}); the two configs are not of models that compute alike: check them"
        for name, error in (measured.get("parity") or {}).items()
        if error > max(_NOISE_TIMES * measured["noise"][name], _FLOOR)
    ]


def _parity(source: Path, grown: Path, specs: tuple[ModelSpec, ModelSpec | None], trust_pickle: bool) -> dict[str, Any]:
    """The entries `parity`, `noise` and `noise_dtype` of a record, and `notes` where they could not be measured."""
    from compt_megatron.evaluate.parity import measure

    first = open_reader(source, specs[0], trust_pickle)
    try:
        second = open_reader(grown, specs[1], trust_pickle)
        try:
            found = measure(first, second)
        finally:
            second.close()
    finally:
        first.close()
    if found.note:
        return {"notes": [found.note]}
    return {"parity": dict(found.errors), "noise": dict(found.noise), "noise_dtype": found.dtype}


def _examine_run(run_dir: Path) -> list[Record]:
    ledger = Ledger.load(run_dir)
    assert ledger is not None, f"{run_dir} has a ledger"
    records = []
    for entry in (*ledger.links, *ledger.controls):
        records += _examine_entry(run_dir, ledger, entry)
    if not records:
        raise UserError(f"{run_dir}: the run has no checkpoints yet; nothing to verify")
    return records


def _examine_entry(run_dir: Path, ledger: Ledger, entry: Entry) -> list[Record]:
    records = []
    if entry.initial is not None:
        parent = ledger.entry(entry.parent).checkpoint if entry.parent and entry.certificate else None
        records.append(_examine_checkpoint(run_dir / entry.initial, run_dir / parent if parent else None))
    for path in (entry.checkpoint, entry.export):
        if path is None or path == entry.initial:
            continue
        recorded = entry.weight_hash if path == entry.checkpoint else None
        records.append(_examine_checkpoint(run_dir / path, recorded_hash=recorded))
    return records
