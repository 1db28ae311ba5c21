"""megatron-core without CUDA: quiet, torch left as it is, random states tracked on the CPU generator."""

import os
import subprocess
import sys

import pytest
import torch

from compt_megatron.models.groups import ensure_groups, have_groups

SCRIPT = """
import torch
before = {name: id(value) for name, value in vars(torch.cuda).items() if callable(value)}
cuda, seed = torch.Tensor.cuda, torch.random.initial_seed()
from compt_megatron.models.build import build_model
from compt_megatron.spec.families import spec_from_config
vision = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "head_width": 4}
build_model(spec_from_config({"embed_dim": 2, "vision_cfg": vision}, "t"), recompute="full")
after = {name: id(value) for name, value in vars(torch.cuda).items() if callable(value)}
assert {name: after[name] for name in before} == before
assert torch.Tensor.cuda is cuda and torch.random.initial_seed() == seed
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed where there is CUDA")
def test_import_and_build_are_quiet_and_leave_torch_alone() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", SCRIPT], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


def test_groups_are_made_once() -> None:
    state = torch.get_rng_state()
    ensure_groups()
    group = torch.distributed.group.WORLD
    ensure_groups()
    assert have_groups()
    assert torch.distributed.group.WORLD is group
    assert torch.equal(torch.get_rng_state(), state), "making groups must not reseed the program"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the stand-in for the CUDA generator")
def test_random_state_tracker_works_on_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    ensure_groups()
    tracker = get_cuda_rng_tracker()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), expected), "the fork must not advance the ordinary generator"
    with tracker.fork():
        second = torch.rand(4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)
