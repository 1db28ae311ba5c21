"""Trains a byte-level BPE vocabulary and writes it in the format of open_clip's own tokenizer (`bpe_path`).

A small data set needs a small vocabulary: open_clip's 49,408 tokens would be most of a small text tower's parameters.
The file is read by open_clip's unchanged SimpleTokenizer, so exported models stay loadable by open_clip.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision

BYTE_TOKENS = 512  # every byte, inside a word and as a word's end
SPECIAL_TOKENS = 2  # start and end of text
WORD_END = "</w>"

Pair = tuple[str, str]


def train_bpe(captions: Iterable[str], vocab_size: int) -> list[Pair]:
    """The merges, in order, of a vocabulary of exactly `vocab_size` tokens (bytes and special tokens included).

    Captions are cleaned and cut into words by open_clip's own tokenizer. Each step merges the most frequent pair of
    neighbours (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1); ties go to the alphabetically first pair, so equal
    captions give equal merges. Raises UserError if the captions have too few different pairs.
    """
    words: Counter[str] = Counter()
    for caption, count in Counter(captions).items():
        for word in _words(caption):
            words[word] += count
    # Each different word as its present pieces, with how often it occurs in the captions.
    pieces = [((*word[:-1], word[-1] + WORD_END), count) for word, count in words.items()]
    pairs: Counter[Pair] = Counter()
    for word_pieces, count in pieces:
        _count_pairs(pairs, word_pieces, count)
    tokens = {piece for word_pieces, _ in pieces for piece in word_pieces}
    merges: list[Pair] = []
    while len(merges) < vocab_size - BYTE_TOKENS - SPECIAL_TOKENS:
        # Two merges with one result would give the token two numbers, and the vocabulary a hole.
        new = [(-count, pair) for pair, count in pairs.items() if count and pair[0] + pair[1] not in tokens]
        if not new:
            raise UserError(f"{len(words)} different words give {len(merges)} merges, too few for {vocab_size} tokens")
        best = min(new)[1]
        merges.append(best)
        tokens.add(best[0] + best[1])
        for number, (word_pieces, count) in enumerate(pieces):
            merged = _merge(word_pieces, best)
            if merged != word_pieces:
                _count_pairs(pairs, word_pieces, -count)
                _count_pairs(pairs, merged, count)
                pieces[number] = merged, count
    return merges


def write_merges(path: Path, merges: list[Pair]) -> None:
    """Write merges as open_clip reads them: gzip, a heading line that it skips, one pair a line."""
    # No newline at the end: open_clip would read an empty last merge from it, one token more.
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as compressed:
        compressed.write(text.encode("utf-8"))


def _count_pairs(pairs: Counter[Pair], word: tuple[str, ...], count: int) -> None:
    for pair in pairwise(word):
        pairs[pair] += count


def _merge(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    if pair[0] not in word:
        return word
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


_tokenizer = None


def _words(caption: str) -> list[str]:
    """A caption's words as open_clip sees them, one character a byte."""
    global _tokenizer
    if _tokenizer is None:
        ensure_torchvision()
        from open_clip.tokenizer import SimpleTokenizer

        _tokenizer = SimpleTokenizer()
    found = _tokenizer.pat.findall(_tokenizer.clean_fn(caption))
    return ["".join(_tokenizer.byte_encoder[byte] for byte in word.encode("utf-8")) for word in found]
