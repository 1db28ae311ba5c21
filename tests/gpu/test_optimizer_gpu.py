"""LAMB and apex's optimizers on one GPU, against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compt_megatron.engine.apex_optimizer import have_apex
from compt_megatron.engine.optimizer import build_optimizer
from tests.unit.lamb_reference import decays, error, gradient, references, settings, start, take_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]
needs_apex = pytest.mark.skipif(not have_apex(), reason="needs NVIDIA apex with amp_C; this machine has it not")


@pytest.mark.parametrize(
    ("name", "implementation", "says"),
    [
        ("lamb", "torch", "LAMB in torch"),
        ("adamw", "auto", "AdamW in torch, fused"),
        pytest.param("lamb", "auto", "apex's FusedLAMB", marks=needs_apex),
        pytest.param("adamw", "apex", "apex's FusedAdam", marks=needs_apex),
    ],
)
def test_steps_on_cuda(name: str, implementation: Any, says: str) -> None:
    params = {key: torch.nn.Parameter(param.detach().cuda()) for key, param in start().items()}
    optimizer = build_optimizer(params.items(), settings(name=name, implementation=implementation), decays)
    assert optimizer.implementation == says
    wanted = references({key: param.cpu() for key, param in params.items()})
    for reference in wanted.values():
        reference.trust = reference.trust and name == "lamb"
    for step in range(5):
        take_step(optimizer, params, step)
        for key, reference in wanted.items():
            reference.step(gradient(key, step))
            assert error(params[key].cpu(), reference.weight) < 5e-6, (step, key)
