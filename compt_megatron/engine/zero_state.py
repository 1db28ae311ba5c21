"""Full-tensor access to what DeepSpeed partitions: fp32 master weights, Adam's moments and step, at any ZeRO stage.

DeepSpeed keeps them in four shapes, and each has its own rules:

- stage 0, fp32: the parameters themselves, states in the base optimizer under the parameter;
- stage 0, bf16: fp32 copies in `FP16_UnfusedOptimizer`, which takes one step on zero gradients while it is built, so
  whoever loads must set every state, the step included;
- stages 1 and 2: flat fp32 partitions, one per parameter group, linked to the parameters as fragments;
- stage 3: every parameter is cut over the ranks, padded to equal pieces, model weights included.

Reading is collective (every rank gets the full tensor); writing is local (every rank passes the full tensor).
"""

from __future__ import annotations

from typing import Any

import torch

from compt_megatron.engine.run_checkpoint import MOMENTS


class ZeroState:
    """The optimizer state of one DeepSpeed engine, one parameter at a time."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._optimizer = engine.optimizer
        self._base = base
        self._sharded = engine.zero_optimization_stage() == 3
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
        grouped = [tensor for group in self._base.param_groups for tensor in group["params"]]
        # Stage 3 hands its flat sub-groups to the base optimizer at each step only.
        for tensor in self._optimizer.fp32_partitioned_groups_flat if self._sharded else grouped:
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
            return self._optimizer.get_full_hp_param(param, key).detach().cpu()
        if hasattr(param, "_hp_mapping"):
            return param.get_full_hp_param(key).detach().cpu()  # type: ignore[attr-defined]
        owner = self._copies.get(id(param), param)
        value = owner if key is None else self._base.state[owner][key]
        return value.detach().float().cpu()

    @torch.no_grad()
    def set_weight(self, param: torch.nn.Parameter, weight: torch.Tensor, master: torch.Tensor) -> None:
        """Set the model's weight (any dtype) and its fp32 master. Both are the full tensor on every rank."""
        if not self._sharded:
            param.data.copy_(weight)
        else:
            piece = param.ds_tensor  # type: ignore[attr-defined]
            piece.data.copy_(self._piece(param, weight, piece.numel()))
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
            pieces = param.ds_tensor.numel()  # type: ignore[attr-defined]
            self._optimizer.set_local_hp_param(self._piece(param, value, pieces), param, key)
        elif hasattr(param, "_hp_mapping"):
            param.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        elif id(param) in self._copies or key is not None:
            owner = self._copies.get(id(param), param)
            (owner.data if key is None else self._base.state[owner][key]).copy_(value)

    def _piece(self, param: torch.nn.Parameter, value: torch.Tensor, numel: int) -> torch.Tensor:
        """This rank's piece of a full tensor, zero-padded as stage 3 pads it."""
        rank = self._optimizer._get_param_partition_rank(param)
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
            param.ds_tensor.data.clamp_(low, high)  # type: ignore[attr-defined]
            self._optimizer._get_fp32_opt_state_partition(param, release_swap_buffers=False)[0].clamp_(low, high)
        elif hasattr(param, "_hp_mapping"):
            if param._hp_mapping is not None:
                param._hp_mapping.get_hp_fragment().clamp_(low, high)  # type: ignore[union-attr]
        elif id(param) in self._copies:
            self._copies[id(param)].data.clamp_(low, high)
