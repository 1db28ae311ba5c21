"""Small modules trained by DeepSpeed itself, for the tests of its checkpoint formats.

Only names and shapes of a module matter to a checkpoint, so `Named` has those of any real one without its imports.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

LR = 1e-2


class _Leaf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows] -> the mean over the rows of a function of the parameters."""
        scaled = (p[..., None] * x for p in self._parameters.values())
        return sum(((value.square() + value).mean(-1).sum() for value in scaled), x.sum() * 0)


class Named(_Leaf):
    """A module whose parameters have the given names and shapes, and whose loss depends on all of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            at: nn.Module = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, _Leaf())
                at = at._modules[part]  # type: ignore[assignment]
            # DeepSpeed cannot broadcast 0-D parameters
            at.register_parameter(leaf, nn.Parameter(torch.randn(shape or (1,), generator=generator)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = _Leaf.forward(self, x)
        for module in self.modules():
            if module is not self and module._parameters:
                loss = loss + module(x)
        return loss


@dataclass(frozen=True)
class Case:
    """One DeepSpeed run. `groups`: of parameters, 2 for weight decay on matrices only; `config`: more of its JSON."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    stage: int
    dtype: str = "fp32"
    groups: int = 2
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


def engine_of(case: Case, **config: Any) -> Any:
    """A DeepSpeed engine of the case's module, on the process group that is there."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes a minute, training does without
    deepspeed.init_distributed("gloo", dist_init_required=False)
    module = Named(case.shapes)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(case.frozen) if case.frozen else True)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.1}]
    if case.groups == 2:
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **({case.dtype: {"enabled": True}} if case.dtype != "fp32" else {}),
        **case.config,
        **config,
    }
    optimizer = torch.optim.AdamW(groups, lr=LR)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def train(engine: Any, steps: range, rank: int, world: int) -> list[float]:
    """Losses of the whole batch. The batch of a step is the same for any number of ranks."""
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        rows = torch.linspace(0.05, 0.2, 6)[rank::world] * (1 + step % 3)
        loss = engine(rows.to(dtype))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def live_state(engine: Any, moments: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """What the engine holds in memory, gathered: kind -> parameter -> whole tensor. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "master": {}, "exp_avg": {}, "exp_avg_sq": {}}
    wrapped = engine.optimizer if hasattr(engine.optimizer, "fp32_groups") else None
    masters = {}
    if wrapped is not None:
        for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups):
            masters.update({id(p): copy for p, copy in zip(low, high)})
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if moments and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # so far the first group's states only
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            state["weight"][name] = p.detach().clone()
        if not p.requires_grad:
            continue
        if engine.zero_optimization_stage():
            state["master"][name] = safe_get_full_fp32_param(p).clone()
            for kind in ("exp_avg", "exp_avg_sq") if moments else ():
                state[kind][name] = safe_get_full_optimizer_state(p, kind).clone()
        else:
            owner = masters.get(id(p), p)
            state["master"][name] = owner.detach().clone()
            for kind in ("exp_avg", "exp_avg_sq") if moments else ():
                state[kind][name] = base.state[owner][kind].clone()
    return state


def step_of(engine: Any) -> float:
    """Optimizer steps taken, by the optimizer's own count."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    (count,) = {float(state["step"]) for state in base.state.values()}
    return count


def train_and_save(rank: int, world: int, folder: Path, cases: list[Case], steps: int, more: int) -> None:
    """Train every case for some steps and save it as FOLDER/NAME, and its state in memory as FOLDER/NAME.live: that of
    `live_state`, and `step`.

    Cases whose name ends in _universal train on, so that .live has the `losses` of `more` steps after that, and are
    converted by DeepSpeed's own tool, to FOLDER/NAME/universal.
    """
    for case in cases:
        engine = engine_of(case)
        train(engine, range(steps), rank, world)
        engine.save_checkpoint(str(folder / case.name), tag=f"global_step{steps}", client_state={"epoch": 3})
        live: dict[str, Any] = {**live_state(engine), "step": step_of(engine)}
        if case.name.endswith("_universal"):
            live["losses"] = train(engine, range(steps, steps + more), rank, world)
        engine.destroy()
        if rank == 0:
            torch.save(live, folder / f"{case.name}.live")
            if case.name.endswith("_universal"):
                _make_universal(folder / case.name, f"global_step{steps}")


def _make_universal(root: Path, tag: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    options |= {"input_folder": str(root / tag), "output_folder": str(root / "universal"), "inject_missing_state": True}
    ds_to_universal.main(Namespace(**options))


def load_and_train(
    rank: int, world: int, jobs: list[tuple[Case, Path]], steps: range, weights_only: bool = False
) -> list[dict[str, Any]]:
    """Load a universal checkpoint into every case. Rank 0 returns what is in memory then (`live_state`) and, unless
    `weights_only`, the optimizer's step and the losses of more steps. The parameter groups' settings must stay."""
    found = []
    for case, folder in jobs:
        engine = engine_of(case, checkpoint={"load_universal": case.stage > 0})
        before = [group["weight_decay"] for group in engine.optimizer.param_groups]
        path, _ = engine.load_checkpoint(str(folder), load_module_only=weights_only)
        assert path is not None
        assert before == [group["weight_decay"] for group in engine.optimizer.param_groups]
        live: dict[str, Any] = dict(live_state(engine, moments=not weights_only))
        if not weights_only:
            live |= {"step": step_of(engine), "global_steps": engine.global_steps}
            if case.stage == 3:  # DeepSpeed gives all groups one and the same count, which each would advance
                for state in engine.optimizer.optimizer.state.values():
                    state["step"] = state["step"].clone()
            if engine.lr_scheduler is not None:  # it knows where it is, but says so to the optimizer when it moves
                engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
            live["losses"] = train(engine, steps, rank, world)
        engine.destroy()
        found.append(live)
    return found if rank == 0 else []
