"""Named operators: a growth mode for every axis, and the depth mode that goes with them.

An operator is one class with `plan(request)` and one entry in `OPERATORS`. `exact` and `corner` combine axis modes;
`reference` (reference.py) is the published code's own rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Protocol, get_args

from compt_megatron.errors import UserError
from compt_megatron.growth.axes import AxisMode, axis_mode
from compt_megatron.growth.compatibility import check_growable
from compt_megatron.growth.depth import LayerUse, layer_uses
from compt_megatron.growth.moments import Origin, grown_states
from compt_megatron.growth.plan import Constant, Exactness, GrowthPlan, Part, Random, TensorPlan
from compt_megatron.growth.reference import ReferenceOperator
from compt_megatron.growth.request import Moments, Request
from compt_megatron.growth.segments import Segment, Site, segment_parts
from compt_megatron.spec.table import Dim, ModelSpec, Param


class Operator(Protocol):
    """Makes a plan for a pair of models that growth connects."""

    @property
    def name(self) -> str: ...

    def plan(self, request: Request) -> GrowthPlan: ...


@dataclass(frozen=True)
class AxisOperator:
    """Grows every axis by its own mode: `axes` gives the default of each axis.

    With `exact`, whatever would change the model's function is refused, or recorded if the user allows it.
    """

    name: str
    axes: dict[str, str]
    depth: str
    exact: bool

    def plan(self, request: Request) -> GrowthPlan:
        work = _AxisPlanning(self, request)
        tensors = {name: work.tensor(param) for name, param in request.target.params.items()}
        states = {} if request.moments == "fresh" else grown_states(tensors, work.origins, request.moments)
        return GrowthPlan(
            source=request.source,
            target=request.target,
            operator=self.name,
            axes=dict(sorted(work.used.items())),
            depth=work.depth,
            seed=request.seed,
            allow_approximate=request.allow_approximate,
            tensors=tensors,
            noise=request.noise,
            moments=request.moments,
            states=states,
        )


@dataclass
class _AxisPlanning:
    """One run of an AxisOperator."""

    operator: AxisOperator
    request: Request
    depth: str = ""
    used: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[LayerUse]] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source, target = self.request.source, self.request.target
        self.depth = self.request.depth or self.operator.depth
        for name, tower in target.towers.items():
            self.layers[name] = layer_uses(self.depth, source.towers[name].layers, tower.layers)
        repeats = any(use.repeated and not use.silent for uses in self.layers.values() for use in uses)
        if repeats:
            self._require_approximate(f"depth mode {self.depth!r} changes the function", "use depth 'identity'")
        for axis in self.request.axes:
            name = axis.rpartition(".")[2]
            towers = [f"{tower}.{each}" for tower in target.towers for each in self.operator.axes]
            if axis not in (*self.operator.axes, *towers):
                raise UserError(f"no axis is called {axis!r}; choose one of {', '.join(self.operator.axes)}")
            axis_mode(self.request.axes[axis], name)

    def tensor(self, param: Param) -> TensorPlan:
        use = self.layers[param.tower][param.layer] if param.layer is not None else None
        origin = source_param(self.request.source, param, use.source if use else None)
        segments: list[list[Segment]] = []
        exact = not (use and use.repeated and not use.silent)
        for index, dim in enumerate(param.dims):
            site = self._site(param, index, origin)
            mode = self._mode(param, dim, site)
            exact = exact and (mode.exact or site.old == site.new)
            segments.append(mode.segments(site))
        self.origins[param.name] = Origin(origin, segments, bool(use and use.silent))
        if use and use.silent and silences(param):
            box = tuple((0, size) for size in param.shape)
            return TensorPlan(param.name, param.shape, "exact", (Part(box, Constant(0.0)),))
        parts = segment_parts(param, origin.name, origin.shape, segments)
        return TensorPlan(param.name, param.shape, _exactness(parts, exact), tuple(parts))

    def _site(self, param: Param, index: int, origin: Param) -> Site:
        source, target = self.request.source, self.request.target
        tower = target.towers.get(param.tower)
        return Site(
            param=param,
            index=index,
            old=origin.dims[index].size,
            new=param.dims[index].size,
            source=source.towers.get(param.tower),
            target=tower,
            pre_gamma=_pre_gamma(source, param.tower) if tower and tower.ln_pre else None,
            scaled_by=origin.scaled_by,
            noise=self.request.noise,
        )

    def _mode(self, param: Param, dim: Dim, site: Site) -> AxisMode:
        if dim.role == "free":
            return axis_mode("identity", dim.axis)
        keys = (f"{param.tower}.{dim.axis}", dim.axis)
        name = self._chosen(param.tower, dim.axis) or self._default(dim.axis, site)
        if dim.axis == "kv_heads":
            name = self._with_heads(param, name)
        mode = axis_mode(name, dim.axis)
        if site.old != site.new and not mode.exact:
            self._require_approximate(
                f"axis {dim.axis!r} ({site.old} -> {site.new}) by mode {name!r} changes the function",
                "choose an exact mode or size" if dim.axis != "joint" else f"choose embed_dim a multiple of {site.old}",
            )
        differs = any(key.endswith(f".{dim.axis}") for key in self.request.axes)
        self.used[keys[0] if differs else dim.axis] = name
        return mode

    def _chosen(self, tower: str, axis: str) -> str | None:
        """The mode that the user set for an axis, the tower's own first."""
        return self.request.axes.get(f"{tower}.{axis}") or self.request.axes.get(axis)

    def _with_heads(self, param: Param, own: str) -> str:
        """The mode of query groups, which is that of the heads in them."""
        heads = self._chosen(param.tower, "heads")
        if heads is not None and self._chosen(param.tower, "kv_heads") not in (None, heads):
            raise UserError(f"axis 'kv_heads' grows with 'heads', which has mode {heads!r}; set the same mode for both")
        if heads is None and own != self.operator.axes["heads"]:
            raise UserError(f"axis 'kv_heads' grows with 'heads'; set heads={own} too")
        return heads or own

    def _default(self, axis: str, site: Site) -> str:
        """The operator's mode of an axis. The residual stream is padded as its norms demand; the joint embedding is
        tiled where that works, else padded."""
        name = self.operator.axes[axis]
        if name == "mean_pad" and site.target is not None and site.target.norm == "rms":
            return "zero_pad"
        return "joint_pad" if axis == "joint" and name == "tile" and site.new % site.old else name

    def _require_approximate(self, what: str, instead: str) -> None:
        if self.operator.exact and not self.request.allow_approximate:
            raise UserError(
                f"{self.request.source.name} -> {self.request.target.name}: {what}, so operator "
                f"{self.operator.name!r} refuses it; {instead}, or allow it with --allow-approximate"
            )


def source_param(source: ModelSpec, param: Param, layer: int | None) -> Param:
    """The source's parameter that a target parameter is made from."""
    if layer is None:
        return source.params[param.name]
    prefix = source.towers[param.tower].block_prefix
    return source.params[param.name.replace(f"{prefix}.{param.layer}.", f"{prefix}.{layer}.", 1)]


def silences(param: Param) -> bool:
    """Whether a block adds nothing to the residual stream once all such parameters of it are 0."""
    return param.layer is not None and any(dim.axis == "embed" and dim.role == "write" for dim in param.dims)


def _pre_gamma(source: ModelSpec, tower: str) -> str:
    """The scale of the norm before the first block."""
    return next(
        param.name
        for param in source.params.values()
        if param.tower == tower and param.stage == "pre" and param.dims[0].role == "norm_scale"
    )


def _exactness(parts: list[Part], exact: bool) -> Exactness:
    if exact:
        return "exact"
    return "new" if all(isinstance(part.piece, Random) for part in parts) else "approximate"


_EXACT = {
    "embed": "mean_pad",
    "heads": "append",
    "kv_heads": "append",
    "head_dim": "identity",
    "mlp": "append",
    "joint": "tile",
}

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        AxisOperator("exact", _EXACT, "identity", True),
        AxisOperator("corner", dict.fromkeys(_EXACT, "corner"), "interleave", False),
        ReferenceOperator(),
    )
}


def plan(
    source: ModelSpec,
    target: ModelSpec,
    operator: str = "exact",
    *,
    depth: str | None = None,
    axes: dict[str, str] | None = None,
    seed: int = 0,
    allow_approximate: bool = False,
    noise: float = 0.0,
    moments: Moments = "fresh",
) -> GrowthPlan:
    """Plan how every tensor of `target` is made from tensors of `source`.

    `operator`: "exact", "corner" or "reference"; `depth`: a mode of depth.py (None: the operator's own); `axes`: modes
    per axis ("mlp") or per tower and axis ("text.mlp") that replace the operator's; `seed`: of all fresh values;
    `allow_approximate`: let `exact` record what it cannot do exactly instead of refusing it; `noise`: how far `tile`
    parts its copies, in units of a fresh value (about 0.01 is enough; 0: not at all); `moments`: "grow" plans optimizer
    state too (moments.py), "fresh" leaves it out.

    Raises UserError if no growth connects the models, or this operator does not.
    """
    if operator not in OPERATORS:
        raise UserError(f"growth operator {operator!r} is not known; choose one of {', '.join(OPERATORS)}")
    if moments not in get_args(Moments):
        raise UserError(f"moments {moments!r} is not known; choose one of {', '.join(get_args(Moments))}")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} must be from 0 to 2^64 - 1")
    if not 0 <= noise < inf:
        raise UserError(f"noise {noise!r} must be a number from 0 on; about 0.01 parts copies without changing much")
    check_growable(source, target)
    request = Request(source, target, depth, dict(axes or {}), seed, allow_approximate, float(noise), moments)
    return OPERATORS[operator].plan(request)
