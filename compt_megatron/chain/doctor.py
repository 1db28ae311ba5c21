"""What this machine has and what is missing for what."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from compt_megatron import __version__

# distribution -> what it is needed for
_NEEDED = {
    "torch": "everything",
    "safetensors": "growing and converting",
    "megatron-core": "training",
    "psutil": "training (megatron-core's checkpoints)",
    "deepspeed": "training",
    "open_clip_torch": "tokenizers, image transforms, parity",
    "torchvision": "image transforms",
    "timm": "augmentation with use_timm",
    "webdataset": "reading shards",
    "tensorboard": "TensorBoard scalars",
    "matplotlib": "compt report",
    "emoji": "compt data emoji",
    "resvg-py": "compt data emoji",
    "pillow": "images",
    "tokenizers": "compt data text",
    "transformers": "parity of language models, and their tasks",
    "lm_eval": "compt eval --tasks, evaluate.harness in recipes",
    "zstandard": "compt data text (.zst)",
}
_EXTRA = {
    **dict.fromkeys(("emoji", "resvg-py"), "data"),
    **dict.fromkeys(("tokenizers", "transformers", "zstandard"), "llm"),
    "lm_eval": "eval",
}


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Versions, devices, collectives, memory and disk as plain data. `missing` says what to install for what.

    Sizes are bytes; `folder` is whose disk is measured (default: the working directory). Imports torch and, where
    there is CUDA, Transformer Engine if it is installed; nothing else.
    """
    import torch

    versions = {name: _version(name) for name in _NEEDED}
    missing = [
        {"package": name, "for": _NEEDED[name], "install": f"pip install 'compt-megatron[{_EXTRA.get(name, 'train')}]'"}
        for name, version in versions.items()
        if version is None
    ]
    folder = folder or Path.cwd()
    devices = _devices(torch)
    return {
        "compt_megatron": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "missing": missing,
        "devices": devices,
        "transformer_engine": _transformer_engine(bool(devices)),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "collectives": _collectives(torch),
        "disk": {"path": str(folder), "free": shutil.disk_usage(folder).free},
    }


def advice(found: dict[str, Any]) -> list[str]:
    """One line for everything that stands in the way, most important first."""
    lines = [
        f"{entry['package']} is missing, needed for {entry['for']}: {entry['install']}" for entry in found["missing"]
    ]
    if not found["devices"]:
        lines.append("no CUDA device: training runs on the CPU, which suits the demo and small models")
    elif "nccl" not in found["collectives"]:
        lines.append("this torch has no NCCL: several GPUs cannot train together; install a CUDA build of torch")
    if problem := found["transformer_engine"]["problem"]:
        lines.append(f"Transformer Engine cannot be imported ({problem}): blocks are made of torch's layers")
    if found["disk"]["free"] < 5 * 2**30:
        lines.append(f"{found['disk']['path']}: less than 5 GiB of disk free; checkpoints of large models will not fit")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": device.name, "memory": device.total_memory, "capability": f"{device.major}.{device.minor}"}
        for device in properties
    ]


def _transformer_engine(cuda: bool) -> dict[str, str | None]:
    """Its version, None where it is not installed, and why its import fails, if it does; tried only with CUDA."""
    found: dict[str, str | None] = {"version": None, "problem": None}
    if importlib.util.find_spec("transformer_engine") is None:
        return found
    found["version"] = _version("transformer_engine") or "unknown"
    if cuda:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # whatever a compiled extension may raise
            found["problem"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def _collectives(torch: Any) -> dict[str, str]:
    """Communication backends that this torch has, with NCCL's version."""
    found = {}
    if torch.distributed.is_available():
        if torch.distributed.is_gloo_available():
            found["gloo"] = "available"
        if torch.distributed.is_nccl_available() and torch.cuda.is_available():
            found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
