"""The tokenizer of a corpus: any Hugging Face tokenizer.json, or a byte-level BPE that is trained here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
FILE = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")  # what transformers wants beside it
_SMALLEST_VOCABULARY = 257  # every byte, and the end of a document
# The names of the token between documents where nothing beside the tokenizer says it, the likeliest first.
_USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eod|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")


@dataclass(frozen=True)
class TextTokenizer:
    """What is known of a tokenizer. `path`: its tokenizer.json; `vocab_size`: its largest id + 1, added tokens
    included; `eod`: the id that ends a document, None where it has no such token."""

    path: Path
    vocab_size: int
    eod: int | None
    eod_token: str | None
    sha256: str


def find_tokenizer(path: Path | str, eod_token: str | None = None) -> TextTokenizer:
    """The tokenizer in a tokenizer.json or in a folder that holds one.

    `eod_token` names the token that ends documents; without it, what `tokenizer_config.json` or
    `special_tokens_map.json` beside it calls the end of text, then the usual names. Raises UserError where there is no
    tokenizer, it cannot be read, or it has no token of that name.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: does not exist; name a tokenizer.json, or a folder that holds one")
    tokenizer = open_tokenizer(file)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise UserError(f"{file}: has no tokens; name another tokenizer")
    if eod_token is not None and eod_token not in ids:
        raise UserError(f"{file}: has no token {eod_token!r}; name one of its own with --eod")
    named = eod_token or _named_end(file.parent)
    eod_token = next((token for token in (named, *_USUAL_ENDS) if token in ids), None)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return TextTokenizer(file, max(ids.values()) + 1, ids[eod_token] if eod_token else None, eod_token, digest)


def open_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` in a file, as a corpus needs it: it cuts nothing off, pads nothing, and takes the name
    of a special token in the text for text. Raises UserError if it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more special
        raise UserError(f"{file}: is no tokenizer that can be read ({error}); name a tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> TextTokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens and write it to `folder`, as transformers reads it.

    GPT-2's (Radford et al. 2019): its cut into words, every byte a token, no text unknown. Id 0 is `<|endoftext|>`.
    The same texts give the same file. Raises UserError if they have too few different pairs for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens; {_SMALLEST_VOCABULARY} are the fewest, every byte is one"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        most = tokenizer.get_vocab_size()
        raise UserError(f"the text gives a vocabulary of {most} tokens, {vocab_size} are asked for; ask for fewer")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(folder / FILE))
    (folder / COMPANIONS[0]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return find_tokenizer(folder, END_OF_DOCUMENT)


def _named_end(folder: Path) -> str | None:
    """What the files beside a tokenizer call its end of text."""
    for name in COMPANIONS:
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))["eos_token"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            return token
    return None
