"""Checkpoints for other people's tools: a folder that open_clip or transformers loads as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compt_megatron.chain.run_tokenizer import recorded_tokenizer, with_companions
from compt_megatron.checkpoint.api import convert
from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.data.tokenizer import export_tokenizer
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

EXPORTS = ("open_clip", "hf")


def export(
    src: str | Path,
    dst: str | Path,
    format: str | None = None,
    *,
    spec: ModelSpec | None = None,
    overwrite: bool = False,
    trust_pickle: bool = False,
    attachments: Mapping[str, Path] | None = None,
) -> list[str]:
    """Write checkpoint `src` as `dst` for open_clip or transformers: a folder (weights, config, tokenizer) or one file.

    `format`: "open_clip" or "hf" (None: hf for a language model, open_clip for any other). The tokenizer is the
    vocabulary that an open_clip config names; of a language model the files that lie beside a Hugging Face source, or
    `attachments` ({name: file}; None: what the run records, if the source lies in one). Returns a line for each thing
    that was left out (optimizer state). Raises UserError for another format, and for a model that the format does not
    have.
    """
    if format not in (None, *EXPORTS):
        raise UserError(f"--format {format}: cannot export to it; choose one of {', '.join(EXPORTS)}")
    reader = open_reader(src, spec, trust_pickle)
    try:
        known = reader.spec
    finally:
        reader.close()
    assert known is not None, "a reader knows its model or refuses to open"
    format = format or ("hf" if known.is_language_model else "open_clip")
    dst = Path(dst)
    if known.is_language_model and attachments is None and dst.suffix not in SINGLE_FILES:
        attachments = with_companions(recorded_tokenizer(src))
    plain = known.is_language_model or dst.suffix in SINGLE_FILES
    config, files = (known.config, dict(attachments or {})) if plain else export_tokenizer(known.config, dst)
    return convert(
        src, dst, format, spec=spec, overwrite=overwrite, trust_pickle=trust_pickle, config=config, attachments=files
    )
