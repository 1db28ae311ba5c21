"""Depth modes: which source layer each target layer is made from.

For L source and L' >= L target layers, target layer j comes from

- `interleave`, `identity`: layer floor(j L / L') (L' = 2 L: source layer l becomes 2l and 2l + 1);
- `stack`: layer j mod L, the whole model on top of itself;
- `middle`: the first and last quarter once, the middle half repeated to fill the rest.

`identity` differs from `interleave` in one thing: the first use of a source layer is the plain copy, and at every later
one the attention's and the MLP's output projections, with their biases, are 0, so that the block adds nothing to the
residual stream. Exact in pre-LN models; the others are not.

Sources: `interleave` CoM-PT (arXiv 2604.12391), `identity` LLaMA-Pro (arXiv 2401.02415) and LEMON (arXiv 2310.07999),
`stack` G_stack (arXiv 2405.15319) and bert2BERT (arXiv 2110.07143), `middle` SOLAR (arXiv 2312.15166) without overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compt_megatron.errors import UserError


@dataclass(frozen=True)
class LayerUse:
    """A target layer's source layer, whether an earlier target layer has used it too, and whether it is silent."""

    source: int
    repeated: bool
    silent: bool  # its output projections are 0


def _spread(target: int, old: int, new: int) -> int:
    return target * old // new


def _stack(target: int, old: int, new: int) -> int:
    return target % old


def _middle(target: int, old: int, new: int) -> int:
    quarter = old // 4
    if target < quarter:
        return target
    if target >= new - quarter:
        return target - (new - old)
    return quarter + (target - quarter) % (old - 2 * quarter)


DEPTH_MODES: dict[str, Callable[[int, int, int], int]] = {
    "identity": _spread,
    "interleave": _spread,
    "stack": _stack,
    "middle": _middle,
}


def layer_uses(mode: str, old: int, new: int) -> list[LayerUse]:
    """The source layer of each of `new` >= `old` target layers. Raises UserError for an unknown mode."""
    if mode not in DEPTH_MODES:
        raise UserError(f"depth mode {mode!r} is not known; choose one of {', '.join(DEPTH_MODES)}")
    assert new >= old, (old, new)
    sources = [DEPTH_MODES[mode](layer, old, new) for layer in range(new)]
    repeats = [source in sources[:layer] for layer, source in enumerate(sources)]
    return [
        LayerUse(source, repeat, repeat and mode == "identity") for source, repeat in zip(sources, repeats, strict=True)
    ]
