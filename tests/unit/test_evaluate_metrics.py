"""Zero-shot and retrieval numbers against brute force, on one rank and on several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import Members, png, sample, write_set
from PIL import Image

from compt_megatron.data.evaluation import EvalSet
from compt_megatron.data.source import ShardSource
from compt_megatron.errors import UserError
from compt_megatron.evaluate.retrieval import caption_pairs, retrieval
from compt_megatron.evaluate.run import evaluate
from compt_megatron.evaluate.zero_shot import zero_shot

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


class LetterTokenizer:
    """One id a letter, the caption's length in all."""

    def __call__(self, texts: Any) -> torch.Tensor:
        rows = [([ord(letter) for letter in text] + [0] * 24)[:24] for text in texts]
        return torch.tensor(rows, dtype=torch.long).reshape(-1, 24)


class Encoders:
    """Fixed random maps of pixels and letters to features; `calls` lists the batch sizes they were called with."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(3 * 8 * 8, 6, generator=generator)
        self.letters = torch.randn(128, 24, 6, generator=generator)
        self.calls: list[tuple[str, int]] = []

    def image(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(("image", len(images)))
        return (images.flatten(1) / 255 - 0.5) @ self.pixels

    def text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(("text", len(tokens)))
        return self.letters[tokens, torch.arange(24)].sum(1)


def pixels(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()


def named(number: int) -> Members:
    return sample(
        number, [NAMES[number % 7], f"number {number}", "an animal", f"pair {number // 2}"], name=NAMES[number % 7]
    )


def build(folder: Path, sizes: list[int], make: Callable[[int], Members] = named, **options: Any) -> EvalSet:
    if not folder.exists():
        write_set(folder, sizes, make)
    classes = options.pop("classes", None)
    return EvalSet(ShardSource.open(str(folder), classes=classes), transform=pixels, name="animals", **options)


def together(world: int, work: Callable[[int, Callable[[torch.Tensor], torch.Tensor]], Any]) -> list[Any]:
    """Run `work(rank, reduce)` on `world` threads whose `reduce` sums over all of them."""
    barrier, shared, results = threading.Barrier(world, timeout=30), [torch.zeros(0)] * world, [None] * world

    def one(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            shared[rank] = tensor
            barrier.wait()
            total = torch.stack(shared).sum(0)
            barrier.wait()
            return total

        results[rank] = work(rank, reduce)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def brute_force(encoders: Encoders, eval_set: EvalSet, templates: tuple[str, ...], captions: int) -> dict[str, float]:
    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / features.norm(dim=-1, keepdim=True)

    tokens, rows = LetterTokenizer(), range(eval_set.rows)
    images = unit(encoders.image(torch.stack([image for _, image in eval_set.images(0, eval_set.rows)])))  # type: ignore
    top1 = top5 = 0
    for row in rows:
        scores = []
        for name in NAMES:
            features = [unit(encoders.text(tokens([template.replace("{}", name)])))[0] for template in templates]
            scores.append(float(images[row] @ unit(torch.stack(features).mean(0))))
        best = sorted(range(7), key=lambda index: -scores[index])
        top1 += best[0] == row % 7
        top5 += row % 7 in best[:5]
    found = {"top1": top1 / len(rows), "top5": top5 / len(rows), "classes": 7, "images": len(rows)}
    texts = sorted({caption for own in eval_set.captions for caption in own[:captions]})
    scores_all = images @ unit(encoders.text(tokens(texts))).T
    has = [[text in eval_set.captions[row][:captions] for text in texts] for row in rows]
    for k in (1, 5, 10):
        hits = [any(has[row][text] for text in scores_all[row].topk(min(k, len(texts))).indices) for row in rows]
        found[f"i2t_r{k}"] = sum(hits) / len(rows)
        hits = [any(has[row][t] for row in scores_all[:, t].topk(min(k, len(rows))).indices) for t in range(len(texts))]
        found[f"t2i_r{k}"] = sum(hits) / len(texts)
    return found


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 0, 4), (1, 2, 5), (3, 0, 4), (4, 0, 64)])
def test_numbers_equal_brute_force_on_any_number_of_ranks(tmp_path: Path, world: int, workers: int, batch: int) -> None:
    templates = ("{}", "a photo of a {}")
    whole = build(tmp_path / "set", [9, 0, 11, 2])
    assert whole.class_names == NAMES
    expected = brute_force(Encoders(), whole, templates, captions=3)
    assert 0 < expected["top1"] < expected["top5"] < 1
    everyone = [Encoders() for _ in range(world)]
    sets = [build(tmp_path / "set", [], rank=rank, world=world, workers=workers) for rank in range(world)]

    def work(rank: int, reduce: Any) -> Any:
        options: Any = dict(templates=templates, batch=batch, captions=3, rank=rank, world=world, reduce=reduce)  # noqa: C408
        encode, tokenizer = everyone[rank], LetterTokenizer()
        return [evaluate(encode.image, encode.text, [sets[rank]], tokenizer, **options) for _ in range(2)]

    for results in together(world, work):
        for result in results:  # the second time from the kept tensors
            found = result["animals"]
            assert found.pop("texts") == 7 + 22 + 1
            assert found == pytest.approx(expected, abs=1e-12)
    assert all(encoders.calls == everyone[0].calls for encoders in everyone)


def test_zero_shot_alone_is_the_same(tmp_path: Path) -> None:
    eval_set, encoders = build(tmp_path / "set", [20]), Encoders()
    expected = brute_force(encoders, eval_set, ("{}",), 1)
    found = zero_shot(encoders.image, encoders.text, eval_set, LetterTokenizer(), batch=7)
    assert found == {key: expected[key] for key in ("top1", "top5", "classes", "images")}
    with pytest.raises(UserError, match=r"must hold one \{\}"):
        zero_shot(encoders.image, encoders.text, eval_set, LetterTokenizer(), templates=("a photo",))


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_constant_and_nan_features_score_nothing(tmp_path: Path, value: float) -> None:
    eval_set = build(tmp_path / "set", [12])
    found = evaluate(
        lambda images: torch.full((len(images), 4), value),
        lambda tokens: torch.full((len(tokens), 4), value),
        [eval_set],
        LetterTokenizer(),
        captions=1,
    )["animals"]
    assert (found.pop("images"), found.pop("texts"), found.pop("classes")) == (12, 7, 7)
    if value == 1.0:
        assert found.pop("i2t_r10") == 1  # there are only six wrong answers
    assert set(found.values()) == {0}


def test_duplicate_captions_are_one_text_with_several_images() -> None:
    texts, pairs = caption_pairs([("a", "b"), ("b",), ("c", "b", "b")], limit=None)
    assert texts == ["a", "b", "c"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2], [2, 1]]
    text_features = torch.eye(3)[[2, 0, 1]]  # images 0, 1, 2 are nearest to texts b, c, a
    found = retrieval(torch.eye(3), text_features, pairs)
    assert (found["i2t_r1"], found["t2i_r1"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_classes_from_a_file_and_a_plain_vit(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)))
    eval_set = build(
        tmp_path / "set",
        [10],
        lambda n: {"png": png(n), "cls": str(n % 7).encode()},
        classes=tmp_path / "names.txt",
    )
    assert eval_set.class_names == NAMES[::-1]
    assert eval_set.labels.tolist() == [number % 7 for number in range(10)]

    def logits(images: torch.Tensor) -> torch.Tensor:
        keys = {
            tuple(image.flatten()[:4].tolist()): row % 7 for row, image in eval_set.images(0, 8) if image is not None
        }
        wanted = [keys.get(tuple(image.flatten()[:4].tolist()), 7) for image in images]
        return torch.nn.functional.one_hot(torch.tensor(wanted), 9).float() - 3

    found = evaluate(logits, None, [eval_set], None, batch=3)["animals"]
    assert found == {"top1": 0.8, "top5": 0.8, "classes": 9, "images": 10}


def test_broken_images_are_left_out_within_the_budget(tmp_path: Path) -> None:
    def make(number: int) -> Members:
        return named(number) | ({"png": b"not an image"} if number == 13 else {})

    eval_set, encoders = build(tmp_path / "set", [10, 10], make), Encoders()
    found = evaluate(encoders.image, encoders.text, [eval_set], LetterTokenizer(), batch=6, captions=2)["animals"]
    assert found["images"] == 19
    without = build(tmp_path / "without", [13, 6], lambda n: named(n if n < 13 else n + 1))  # all but that sample
    expected = evaluate(encoders.image, encoders.text, [without], LetterTokenizer(), batch=6, captions=2)["animals"]
    assert found == expected
    with pytest.raises(UserError, match="1 broken samples among its 10, the skip budget allows 0"):
        list(build(tmp_path / "set", [], skip_budget=0).batches(4))
