"""Makes a CUDA-built torchvision importable beside a CPU-only torch; the one place where this is done.

The torchvision that package registries serve is built for CUDA. Beside a CPU torch its import fails with "operator
torchvision::nms does not exist", because the C++ library that defines the operator is not loaded, and open_clip and
timm fail with it. Declaring the two operators' schemas is enough: all transforms and models work, only calling
the C++ operators themselves raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_library = None  # the schemas live as long as this object


def ensure_torchvision_if_installed() -> None:
    """Where torchvision is not installed, nothing; otherwise as `ensure_torchvision`."""
    if importlib.util.find_spec("torchvision") is not None:
        ensure_torchvision()


def ensure_torchvision() -> None:
    """Import torchvision, declaring its missing operators first if this torch has no CUDA. Safe to call repeatedly."""
    global _library
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
