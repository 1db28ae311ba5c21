"""The kernels compile for every architecture without spilling registers, once, and say what is missing where it is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from compt_kernels import build, ptxas


def nvcc() -> str | None:
    try:
        return build.find_nvcc()
    except build.BuildError:
        return None


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc; this machine has none")


@needs_nvcc
@pytest.mark.timeout(900)
def test_no_kernel_spills_on_any_architecture() -> None:
    """Every .cu for every target, as `make kernels` compiles it; the objects are those that it links."""
    toolchain = build.cuda_toolchain()
    found = []
    for source in build.sources():
        if source.suffix == ".cu":
            kernels = ptxas.kernels(build.report_of(build.compile_file(toolchain, source)).read_text())
            defined = len(re.findall(r"__global__", source.read_text()))
            architectures = {kernel.architecture for kernel in kernels}
            assert not defined or architectures == {f"sm_{a}" for a in build.ARCHITECTURES}, source.name
            found += kernels
    assert found
    bad = [kernel for kernel in found if kernel.stack or kernel.spill_stores or kernel.spill_loads]
    assert not bad, bad


@needs_nvcc
@pytest.mark.timeout(900)
def test_the_library_loads_without_a_gpu() -> None:
    """Whatever torch is installed: one library on torch's stable ABI, whose one CUDA symbol of torch is weak."""
    library = build.build(build.cuda_toolchain())
    torch.ops.load_library(str(library))
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.search(r" w aoti_torch_get_current_cuda_stream", symbols)
    foreign = [s for s in re.findall(r" U (\S+)", symbols) if re.match(r"_ZN\w*(2at|3c10|5torch)\d", s)]
    assert not foreign, foreign  # C++ symbols of torch are not stable


def test_a_report_of_spills_is_read() -> None:
    report = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
    assert ptxas.kernels(report) == [ptxas.Kernel("_Z1kv", "sm_90", 255, 8, 4, 12)]
    with pytest.raises(ValueError, match="no figures"):
        ptxas.kernels(report.replace("Used", ""))


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.Path, "is_file", lambda self: False)
    with pytest.raises(build.BuildError, match=r"nvcc is missing: .*CUDA_HOME"):
        build.find_nvcc()
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.emulated_toolchain()
    if not torch.cuda.is_available():
        with pytest.raises(build.BuildError, match="CUDA"):
            build.load_cuda()


def test_compiles_once_a_state_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPT_KERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "part.h").write_text("#pragma once\nconstexpr int PART = 1;\n")
    source = tmp_path / "whole.cu"
    source.write_text('#include "part.h"\nextern "C" int whole() { return PART; }\n')
    toolchain = build.emulated_toolchain("-O0")
    first = build.compile_file(toolchain, source)
    made = first.stat().st_mtime_ns
    assert build.compile_file(toolchain, source) == first
    assert first.stat().st_mtime_ns == made
    (tmp_path / "part.h").write_text("#pragma once\nconstexpr int PART = 2;\n")
    assert build.compile_file(toolchain, source) != first
    source.write_text("int whole() { return missing; }\n")
    with pytest.raises(build.BuildError, match="was not declared"):
        build.compile_file(toolchain, source)
