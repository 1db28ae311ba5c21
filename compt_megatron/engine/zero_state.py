"""Full-tensor access to what DeepSpeed partitions: fp32 master weights, Adam's moments and step, at any ZeRO stage.

DeepSpeed keeps them in four shapes, and each has its own rules:

- stage 0, fp32: the parameters themselves, states in the base optimizer under the parameter;
- stage 0, bf16: fp32 copies in `FP16_UnfusedOptimizer`, which takes one step on zero gradients while it is built, so
  whoever loads must set every state, the step included;
- stages 1 and 2: flat fp32 partitions, one per parameter group, linked to the parameters as fragments;
- stage 3: every parameter is cut over the ranks, padded to equal pieces, model weights included; with a disk to offload
  to, the pieces are in files (zero_disk.py), and `rest` must come before the next forward pass.

Reading is collective (every rank gets the full tensor); writing is local (every rank passes the full tensor).
"""

from __future__ import annotations

from typing import Any

import torch

from compt_megatron.engine.run_checkpoint import MOMENTS
from compt_megatron.engine.zero_disk import DiskGroups

_NEAR = 0.05  # from a limit of the logit scale: more than a rounding to bf16


class ZeroState:
    """The optimizer state of one DeepSpeed engine, one parameter at a time."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._optimizer = engine.optimizer
        self._base = base
        self._sharded = engine.zero_optimization_stage() == 3
        self._disk = DiskGroups(self._optimizer)
        self._copies: dict[int, torch.Tensor] = {}  # stage 0 in bf16: parameter -> its fp32 copy
        if not self._sharded and hasattr(self._optimizer, "fp32_groups") and hasattr(self._optimizer, "fp16_groups"):
            for low, high in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups):
                self._copies.update({id(p): copy for p, copy in zip(low, high)})
        self._fill_empty_states()
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _fill_empty_states(self) -> None:
        """Torch makes AdamW's states at the first step; make them now, so that they can be read and written."""
        if not self._sharded:
            for tensor in (tensor for group in self._base.param_groups for tensor in group["params"]):
                self._fill(tensor)
            return
        # Stage 3 hands its flat sub-groups to the base optimizer at each step only.
        for group, tensor in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            self._disk.bring(group, change=True)
            self._fill(tensor)
        self._disk.rest()

    def _fill(self, tensor: torch.Tensor) -> None:
        state = self._base.state[tensor]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    def master(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The full fp32 weight. Collective."""
        return self._read(param, None)

    def moment(self, param: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The full `exp_avg` or `exp_avg_sq`, fp32. Collective."""
        return self._read(param, key)

    def _read(self, param: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        if self._sharded:
            piece = self._stored(param, key).to(param.device)
            return self._optimizer._fp32_state_allgather(param, piece).detach().cpu()
        if hasattr(param, "_hp_mapping"):
            return param.get_full_hp_param(key).detach().cpu()  # type: ignore[attr-defined]
        owner = self._copies.get(id(param), param)
        value = owner if key is None else self._base.state[owner][key]
        return value.detach().float().cpu()

    @torch.no_grad()
    def set_weight(self, param: torch.nn.Parameter, weight: torch.Tensor, master: torch.Tensor) -> None:
        """Set the model's weight (any dtype) and its fp32 master. Both are the full tensor on every rank."""
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        if not self._sharded:
            param.data.copy_(weight)
        else:
            piece = param.ds_tensor  # type: ignore[attr-defined]
            if piece.status == PartitionedParamStatus.AVAILABLE:  # else on a disk, written with the master
                piece.data.copy_(self._piece(param, weight))
            if param.data.numel():  # a small parameter that stage 3 keeps whole
                param.data.copy_(weight)
        self._write(param, None, master)

    def set_moment(self, param: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set the full `exp_avg` or `exp_avg_sq`."""
        self._write(param, key, value)

    @torch.no_grad()
    def _write(self, param: torch.nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        value = value.to(param.device, torch.float32)
        if self._sharded:
            self._stored(param, key, change=True).copy_(self._piece(param, value))
        elif hasattr(param, "_hp_mapping"):
            param.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        elif id(param) in self._copies or key is not None:
            owner = self._copies.get(id(param), param)
            (owner.data if key is None else self._base.state[owner][key]).copy_(value)

    def group_of(self, param: torch.nn.Parameter) -> int:
        """The sub-group of stage 3 that a parameter is in; 0 at other stages."""
        if not self._sharded:
            return 0
        return int(self._optimizer.grad_position[self._optimizer.get_param_id(param)][0])

    def rest(self) -> None:
        """Put away what reading and writing have brought into memory from a disk."""
        if self._sharded:
            self._disk.rest()

    def _stored(self, param: torch.nn.Parameter, key: str | None, change: bool = False) -> torch.Tensor:
        """This rank's piece under stage 3, in memory until another sub-group is asked for."""
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().resolves_data_dependency():
            self._optimizer.reduce_and_partition_stream.synchronize()
        group, start, numel = self._optimizer.grad_position[self._optimizer.get_param_id(param)]
        self._disk.bring(group, change)
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        owner: torch.Tensor = flat if key is None else self._base.state[flat][key]
        return owner.narrow(0, start, numel)

    def _own(self, param: torch.nn.Parameter) -> int:
        """How many elements of this rank's piece under stage 3 are no padding."""
        start = self._optimizer._get_param_partition_rank(param) * param.partition_numel()  # type: ignore[attr-defined]
        return max(0, param.ds_numel - start)  # type: ignore[attr-defined]

    def _piece(self, param: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a full tensor, zero-padded as stage 3 pads it."""
        rank, numel = self._optimizer._get_param_partition_rank(param), param.partition_numel()  # type: ignore[attr-defined]
        flat = value.reshape(-1)[rank * numel : (rank + 1) * numel]
        return torch.nn.functional.pad(flat, (0, numel - flat.numel()))

    @property
    def step(self) -> int:
        """Optimizer steps taken, as Adam's bias correction counts them (equal for all parameters)."""
        return max((int(state["step"]) for state in self._base.state.values() if "step" in state), default=0)

    @step.setter
    def step(self, value: int) -> None:
        for state in self._base.state.values():
            if "step" in state:
                # A tensor of its own for each parameter: a shared one would be advanced once per parameter.
                state["step"] = torch.full_like(state["step"], float(value))

    @torch.no_grad()
    def clamp(self, param: torch.nn.Parameter, low: float, high: float) -> None:
        """Clamp a parameter and its master to [low, high], without communication."""
        if param.data.numel():
            param.data.clamp_(low, high)
        if self._sharded:
            weight = param.ds_tensor.data  # type: ignore[attr-defined]
            own = weight[: self._own(param)]
            inside = (own > low + _NEAR) & (own < high - _NEAR)
            if self._disk.is_away(self.group_of(param)) and bool(inside.all()):
                return  # the master too, for which a whole sub-group need not be read
            weight.clamp_(low, high)
            self._stored(param, None, change=True).clamp_(low, high)
        elif hasattr(param, "_hp_mapping"):
            if param._hp_mapping is not None:
                param._hp_mapping.get_hp_fragment().clamp_(low, high)  # type: ignore[union-attr]
        elif id(param) in self._copies:
            self._copies[id(param)].data.clamp_(low, high)
