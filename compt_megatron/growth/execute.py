"""Carries a plan out: streams the target's tensors into a checkpoint, each worker its share."""

from __future__ import annotations

from collections import Counter
from math import prod

import torch

from compt_megatron.checkpoint.contract import Reader, Region, TensorInfo, Writer, region_shape
from compt_megatron.checkpoint.guard import Checks
from compt_megatron.checkpoint.stream import SLAB as SLAB_BYTES
from compt_megatron.checkpoint.stream import Cost, stream
from compt_megatron.checkpoint.workers import Place
from compt_megatron.errors import UserError
from compt_megatron.growth.maker import Maker, meetings
from compt_megatron.growth.means import tree_sum
from compt_megatron.growth.plan import Copy, GrowthPlan, Random, Reduce

__all__ = ["SLAB_BYTES", "Maker", "check_source", "execute", "target_infos", "tree_sum"]

# what making and writing takes, in nanoseconds; it decides only how the work is shared among workers
_WRITTEN, _READ, _SCALED, _FRESH = 0.6, 0.15, 0.5, 33.0  # a byte, a byte, an element, an element


def execute(
    plan: GrowthPlan,
    reader: Reader,
    writer: Writer,
    *,
    shard: tuple[int, int] = (0, 1),
    dtype: torch.dtype | None = None,
    place: Place | None = None,
    checks: Checks | None = None,
) -> None:
    """Write the target's tensors under their boundary names, this worker its share of them.

    `shard`: (index, number of workers), or `place`, which also hears of the progress. `dtype`: of all target weights
    (None: as the source stores what they are made from). `checks`: of the source, which go on beside. Declares all
    tensors in every worker and does not commit. Raises UserError if the source lacks a tensor or holds another shape.
    """
    tensors = reader.tensors()
    check_source(plan, tensors)
    infos = target_infos(plan, tensors, dtype)
    writer.declare(infos)
    maker = Maker(plan, reader.read, torch.get_num_threads())  # this worker's share of the processors
    hashed = _READ * sum(info.nbytes for name, info in tensors.items() if name.startswith("weight/"))
    stream(
        writer,
        infos,
        lambda name, region: maker.make(name, region, infos[name].dtype),
        place or Place(*shard),
        cost=_cost(plan, infos),
        ahead=hashed,
        checks=checks,
    )


def _cost(plan: GrowthPlan, infos: dict[str, TensorInfo]) -> Cost:
    """About how long a box of the target takes to make and to write."""
    tensors = {f"{prefix}/{name}": tensor for prefix, name, tensor in plan.boundary()}

    def cost(name: str, region: Region) -> float:
        total = _WRITTEN * prod(region_shape(region)) * infos[name].dtype.itemsize
        for part, inside, _ in meetings(tensors[name], region):
            count, piece = prod(region_shape(inside)), part.piece
            if isinstance(piece, Random) or (isinstance(piece, Copy) and piece.noise is not None):
                total += _FRESH * count
            elif isinstance(piece, Reduce) or (isinstance(piece, Copy) and piece.scale != 1.0):
                total += _SCALED * count
        return total

    return cost


def check_source(plan: GrowthPlan, tensors: dict[str, TensorInfo]) -> None:
    """Raise UserError unless the checkpoint holds every tensor the plan reads, in the source model's shape."""
    for prefix, name in {(prefix, source) for prefix, _, tensor in plan.boundary() for source in tensor.sources()}:
        found = tensors.get(f"{prefix}/{name}")
        if found is None:
            raise UserError(
                f"the source checkpoint has no {name} ({prefix}), which model {plan.source.name} has; name its model "
                "with --from"
            )
        if prefix != "step" and tuple(found.shape) != plan.source.params[name].shape:
            raise UserError(
                f"the source checkpoint's {name} is {list(found.shape)}, {plan.source.name} says "
                f"{list(plan.source.params[name].shape)}; name its model with --from"
            )


def target_infos(plan: GrowthPlan, tensors: dict[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Shape and dtype of every target tensor by its boundary name; `dtype` is for weights.

    Wholly new weights have the dtype that most of the source has, wholly new state that of the source's own.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in plan.source.params:
        if (info := tensors.get(f"weight/{name}")) is not None:
            sizes[info.dtype] += prod(info.shape)
    common = max(sizes, key=lambda key: sizes[key]) if sizes else torch.float32
    infos = {}
    for prefix, name, tensor in plan.boundary():
        first = next(tensor.sources(), None)
        if dtype is not None and prefix == "weight":
            own = dtype
        elif first is not None:
            own = tensors[f"{prefix}/{first}"].dtype
        else:
            own = common if prefix == "weight" else torch.float32
        infos[f"{prefix}/{name}"] = TensorInfo(tensor.shape, own)
    return infos
