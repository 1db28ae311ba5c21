"""Which source head, and which source query group, each head and group of the target is made from.

Query groups (GQA): r = heads / groups heads share one key and value. Heads and groups may be permuted together, but a
target group can only hold heads that shared a group before. `None` is a new head or group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compt_megatron.errors import UserError
from compt_megatron.growth.segments import Segment, Site
from compt_megatron.spec.table import Tower


@dataclass(frozen=True)
class HeadMap:
    """Source head of each target head; source group of each target group; and how many groups share a source group."""

    heads: tuple[int | None, ...]
    groups: tuple[int | None, ...]
    spread: int


def appended(source: Tower, target: Tower, where: str) -> HeadMap:
    """The source's heads once each, in as few of the target's groups as hold them; the rest is new.

    With r' >= r heads a group head h becomes (h // r) r' + h % r and new groups follow; with r' < r every source group
    becomes ceil(r / r') groups with copies of its key and value (MQA to GQA). Raises UserError if they do not fit.
    """
    old, new, spread = _per_group(source, target)
    if source.groups * spread > target.groups:
        raise UserError(
            f"{where}: {target.groups} query groups of {new} heads cannot hold {source.groups} groups of {old}; "
            f"the target needs {source.groups * spread} groups or more (num_key_value_heads)"
        )
    heads: list[int | None] = [None] * target.heads
    for head in range(source.heads):
        group, slot = divmod(head, old)
        heads[(group * spread + slot // new) * new + slot % new] = head
    groups = [j // spread if j < source.groups * spread else None for j in range(target.groups)]
    return HeadMap(tuple(heads), tuple(groups), spread)


def tiled(source: Tower, target: Tower, where: str) -> HeadMap:
    """Every source head as often as every other: inside its group, with its group, or both.

    Raises UserError where heads, heads a group and groups do not fit each other a whole number of times.
    """
    old, new, spread = _per_group(source, target)
    fits = target.heads % source.heads == 0 and (old % new == 0 or new % old == 0)
    if not fits or target.groups % (source.groups * spread):
        raise UserError(
            f"{where}: mode 'tile' needs whole ratios; {source.heads} heads in {source.groups} groups do not become "
            f"{target.heads} in {target.groups} that way; choose mode 'append' for the heads or another target"
        )
    heads: list[int | None] = []
    groups: list[int | None] = []
    for j in range(target.groups):
        group, part = divmod(j % (source.groups * spread), spread)
        groups.append(group)
        heads += [group * old + (part * new + slot) % old for slot in range(new)]
    return HeadMap(tuple(heads), tuple(groups), spread)


def _per_group(source: Tower, target: Tower) -> tuple[int, int, int]:
    old, new = source.heads // source.groups, target.heads // target.groups
    return old, new, -(-old // new)


def units(site: Site, found: HeadMap) -> tuple[int | None, ...]:
    """The part of a map that this dimension follows: its heads or its groups."""
    return found.groups if site.axis == "kv_heads" or site.param.part in ("k", "v") else found.heads


def head_segments(
    site: Site,
    sources: Sequence[int | None],
    inside: Segment,
    beyond: Segment,
    old: Segment,
    places: Sequence[int] | None = None,
) -> list[Segment]:
    """One dimension whose target heads are made from `sources`.

    Each source head's entries go to the `places` of its target head (None: the leading ones) as `old` says (its start,
    stop, source and copy are filled in); the head's other entries are `inside`, new heads are `beyond`.
    """
    assert site.source is not None
    assert site.target is not None
    small, large = site.source.head_dim, site.target.head_dim
    runs = _runs(range(small) if places is None else places)
    seen: dict[int, int] = {}
    first: dict[int, int] = {}
    segments: list[Segment] = []
    for head, source in enumerate(sources):
        at, end = head * large, (head + 1) * large
        if source is None:
            _add(segments, replace(beyond, start=at, stop=end))
            continue
        copy = seen.get(source, 0)
        seen[source] = copy + 1
        first.setdefault(source, at)
        done = 0
        for entry, place, size in runs:
            if place > done:
                _add(segments, replace(inside, start=at + done, stop=at + place))
            noise_at = first[source] + place
            start = at + place
            piece = replace(old, start=start, stop=start + size, source=source * small + entry, copy=copy)
            _add(segments, replace(piece, noise_at=noise_at) if old.noise else piece)
            done = place + size
        if done < large:
            _add(segments, replace(inside, start=at + done, stop=end))
    return segments


def _runs(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first entry, its place, length) of runs of neighbouring entries that stay neighbours; places ascend."""
    runs: list[tuple[int, int, int]] = []
    for entry, place in enumerate(places):
        if runs and place == runs[-1][1] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((entry, place, 1))
    return runs


def _add(segments: list[Segment], segment: Segment) -> None:
    """Append a segment, as part of the last one where it continues it."""
    last = segments[-1] if segments else None
    if last is not None and _continues(last, segment):
        segments[-1] = replace(last, stop=segment.stop)
    else:
        segments.append(segment)


def _continues(last: Segment, segment: Segment) -> bool:
    size = last.stop - last.start
    moved = replace(last, start=segment.start, stop=segment.stop)
    if last.what == "old":
        moved = replace(moved, source=last.source + size, noise_at=last.noise_at + size if last.noise else 0)
    return last.stop == segment.start and moved == segment
