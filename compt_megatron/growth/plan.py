"""What a growth plan is: for every target tensor, boxes that cover it, and what each box is made of.

Pure data: a plan can be printed, compared and written as JSON without weights and without torch. Because each piece
says how *one element* is made from global source coordinates, any slice of a target tensor can be made alone
(`execute.py`), whatever the layouts of the two checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, ClassVar, Literal

from compt_megatron.growth.request import Moments
from compt_megatron.spec.table import ModelSpec

Box = tuple[tuple[int, int], ...]  # per dimension: first index, and one past the last
Exactness = Literal["exact", "approximate", "new"]


@dataclass(frozen=True)
class Noise:
    """Adds scale * the target parameter's fresh value at start + (i - box start)."""

    scale: float
    start: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Element i of the box = scale * source[start + (i - box start)] (and noise, if given).

    `gradient`: the gradient of such an element in units of that of its source element (moments.py). `again`: the
    element is a copy of one that another box copies too.
    """

    kind: ClassVar[str] = "copy"
    source: str
    start: tuple[int, ...]
    scale: float = 1.0
    noise: Noise | None = None
    gradient: float = 1.0
    again: bool = False

    def __str__(self) -> str:
        place = f" from {list(self.start)}" if any(self.start) else ""
        noise = f" {'+' if self.noise.scale > 0 else '-'} noise * {abs(self.noise.scale):g}" if self.noise else ""
        return f"copy {self.source}{place}{_times(self.scale)}{noise}"


@dataclass(frozen=True)
class Contrast:
    """Adds s_j * kappa * sum_i w_i source_i to row j of a mean, w = (gamma - mean(gamma)) / n, s = `pair_signs`.

    kappa = min(ceiling, ratio / std(gamma)), std over all `size` entries of the source tensor `gamma`.
    """

    gamma: str
    size: int
    ratio: float
    ceiling: float


@dataclass(frozen=True)
class Reduce:
    """Row j along `dim` of the box = scale * mean of all `size` source rows along `dim` (and a contrast, if given).

    `start`: the source index of the box's first element in the other dimensions; 0 in `dim`. `across`: a second
    dimension, (index, size), over which those means are averaged in turn. `weights`: a source tensor of `size` entries;
    row i counts times entry i over their root mean square (as it is, if that is 0).
    """

    kind: ClassVar[str] = "reduce"
    source: str
    dim: int
    size: int
    start: tuple[int, ...]
    scale: float = 1.0
    contrast: Contrast | None = None
    across: tuple[int, int] | None = None
    weights: str | None = None

    def __str__(self) -> str:
        more = f" ± kappa * contrast by {self.contrast.gamma}" if self.contrast else ""
        over = f"dimension {self.dim}" if self.across is None else f"dimensions {self.dim} and {self.across[0]}"
        weighted = f" weighted by {self.weights}" if self.weights else ""
        return f"mean of {self.source} over {over}{weighted}{more}{_times(self.scale)}"


@dataclass(frozen=True)
class Level:
    """Every element is the root mean square of the `size` entries of a source tensor of one dimension."""

    kind: ClassVar[str] = "level"
    source: str
    size: int

    def __str__(self) -> str:
        return f"root mean square of {self.source}"


@dataclass(frozen=True)
class Constant:
    """Every element is `value`; with a contrast, row j of the box is value / (kappa * pair_signs(rows)[j])."""

    kind: ClassVar[str] = "constant"
    value: float
    contrast: Contrast | None = None

    def __str__(self) -> str:
        return f"±{self.value:g} / kappa" if self.contrast else f"{self.value:g}"


@dataclass(frozen=True)
class Random:
    """scale * the target parameter's own fresh value (`spec.random.initial`)."""

    kind: ClassVar[str] = "random"
    scale: float = 1.0

    def __str__(self) -> str:
        return f"fresh{_times(self.scale)}"


Piece = Copy | Reduce | Level | Constant | Random


def _times(scale: float) -> str:
    return "" if scale == 1.0 else f" * {scale:.6g}"


def pair_signs(rows: int) -> list[int]:
    """Signs of `rows` >= 2 new rows that sum to zero: +1, -1, ..., an odd number of rows ending in +1, +1, -2."""
    assert rows >= 2, rows
    signs = [1, -1] * (rows // 2)
    return signs if rows % 2 == 0 else [*signs[:-2], 1, 1, -2]


@dataclass(frozen=True)
class Part:
    """One box of a target tensor and what it is made of."""

    box: Box
    piece: Piece

    @property
    def numel(self) -> int:
        return prod(stop - start for start, stop in self.box)

    def __str__(self) -> str:
        return f"[{', '.join(f'{start}:{stop}' for start, stop in self.box)}] {self.piece}"


@dataclass(frozen=True)
class TensorPlan:
    """How one target tensor is made. `parts` do not overlap and cover it."""

    name: str
    shape: tuple[int, ...]
    exactness: Exactness
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        assert sum(part.numel for part in self.parts) == prod(self.shape), f"{self.name}: boxes do not cover it"

    def sources(self) -> Iterator[str]:
        """Names of the source tensors that it reads."""
        for part in self.parts:
            if isinstance(part.piece, Copy | Reduce | Level):
                yield part.piece.source
            if isinstance(part.piece, Reduce) and part.piece.weights:
                yield part.piece.weights
            if isinstance(part.piece, Reduce | Constant) and part.piece.contrast:
                yield part.piece.contrast.gamma

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        parts = [
            {"box": [list(side) for side in part.box], "kind": part.piece.kind, **asdict(part.piece)}
            for part in self.parts
        ]
        return {"shape": list(self.shape), "exactness": self.exactness, "parts": parts}

    def __str__(self) -> str:
        made = "; ".join(map(str, self.parts)) if len(self.parts) > 1 else str(self.parts[0].piece)
        return f"{self.name} {list(self.shape)} {self.exactness}: {made}"


@dataclass(frozen=True)
class GrowthPlan:
    """How every tensor of `target` is made from tensors of `source`.

    `tensors`: the weights. `states`: grown optimizer state, by its prefix on the checkpoint boundary ("master",
    "exp_avg", "exp_avg_sq", "step"), made from source tensors of the same prefix; empty for a fresh optimizer.
    `axes`: the mode used per axis, those that differ by tower as "tower.axis"; `depth`: the depth mode.
    """

    source: ModelSpec
    target: ModelSpec
    operator: str
    axes: dict[str, str]
    depth: str
    seed: int
    allow_approximate: bool
    tensors: dict[str, TensorPlan]
    noise: float = 0.0
    moments: Moments = "fresh"
    states: dict[str, dict[str, TensorPlan]] = field(default_factory=dict)

    def boundary(self) -> Iterator[tuple[str, str, TensorPlan]]:
        """Everything that is written: prefix on the checkpoint boundary, canonical name, plan; weights first."""
        for prefix, tensors in (("weight", self.tensors), *self.states.items()):
            for name, tensor in tensors.items():
                yield prefix, name, tensor

    @property
    def exact(self) -> bool:
        """Whether the target computes the source's function."""
        return all(tensor.exactness == "exact" for tensor in self.tensors.values())

    def warnings(self) -> list[str]:
        """What a user should know before training the result, a line each."""
        tiled = [axis for axis in ("heads", "mlp") if self._tiled(axis)]
        if not tiled or self.noise or self.moments == "grow":
            return []
        return [
            f"{' and '.join(tiled)} tiled without noise: a unit and its copy get the same gradient and never separate; "
            "use --noise 0.01, or --moments grow"
        ]

    def _tiled(self, axis: str) -> bool:
        """Whether some tower has more units on a hidden axis, and they are copies whose inputs are copies too.

        Where the residual stream is padded, a copy reads the new entries through fresh columns of its own.
        """
        return any(
            getattr(self.target.towers[name], axis) > getattr(tower, axis)
            and self._mode(name, axis) == "tile"
            and (self.target.towers[name].width == tower.width or self._mode(name, "embed") == "tile")
            for name, tower in self.source.towers.items()
        )

    def _mode(self, tower: str, axis: str) -> str | None:
        return self.axes.get(f"{tower}.{axis}", self.axes.get(axis))

    def elements(self) -> dict[str, int]:
        """Number of target elements by what they are made of."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            for part in tensor.parts:
                count[part.piece.kind] += part.numel
        return dict(count)

    def describe(self) -> str:
        """The whole plan as text: a few summary lines, then one line a target tensor."""
        total = self.target.numel
        shares = ", ".join(f"{kind} {100 * n / total:.1f} %" for kind, n in sorted(self.elements().items()))
        axes = ", ".join(f"{axis}={mode}" for axis, mode in sorted(self.axes.items()))
        head = [
            f"{self.source.name} ({self.source.numel:,} parameters) -> {self.target.name} ({total:,} parameters)",
            f"operator {self.operator} ({axes}), depth {self.depth}, noise {self.noise:g}, moments {self.moments}, "
            f"seed {self.seed}",
            f"{'exact: computes the same function' if self.exact else 'not exact'}; target elements: {shares}",
        ]
        head += [f"warning: {line}" for line in self.warnings()]
        return "\n".join([*head, *(f"  {tensor}" for tensor in self.tensors.values())])

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {
            "source": {"name": self.source.name, "digest": self.source.digest, "parameters": self.source.numel},
            "target": {"name": self.target.name, "digest": self.target.digest, "parameters": self.target.numel},
            "operator": self.operator,
            "axes": self.axes,
            "depth": self.depth,
            "seed": self.seed,
            "noise": self.noise,
            "moments": self.moments,
            "exact": self.exact,
            "elements": self.elements(),
            "tensors": {name: tensor.to_dict() for name, tensor in self.tensors.items()},
            "states": {
                prefix: {name: tensor.to_dict() for name, tensor in tensors.items()}
                for prefix, tensors in self.states.items()
                if prefix != "master"  # made as the weights are
            },
        }
