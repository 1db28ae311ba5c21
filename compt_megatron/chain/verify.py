"""Proving checkpoints: one, or all that the ledger of a run names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.chain.ledger import FILENAME, Entry, Ledger
from compt_megatron.checkpoint.api import check
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.growth.verify import verify as verify_growth
from compt_megatron.spec.table import ModelSpec

# outputs of an exact growth may differ by so many times the noise; the norm before the first block adds some 1e-6
_NOISE_TIMES, _FLOOR = 50, 1e-4


def verify(
    path: str | Path, against: str | Path | None = None, spec: ModelSpec | None = None, *, trust_pickle: bool = False
) -> list[dict[str, Any]]:
    """Verify a checkpoint, or every checkpoint that a run folder's ledger names.

    Checked are checksums, names, shapes and completeness; where a grown checkpoint's source is known (recorded, or
    `against`) every grown tensor is made again and compared byte for byte, and the difference of outputs is measured
    through open_clip or transformers, where that is installed and the models fit in memory.

    Returns one record a checkpoint: path, files ("ok"), growth (None or {against, tensors, elements}), parity (None
    or relative differences of outputs), noise and noise_dtype (what the source's outputs are off by when computed in
    that dtype, see `evaluate.parity.Parity`), twins (units that never separate), notes. Raises UserError at the first
    defect.
    """
    path = Path(path)
    if (path / FILENAME).is_file():
        return _verify_run(path)
    return [verify_checkpoint(path, against, spec, trust_pickle)]


def verify_checkpoint(
    path: Path, against: str | Path | None = None, spec: ModelSpec | None = None, trust_pickle: bool = False
) -> dict[str, Any]:
    """The record of one checkpoint, see `verify`."""
    check(path, spec, trust_pickle)
    record: dict[str, Any] = {"path": str(path), "files": "ok", "growth": None, "parity": None, "noise": None}
    record |= {"noise_dtype": None, "twins": [], "notes": []}
    reader = open_reader(path, spec, trust_pickle)
    try:
        known = reader.metadata()
    finally:
        reader.close()
    certificate = known.get("certificate")
    trained = bool((known.get("train") or {}).get("step"))
    if against is None and (certificate is None or trained):
        return record
    source = Path(against or (certificate or {})["source"]["path"])
    if against is None and not source.exists():
        record["notes"].append(f"its source {source} is not there; give it with --against to check the growth too")
        return record
    report = verify_growth(path, source, spec, trust_pickle=trust_pickle)
    if not report.ok:
        raise UserError(report.describe().splitlines()[0])
    record["growth"] = {"against": report.against, "tensors": report.tensors, "elements": report.elements}
    measured = _parity(source, path, (report.certificate.source_spec(), spec), trust_pickle)
    if report.certificate.exact:
        _check_exact(path, measured)
    twins = [f"warning: {line}" for line in report.twins]
    return record | measured | {"notes": [*twins, *measured.get("notes", [])], "twins": report.twins}


def _check_exact(path: Path, measured: dict[str, Any]) -> None:
    """Raise UserError where the outputs differ by far more than rounding, although the growth was exact."""
    for name, error in (measured.get("parity") or {}).items():
        if error > max(_NOISE_TIMES * measured["noise"][name], _FLOOR):
            raise UserError(
                f"{path}: grown exactly, but its {name} differ from the source's by {error:.1e} (noise "
                f"{measured['noise'][name]:.1e}); the two configs are not of models that compute alike: check them"
            )


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


def _verify_run(run_dir: Path) -> list[dict[str, Any]]:
    ledger = Ledger.load(run_dir)
    assert ledger is not None, f"{run_dir} has a ledger"
    records = []
    for entry in (*ledger.links, *ledger.controls):
        records += _verify_entry(run_dir, ledger, entry)
    if not records:
        raise UserError(f"{run_dir}: the run has no checkpoints yet; nothing to verify")
    return records


def _verify_entry(run_dir: Path, ledger: Ledger, entry: Entry) -> list[dict[str, Any]]:
    records = []
    if entry.initial is not None:
        parent = ledger.entry(entry.parent).checkpoint if entry.parent and entry.certificate else None
        records.append(verify_checkpoint(run_dir / entry.initial, run_dir / parent if parent else None))
    for path in (entry.checkpoint, entry.export):
        if path is None or path == entry.initial:
            continue
        records.append(verify_checkpoint(run_dir / path))
        if path == entry.checkpoint and entry.weight_hash is not None:
            _check_hash(run_dir / path, entry.weight_hash)
    return records


def _check_hash(path: Path, recorded: str) -> None:
    reader = open_reader(path)
    try:
        found = weight_hash(reader)
    finally:
        reader.close()
    if found != recorded:
        raise UserError(
            f"{path}: its weights are not those that {FILENAME} records; restore the checkpoint from a copy"
        )
