"""From the members of a sample to an image, captions and a label, or to the reason why that is impossible."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from compt_megatron.data.tar_reader import IMAGE_SUFFIXES, RawSample
from compt_megatron.errors import UserError

CAPTION_KEYS = ("captions", "caption")


@dataclass(frozen=True)
class Sample:
    """One decoded sample. `id` is `<shard>/<key>`; `index` its place in the shard."""

    id: str
    shard: int
    index: int
    image: Image.Image | None  # RGB; None where only the other fields were asked for
    captions: tuple[str, ...]
    label: int | None
    name: str | None  # the name of its class, where the data has one


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used, and why."""

    id: str
    shard: int
    index: int
    reason: str


class Decoder:
    """Decodes samples. A sample without what `need` names ("captions", "label" or "image") is broken.

    `caption_keys` are the json fields that hold captions (a string or a list of strings each); of the default ones
    the first that is there counts, of those that a user lists all count. Where none are listed and none is there, the
    non-empty lines of the `txt` member are the captions; `caption_member` ("json" or "txt") admits one of the two
    only. The label is the `cls` member, the json field `label`, or the place of the json field `name` in `classes`.
    """

    def __init__(
        self,
        need: str = "captions",
        caption_keys: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        caption_member: str | None = None,
    ) -> None:
        if caption_member not in (None, "json", "txt"):
            raise UserError(f"data.caption_key: {caption_member!r} cannot hold captions; use 'json', 'txt' or null")
        self.caption_member = caption_member
        assert need in ("captions", "label", "image"), need
        self.need = need
        self.caption_keys = None if caption_keys is None else tuple(caption_keys)
        self.classes = None if classes is None else {name: index for index, name in enumerate(classes)}

    def __call__(self, raw: RawSample, shard: int, index: int, shard_name: str, image: bool = True) -> Sample | Broken:
        """Decode `raw`, sample `index` of shard number `shard`; `image=False` leaves the pixels alone."""
        name = f"{shard_name}/{raw.key}"
        try:
            if raw.damage is not None:
                raise ValueError(raw.damage)
            fields = _json(raw)
            captions = self._captions(raw, fields)
            label = self._label(raw, fields)
            if self.need == "captions" and not captions:
                keys = [repr(key) for key in self.caption_keys or CAPTION_KEYS]
                txt = "" if self.caption_keys else "a txt member, or "
                raise ValueError(f"no caption ({txt}json with {' or '.join(keys)})")
            if self.need == "label" and label is None:
                raise ValueError("no label (a cls member, or json with an integer 'label')")
            class_name = fields.get("name")
            class_name = class_name if isinstance(class_name, str) else None
            return Sample(name, shard, index, _image(raw) if image else None, captions, label, class_name)
        except Exception as error:  # image decoders raise whatever they like on damaged bytes
            return Broken(name, shard, index, str(error) or type(error).__name__)

    def _captions(self, raw: RawSample, fields: dict[str, Any]) -> tuple[str, ...]:
        found: list[str] = []
        for key in () if self.caption_member == "txt" else self.caption_keys or CAPTION_KEYS:
            value = fields.get(key)
            values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            found += [text.strip() for text in values if isinstance(text, str) and text.strip()]
            if found and self.caption_keys is None:
                break
        asked = self.caption_keys is not None and self.caption_member != "txt"  # for json fields: no silent txt instead
        if not found and not asked and "txt" in raw.members and self.caption_member != "json":
            found = [line.strip() for line in raw.members["txt"].decode("utf-8").splitlines() if line.strip()]
        return tuple(found)

    def _label(self, raw: RawSample, fields: dict[str, Any]) -> int | None:
        if "cls" in raw.members:
            return int(raw.members["cls"])
        label = fields.get("label")
        if isinstance(label, int) and not isinstance(label, bool):
            return label
        if self.classes is not None and isinstance(fields.get("name"), str):
            return self.classes.get(fields["name"])
        return None


def _json(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw.members:
        return {}
    value = json.loads(raw.members["json"])
    if not isinstance(value, dict):
        raise ValueError("its json is not an object")
    return value


def _image(raw: RawSample) -> Image.Image:
    for suffix in IMAGE_SUFFIXES:
        if suffix in raw.members:
            with Image.open(io.BytesIO(raw.members[suffix])) as image:
                return image.convert("RGB")  # decodes wholly, as open_clip's own trainer does ("pilrgb")
    raise ValueError(f"no image (a member ending in {', '.join(IMAGE_SUFFIXES)})")
