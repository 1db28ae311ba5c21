"""Small shards for the tests of the data pipeline."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Members = dict[str, bytes]


def png(seed: int, size: int = 8) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def sample(number: int, captions: Sequence[str] | None = None, **fields: Any) -> Members:
    """An image that is its own number, captions in json (or one in txt)."""
    members = {"png": png(number)}
    if captions is None:
        members["txt"] = f"caption {number}".encode()
    else:
        fields["captions"] = list(captions)
    if fields:
        members["json"] = json.dumps(fields).encode()
    return members


def write_shard(path: Path, samples: Sequence[Members], first: int = 0) -> Path:
    mode = "w:gz" if path.name.endswith(".gz") else "w"
    with tarfile.open(path, mode) as archive:
        for number, members in enumerate(samples):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"s{first + number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_set(
    folder: Path, sizes: Sequence[int], make: Callable[[int], Members] = sample, suffix: str = ".tar"
) -> list[Path]:
    """Shards of the given sizes; samples are numbered through, so that ids end in a number unique in the set."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for index, size in enumerate(sizes):
        numbers = range(first, first + size)
        paths.append(write_shard(folder / f"{index:05d}{suffix}", [make(number) for number in numbers], first))
        first += size
    return paths


class WordTokenizer:
    """A caption's last number and its length: enough to see which caption was taken."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[int("".join(filter(str.isdigit, text)) or 0), len(text)] for text in texts]
        return torch.tensor(rows, dtype=torch.long).reshape(-1, 2)


def plain_transform(image: Image.Image) -> torch.Tensor:
    """The pixels, shifted by a draw from each global generator that transforms use."""
    import random

    noise = torch.rand(1).item() + random.random() + np.random.rand()
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() + noise
