"""Full-tensor access to what megatron-core's optimizers hold: fp32 masters, Adam's moments and step.

Without the distributed optimizer they lie whole under each parameter, or under its fp32 copy. With it each
data-parallel rank has a piece of every parameter in its flat buffers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.engine.run_checkpoint import MOMENTS


class MegatronState:
    """The optimizer state of one megatron engine, one parameter at a time (see run_checkpoint.ParameterState)."""

    def __init__(self, optimizer: Any, base: torch.optim.Optimizer, data_group: dist.ProcessGroup) -> None:
        self._optimizer, self._base, self._group = optimizer, base, data_group
        self._sharded = hasattr(optimizer, "model_param_gbuf_map")
        for group in base.param_groups:  # torch makes AdamW's states at the first step
            for tensor in group["params"]:
                state = base.state[tensor]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
                    for key in MOMENTS:
                        state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    def _piece(self, param: torch.nn.Parameter) -> tuple[torch.Tensor, slice]:
        """The optimizer's own tensor of a parameter, and the range of the flat parameter that it is."""
        if not self._sharded:
            return getattr(param, "main_param", param), slice(0, param.numel())
        found = self._optimizer._get_model_param_range_map(param)["param"]
        group, order = self._optimizer.model_param_group_index_map[param]
        return self._base.param_groups[group]["params"][order], slice(found.start, found.end)

    def _has_piece(self, param: torch.nn.Parameter) -> bool:
        return not self._sharded or param in self._optimizer.model_param_group_index_map

    def master(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The full fp32 weight. Collective."""
        return self._read(param, None)

    def moment(self, param: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The full `exp_avg` or `exp_avg_sq`, fp32. Collective."""
        return self._read(param, key)

    @torch.no_grad()
    def _read(self, param: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
        if self._has_piece(param):
            owner, where = self._piece(param)
            value = owner if key is None else self._base.state[owner][key]
            whole[where] = value.detach().float().reshape(-1)
        if self._sharded and dist.get_world_size(self._group) > 1:
            bits = whole.view(torch.int32)  # sums of bits, all but one of them 0: -0.0 stays what it is
            dist.all_reduce(bits, group=self._group)
        return whole.view(param.shape).cpu()

    @torch.no_grad()
    def set_weight(self, param: torch.nn.Parameter, weight: torch.Tensor, master: torch.Tensor) -> None:
        """Set the model's weight (any dtype) and its fp32 master. Both are the full tensor on every rank."""
        param.data.copy_(weight)
        self._write(param, None, master)

    def set_moment(self, param: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set the full `exp_avg` or `exp_avg_sq`."""
        self._write(param, key, value)

    @torch.no_grad()
    def _write(self, param: torch.nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        if not self._has_piece(param):
            return
        owner, where = self._piece(param)
        target = owner if key is None else self._base.state[owner][key]
        target.copy_(value.reshape(-1)[where].view(target.shape))

    @property
    def step(self) -> int:
        """Optimizer steps taken, as Adam's bias correction counts them (equal for all parameters)."""
        own = max((int(state["step"]) for state in self._base.state.values() if "step" in state), default=0)
        if not self._sharded:
            return own
        most = torch.tensor(own, device=next(iter(self._optimizer.model_param_gbuf_map)).device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)  # a rank may have no piece of anything
        return int(most)

    @step.setter
    def step(self, value: int) -> None:
        for state in self._base.state.values():
            # A tensor of its own for each parameter: a shared one would be advanced once per parameter.
            state["step"] = torch.full_like(state["step"], float(value))

    def rest(self) -> None:
        """Nothing: all of it stays on the device."""

    @torch.no_grad()
    def clamp(self, param: torch.nn.Parameter, low: float, high: float) -> None:
        """Clamp a parameter and its master to [low, high], without communication."""
        param.data.clamp_(low, high)
        if self._has_piece(param):
            self._piece(param)[0].clamp_(low, high)
