"""What each emoji is called: its Unicode name, and the aliases and keywords that serve as further captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# A keyword that names dozens of emoji ("face", "flag") tells none of them apart: in a contrastive batch it would
# call every other of them a wrong match. Those shared by more than this many emoji are left out of the captions.
KEYWORD_SHARED_BY_AT_MOST = 8
# Groups of the Unicode list that are parts (skin tones, hair), not pictures; emojibase numbers them so.
COMPONENTS = 2


@dataclass(frozen=True)
class EmojiName:
    """One emoji: `code` is its code points in hexadecimal joined by `-`, without variation selectors (U+FE0F)."""

    code: str
    name: str
    captions: tuple[str, ...]
    category: str


def match_key(sequence: str) -> str:
    """Code points joined by `-` as any artist writes them -> one key: some leave out joiners, some leading zeros."""
    return "-".join(part.lstrip("0") for part in sequence.lower().split("-") if part not in ("fe0f", "200d"))


def read_names(
    entries: list[dict[str, Any]], shortcodes: Iterable[dict[str, str | list[str]]], groups: list[dict[str, Any]]
) -> dict[str, EmojiName]:
    """Names by match key, in Unicode order, from emojibase's data, shortcode and group files; no skin-tone variants.

    The first caption is the Unicode (CLDR) short name, then come aliases, then keywords, each text once.
    """
    category = {group["order"]: group["message"] for group in groups}
    entries = [entry for entry in entries if entry.get("group") not in (None, COMPONENTS)]
    entries.sort(key=lambda entry: entry["order"])
    shared = Counter(tag for entry in entries for tag in entry.get("tags", ()))
    tables = list(shortcodes)
    names: dict[str, EmojiName] = {}
    for entry in entries:
        aliases = [alias.replace("_", " ") for table in tables for alias in _as_list(table.get(entry["hexcode"], ()))]
        keywords = [tag for tag in entry.get("tags", ()) if shared[tag] <= KEYWORD_SHARED_BY_AT_MOST]
        code, key = entry["hexcode"].lower().replace("-fe0f", ""), match_key(entry["hexcode"])
        assert key not in names, f"two emoji with match key {key}"
        captions = _distinct([entry["label"], *aliases, *keywords])
        names[key] = EmojiName(code, entry["label"], captions, category[entry["group"]])
    assert len({name.name for name in names.values()}) == len(names), "two emoji with one name"
    return names


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _distinct(captions: list[str]) -> tuple[str, ...]:
    """Captions in order without those that differ from an earlier one in case or punctuation only."""
    kept: dict[str, str] = {}
    for caption in captions:
        kept.setdefault(" ".join(re.findall(r"\w+", caption.lower())) or caption, caption)
    return tuple(kept.values())
