"""The trained vocabulary is open_clip's format exactly, made again from the shipped captions bit for bit."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from compt_megatron.data.bpe import train_bpe, write_merges
from compt_megatron.data.emoji import emoji_facts
from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision

ensure_torchvision()
pytest.importorskip("open_clip")
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

SHIPPED = Path(__file__).parents[2] / "configs" / "models" / "emoji-bpe.txt.gz"
VOCABULARY = 1024


def captions_of(split: str) -> list[str]:
    return [caption for fact in emoji_facts(split) for caption in fact["captions"]]


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(SHIPPED), context_length=16)


def test_vocabulary_is_whole(tokenizer):
    assert tokenizer.vocab_size == VOCABULARY
    assert sorted(tokenizer.encoder.values()) == list(range(VOCABULARY))
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == (VOCABULARY - 2, VOCABULARY - 1)


@pytest.mark.parametrize("split", ["train", "unseen_names"])
def test_captions_come_back(tokenizer, split):
    for caption in sorted(set(captions_of(split))):
        tokens = tokenizer.encode(caption)
        words = tokenizer.pat.findall(tokenizer.clean_fn(caption))
        assert tokenizer.decode(tokens) == " ".join(words) + " "
        assert max(tokens) < VOCABULARY - 2


def test_any_text_is_encoded(tokenizer):
    text = "zürich 東京 <>{} 123"
    assert tokenizer.decode(tokenizer.encode(text)) == "zürich 東京 <>{} 1 2 3 "


def test_nearly_all_captions_fit_sixteen_tokens(tokenizer):
    captions = set(captions_of("train"))
    long = [caption for caption in captions if len(tokenizer.encode(caption)) + 2 > 16]
    assert len(long) < 0.002 * len(captions)
    assert tokenizer(["grinning face"]).shape == (1, 16)


def test_training_again_gives_the_shipped_merges():
    captions = captions_of("train")
    shipped = gzip.decompress(SHIPPED.read_bytes()).decode().split("\n")[1:]
    merges = train_bpe(reversed(captions), VOCABULARY)
    assert [" ".join(pair) for pair in merges] == shipped


def test_merges_follow_frequency_then_alphabet(tmp_path):
    merges = train_bpe(["ab ab ab", "cd cd cd", "abx"], 514 + 3)
    assert merges == [("a", "b</w>"), ("c", "d</w>"), ("a", "b")]
    write_merges(tmp_path / "one.gz", merges)
    write_merges(tmp_path / "two.gz", merges)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    tokenizer = SimpleTokenizer(bpe_path=str(tmp_path / "one.gz"))
    assert tokenizer.vocab_size == 517
    assert len(tokenizer.encode("ab cd")) == 2


def test_too_few_captions_are_refused():
    with pytest.raises(UserError, match="too few for 1024 tokens"):
        train_bpe(["one two"], 1024)
