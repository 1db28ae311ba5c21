"""Workers' messages: what they say comes through, what would run something does not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.contract import Layout, TensorInfo
from compt_megatron.checkpoint.messages import function_of, name_of, packed, unpacked
from compt_megatron.growth.api import grow
from tests.unit.lm_helpers import llama, make_spec


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_plain_values_and_records_come_through() -> None:
    value = {
        "boxes": [((0, 1), (2, 3)), slice(0, 4)],
        "info": TensorInfo((2, 3), torch.bfloat16),
        "path": Path("a/b"),
        "layout": Layout(2, 1),
        "spec": make_spec(llama()),
        "more": (None, True, 1.5, b"x", {"y"}, torch.Size([2])),
    }
    assert unpacked(packed(value)) == value
    assert function_of(name_of(grow)) is grow


@pytest.mark.parametrize("function", [os.system, eval, getattr, grow, torch.load])
def test_nothing_is_called(function: Any, tmp_path: Path) -> None:
    """Neither the system's functions nor this package's own."""
    with pytest.raises(pickle.UnpicklingError, match="a worker's message asks for"):
        unpacked(pickle.dumps(Runs(function, str(tmp_path / "x"), "y")))
