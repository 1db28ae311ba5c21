"""The record inside a grown checkpoint: what it was made from, by which rule, and what that rule promises."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from compt_megatron.errors import UserError
from compt_megatron.growth.moments import step_factors
from compt_megatron.growth.operators import plan as make_plan
from compt_megatron.growth.plan import Exactness, GrowthPlan
from compt_megatron.growth.request import Moments
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

_TYPES: dict[str, Any] = {
    "operator": str,
    "axes": dict,
    "depth": str,
    "seed": int,
    "allow_approximate": bool,
    "dtype": (str, type(None)),
    "exact": bool,
    "source": dict,
    "target": dict,
    "tensors": dict,
    "noise": (int, float),
    "moments": str,
    "rates": dict,
}
_SINCE_FIRST = {"noise", "moments", "rates"}  # entries that the first certificates did not have


@dataclass(frozen=True)
class Certificate:
    """Everything that is needed to make the grown tensors again from the source, and how exact each one is.

    `source`: {name, digest, config, hash, path}, hash being that of the source's weights; `target`: {name, digest};
    `dtype`: what the user asked for (None: the source's own); `rates`: [factor on the learning rate, on the weight
    decay] of the tensors whose entries were multiplied (moments.py); `parity`: the measured difference of features,
    where somebody measured it.
    """

    operator: str
    axes: dict[str, str]
    depth: str
    seed: int
    allow_approximate: bool
    dtype: str | None
    exact: bool
    source: dict[str, Any]
    target: dict[str, Any]
    versions: dict[str, str]
    tensors: dict[str, Exactness]
    parity: dict[str, Any] | None = None
    noise: float = 0.0
    moments: Moments = "fresh"
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data, as it lies in compt.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Certificate:
        """The inverse of `to_dict`. Raises UserError if an entry is missing; entries of later versions are ignored."""
        known = cls.__dataclass_fields__
        optional = {name for name, entry in known.items() if entry.default is None} | _SINCE_FIRST
        missing = sorted(known.keys() - content.keys() - optional)
        if missing:
            raise UserError(f"the certificate lacks {', '.join(missing)}; grow the checkpoint again")
        for name, kinds in _TYPES.items():
            if name in content and not isinstance(content[name], kinds):
                raise UserError(f"the certificate's {name!r} is {content[name]!r}; grow the checkpoint again")
        lacking = sorted({"name", "digest", "config", "hash", "path"} - content["source"].keys())
        if lacking or not {"name", "digest"} <= content["target"].keys():
            raise UserError("the certificate does not say which models it is about; grow the checkpoint again")
        given = {name: value for name, value in content.items() if name in known}
        rates = {name: tuple(pair) for name, pair in (content.get("rates") or {}).items()}
        return cls(**{**given, "rates": rates})

    def claims(self) -> dict[str, Any]:
        """What the certificate says of the result that its plan says too."""
        return {name: getattr(self, name) for name in ("exact", "axes", "depth", "tensors", "rates")}

    def with_parity(self, parity: dict[str, Any] | None) -> Certificate:
        """The same certificate with a measurement, None where there is none."""
        return replace(self, parity=parity)

    def source_spec(self) -> ModelSpec:
        """The source's parameter table."""
        return spec_from_config(self.source["config"], self.source["name"])

    def replan(self, target: ModelSpec) -> GrowthPlan:
        """The plan by which the checkpoint was made. Raises UserError if `target` is another model."""
        if target.digest != self.target["digest"]:
            raise UserError(
                f"the certificate is for model {self.target['name']} ({self.target['digest']}), the checkpoint holds "
                f"{target.name} ({target.digest}); use the checkpoint that growth wrote"
            )
        return make_plan(
            self.source_spec(),
            target,
            self.operator,
            depth=self.depth,
            axes=self.axes,
            seed=self.seed,
            allow_approximate=self.allow_approximate,
            noise=self.noise,
            moments=self.moments,
        )


def certify(plan: GrowthPlan, source_hash: str, source_path: str, dtype: str | None) -> Certificate:
    """The certificate of a plan carried out on the weights with hash `source_hash`."""
    return Certificate(
        operator=plan.operator,
        axes=plan.axes,
        depth=plan.depth,
        seed=plan.seed,
        allow_approximate=plan.allow_approximate,
        dtype=dtype,
        exact=plan.exact,
        source={
            "name": plan.source.name,
            "digest": plan.source.digest,
            "config": plan.source.config,
            "hash": source_hash,
            "path": source_path,
        },
        target={"name": plan.target.name, "digest": plan.target.digest},
        versions={
            "compt_megatron": _own_version(),
            "torch": str(torch.__version__),  # it is a class of its own
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        tensors={name: tensor.exactness for name, tensor in plan.tensors.items()},
        noise=plan.noise,
        moments=plan.moments,
        rates=step_factors(plan),
    )


def _own_version() -> str:
    try:
        return version("compt_megatron")
    except PackageNotFoundError:  # a source tree that was not installed
        return "source"
