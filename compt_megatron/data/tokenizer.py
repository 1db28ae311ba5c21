"""The tokenizer of a model config: open_clip's own, chosen and configured as open_clip would."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import find_file
from compt_megatron.torchvision_mend import ensure_torchvision

_REMEMBERED = 1 << 16  # captions whose ids are kept; at 77 tokens some 50 MB


class Tokenizer:
    """list of captions -> ids [n, context] int64, remembering what it has seen. Can be sent to worker processes."""

    def __init__(self, inner: Any, config: dict[str, Any], beside: Path | None, eot: int | None) -> None:
        self.inner, self.eot, self._made_by = inner, eot, (config, beside)
        text_cfg = _text_cfg(config)
        self.context_length: int = inner.context_length
        self.vocab_size = int(text_cfg.get("vocab_size", 49408))
        # A reduction mask draws a caption's tokens anew each time.
        self._remember = not (text_cfg.get("tokenizer_kwargs") or {}).get("reduction_mask")
        self._ids: dict[str, torch.Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Ids of the captions, [n, context] int64, zero-padded and cut to the context as open_clip does."""
        if not self._remember:
            return self.inner(list(texts), context_length=self.context_length)
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        fresh = dict(zip(new, self.inner(new, context_length=self.context_length))) if new else {}
        rows = [self._ids[text] if text in self._ids else fresh[text] for text in texts]
        if len(self._ids) + len(fresh) > _REMEMBERED:
            self._ids.clear()
        self._ids.update(fresh)
        return torch.stack(rows) if rows else torch.zeros(0, self.context_length, dtype=torch.long)

    def __reduce__(self) -> Any:
        return build_tokenizer, self._made_by


def _text_cfg(config: dict[str, Any]) -> dict[str, Any]:
    text_cfg = (config.get("model_cfg") or config).get("text_cfg")
    if text_cfg is None:
        raise UserError("the model config has no 'text_cfg': a plain ViT has no tokenizer; use objective classify")
    return text_cfg


def bpe_file(config: dict[str, Any], beside: Path | None = None) -> Path | None:
    """The vocabulary file that `text_cfg.tokenizer_kwargs.bpe_path` names, None where the config names none.

    Looked for as named (beside `beside`, in the working directory), by its bare name in `beside` (an exported folder
    that was moved), then among the packaged configs. Raises UserError if it is in none of them.
    """
    name = (_text_cfg(config).get("tokenizer_kwargs") or {}).get("bpe_path")
    if name is None:
        return None
    candidates = [
        (str(name), beside),
        (Path(name).name, beside),
        (str(name), None),
        (f"models/{Path(name).name}", None),
    ]
    for candidate, folder in candidates:
        if (path := find_file(candidate, folder)) is not None:
            return path
    raise UserError(
        f"tokenizer vocabulary {name!r} (text_cfg.tokenizer_kwargs.bpe_path) was not found beside the recipe or the "
        "checkpoint nor among the packaged configs; put the file there or correct the path in the model config"
    )


def build_tokenizer(config: dict[str, Any], beside: Path | None = None) -> Tokenizer:
    """The tokenizer of model config `config` (open_clip's JSON, with or without the `model_cfg` wrapping).

    `text_cfg.hf_tokenizer_name` selects open_clip's HFTokenizer, else its SimpleTokenizer with `tokenizer_kwargs`;
    `beside` is where a `bpe_path` is looked for first. Raises UserError for a missing vocabulary file or package and
    where the ids do not fit the model (`vocab_size`, `eos_id`).
    """
    text_cfg = _text_cfg(config)
    ensure_torchvision()
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    context_length = int(text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH))
    vocab_size = int(text_cfg.get("vocab_size", 49408))
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    if name := text_cfg.get("hf_tokenizer_name"):
        local = beside if beside is not None and (beside / "tokenizer_config.json").is_file() else name
        try:
            mode = text_cfg.get("tokenizer_mode")
            hugging_face = HFTokenizer(str(local), context_length=context_length, tokenizer_mode=mode, **kwargs)
        except ImportError as error:
            raise UserError(f"the tokenizer {name!r} needs transformers; pip install transformers ({error})") from error
        except OSError as error:
            raise UserError(f"the tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        _check_fits(len(hugging_face.tokenizer), vocab_size, str(name))
        return Tokenizer(hugging_face, config, beside, hugging_face.tokenizer.eos_token_id)
    if (path := bpe_file(config, beside)) is not None:
        kwargs["bpe_path"] = str(path)
    try:
        simple = SimpleTokenizer(context_length=context_length, **kwargs)
    except Exception as error:  # whatever a wrong vocabulary file makes it raise
        raise UserError(f"text_cfg.tokenizer_kwargs {kwargs}: open_clip's tokenizer refuses them ({error})") from error
    _check_fits(simple.vocab_size, vocab_size, str(path or "open_clip's vocabulary"))
    if text_cfg.get("pool_type") == "eos" and text_cfg.get("eos_id", 2) != simple.eot_token_id:
        raise UserError(
            f"text_cfg.eos_id is {text_cfg.get('eos_id', 2)}, the tokenizer ends with {simple.eot_token_id}"
        )
    if text_cfg.get("pool_type", "argmax") == "argmax" and simple.eot_token_id != simple.vocab_size - 1:
        raise UserError("text_cfg.pool_type argmax needs the end of text as the last token; set pool_type: eos, eos_id")
    return Tokenizer(simple, config, beside, simple.eot_token_id)


def _check_fits(tokens: int, vocab_size: int, name: str) -> None:
    if tokens > vocab_size:
        raise UserError(f"{name} has {tokens} tokens, text_cfg.vocab_size is {vocab_size}; set it to at least {tokens}")


def export_tokenizer(
    config: dict[str, Any], dst: Path, beside: Path | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """What an open_clip export into folder `dst` needs: (model config to write, {file name in dst: file to copy}).

    open_clip opens `bpe_path` as it stands, not relative to the exported folder, so the written config holds the
    absolute path of the copy inside `dst` (its final name): `open_clip.get_tokenizer("local-dir:DST")` then works from
    any working directory. After moving the folder: `get_tokenizer("local-dir:NEW", bpe_path="NEW/<file>")`;
    `build_tokenizer(config, beside=NEW)` finds the file by itself.
    """
    inner = config.get("model_cfg") or config
    if inner.get("text_cfg") is None or (path := bpe_file(config, beside)) is None:
        return inner, {}
    written = copy.deepcopy(inner)
    written["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = str(dst.absolute() / path.name)
    return written, {path.name: path}
