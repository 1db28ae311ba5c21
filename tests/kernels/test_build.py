"""The kernels compile without spilling registers, once, and say what is missing where it is."""

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


ARCHITECTURES = (90,)  # one of those that `make kernels` compiles for, and checks: each takes half a minute
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc; this machine has none")


@needs_nvcc
@pytest.mark.timeout(900)
def test_no_kernel_spills() -> None:
    """Every .cu; the objects are those that are linked below."""
    toolchain = build.cuda_toolchain(ARCHITECTURES)
    found = []
    for source in build.sources():
        if source.suffix == ".cu":
            kernels = ptxas.kernels(build.report_of(build.compile_file(toolchain, source)).read_text())
            defined = len(re.findall(r"__global__", source.read_text()))
            architectures = {kernel.architecture for kernel in kernels}
            assert not defined or architectures == {f"sm_{a}" for a in ARCHITECTURES}, source.name
            found += kernels
    assert found
    assert build.spilled(toolchain) == []


@needs_nvcc
@pytest.mark.timeout(900)
def test_the_library_loads_without_a_gpu() -> None:
    """Whatever torch is installed: one library on torch's stable ABI, whose one CUDA symbol of torch is weak."""
    library = build.build(build.cuda_toolchain(ARCHITECTURES))
    torch.ops.load_library(str(library))
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.search(r" w aoti_torch_get_current_cuda_stream", symbols)
    foreign = [s for s in re.findall(r" U (\S+)", symbols) if re.match(r"_ZN\w*(2at|3c10|5torch)\d", s)]
    assert not foreign, foreign  # C++ symbols of torch are not stable


SPILLS = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_a_report_of_spills_is_read() -> None:
    assert ptxas.kernels(SPILLS) == [ptxas.Kernel("_Z1kv", "sm_90", 255, 8, 4, 12)]
    with pytest.raises(ValueError, match="no figures"):
        ptxas.kernels(SPILLS.replace("Used", ""))


def test_a_build_with_spills_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that makes nothing and reports what ptxas would."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nfor target; do :; done; touch $target\ncat <<'END'\n{SPILLS}\nEND\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("COMPT_KERNELS_CACHE", str(tmp_path / "cache"))
    command = (str(compiler),)
    monkeypatch.setattr(build, "cuda_toolchain", lambda _: build.Toolchain("cuda", command, command, command))
    assert build.main(["--architectures", "90"]) == 1
    assert "_Z1kv for sm_90 has a stack of 8 bytes, spills 4 and reads 12" in capsys.readouterr().err


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
