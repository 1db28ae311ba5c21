"""Compile the kernels, once for each state of their sources: for CUDA, and for the emulator that tests run them on.

`python -m compt_kernels.build` (or `make kernels`) compiles for CUDA ahead of the first use, and fails where registers
spill. Objects and libraries are cached under $COMPT_KERNELS_CACHE, else ~/.cache/compt_kernels, by the hash of what
they are made of.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from compt_kernels import ptxas

PACKAGE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100)  # the last one also as PTX, for devices that come later
STABLE_ABI = "0x020b000000000000"  # torch 2.11: what the library is compiled against, whatever torch is installed


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Toolchain:
    """How one kind of library is made: the compilers with their flags, and the sources beside the kernels."""

    name: str
    device_compiler: tuple[str, ...]  # for *.cu
    host_compiler: tuple[str, ...]  # for *.cpp
    linker: tuple[str, ...]
    extra_sources: tuple[Path, ...] = ()


def cuda_toolchain(architectures: Sequence[int] = ARCHITECTURES) -> Toolchain:
    """nvcc for the kernels, the C++ compiler for the registration. Raises BuildError where either is missing."""
    nvcc = find_nvcc()
    *older, newest = sorted(architectures)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in older]
    codes.append(f"-gencode=arch=compute_{newest},code=[sm_{newest},compute_{newest}]")
    device = (nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes)
    link = (nvcc, "-shared", "-cudart=static", *codes)
    return Toolchain("cuda", device, _host_compiler(), link)


def emulated_toolchain(*flags: str) -> Toolchain:
    """The C++ compiler for everything; `flags` are added for the kernels and the emulator (-fsanitize=...)."""
    cxx = _cxx()
    kernels = [
        "-x",
        "c++",
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-pthread",
        "-ffp-contract=off",
        "-Wall",
    ]
    kernels += ["-Wno-unknown-pragmas", "-DCOMPT_EMULATED", *flags]
    return Toolchain(
        "emulated",
        (cxx, *kernels),
        (*_host_compiler(), "-DCOMPT_EMULATED", *flags),
        (cxx, "-shared", "-pthread", *flags),
        (PACKAGE / "emulator" / "emulator.cpp",),
    )


def _host_compiler() -> tuple[str, ...]:
    include = Path(torch.__file__).parent / "include"
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}")
    return (_cxx(), *flags, f"-I{include}")


def _cxx() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if not found:
        raise BuildError("no C++ compiler: install g++, or set CXX to one")
    return found


def find_nvcc() -> str:
    """The CUDA compiler: of $CUDA_HOME, on the path, or where the toolkit installs itself."""
    candidates = [Path(os.environ["CUDA_HOME"], "bin", "nvcc")] if os.environ.get("CUDA_HOME") else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in candidates:
        if path.is_file():
            return str(path)
    raise BuildError("nvcc is missing: install the CUDA toolkit (12.8 or later), or set CUDA_HOME to where it is")


def sources(package: Path = PACKAGE) -> list[Path]:
    """Kernels and registrations, in a fixed order."""
    return sorted((package / "csrc").glob("*.cu")) + sorted((package / "csrc").glob("*_registration.cpp"))


def build(toolchain: Toolchain, package: Path = PACKAGE) -> Path:
    """Compile what has changed and link; returns the library. Raises BuildError with the compiler's message."""
    cache = cache_folder()
    with _lock(cache / "lock"):
        files = [*sources(package), *toolchain.extra_sources]
        with ThreadPoolExecutor(_jobs()) as pool:
            objects = list(pool.map(lambda file: compile_file(toolchain, file), files))
        lib = Path(torch.__file__).parent / "lib"
        command = [*toolchain.linker, *map(str, objects), f"-L{lib}", "-ltorch", "-ltorch_cpu"]
        digest = _digest([" ".join(toolchain.linker), *(o.stem for o in objects)])
        library = cache / f"libcompt_kernels_{toolchain.name}_{digest}.so"
        if not library.exists():
            _run_into(library, command)
    return library


def compile_file(toolchain: Toolchain, source: Path) -> Path:
    """One object file, from the cache where nothing it depends on has changed; the compiler's report lies beside it."""
    command = toolchain.device_compiler
    if source.suffix == ".cpp" and source.parent.name == "csrc":
        command = toolchain.host_compiler
    parts = [" ".join(command), _version(command[0])]
    parts += [f"{file.name}\n{file.read_text()}" for file in _with_includes(source)]
    target = cache_folder() / f"{source.stem}_{toolchain.name}_{_digest(parts)}.o"
    if not target.exists():
        report = _run_into(target, [*command, "-c", str(source)])
        report_of(target).write_text(report)
    return target


def spilled(toolchain: Toolchain) -> list[str]:
    """What the compiler says of kernels whose registers do not suffice, a line each; compiles what has changed."""
    reports = [report_of(compile_file(toolchain, source)) for source in sources() if source.suffix == ".cu"]
    return [
        f"{kernel.name} for {kernel.architecture} has a stack of {kernel.stack} bytes, spills {kernel.spill_stores} "
        f"and reads {kernel.spill_loads}"
        for report in reports
        for kernel in ptxas.kernels(report.read_text())
        if kernel.stack or kernel.spill_stores or kernel.spill_loads
    ]


def _with_includes(source: Path) -> list[Path]:
    """The file and all files of ours that it includes, directly or not."""
    found = [source.resolve()]
    for file in found:
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE)
        paths = [(file.parent / name).resolve() for name in names]
        found += [path for path in dict.fromkeys(paths) if path.is_file() and path not in found]
    return found


def report_of(compiled: Path) -> Path:
    """What the compiler said while it made this object (from nvcc: registers and spills of each kernel)."""
    return compiled.with_suffix(".log")


def _run_into(target: Path, command: list[str]) -> str:
    """Run a compiler so that its output file exists whole or not at all; returns what it said."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder, target.name)
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
        partial.replace(target)
    return done.stdout + done.stderr


def cache_folder() -> Path:
    """Where objects and libraries are kept; made if missing."""
    folder = Path(os.environ.get("COMPT_KERNELS_CACHE") or Path.home() / ".cache" / "compt_kernels")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _jobs() -> int:
    return max(1, int(os.environ.get("COMPT_KERNELS_JOBS") or os.cpu_count() or 1))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One build at a time on this machine: the ranks of a job would otherwise all compile."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def load_cuda() -> None:
    """Build if needed and register the CUDA kernels. Raises BuildError with the reason where that cannot be."""
    if torch.version.cuda is None:
        raise BuildError("this torch was built without CUDA")
    if not torch.cuda.is_available():
        raise BuildError("torch finds no CUDA device: a driver, or a device, is missing")
    torch.ops.load_library(str(build(cuda_toolchain())))


@functools.cache
def load_emulated() -> None:
    """Build if needed and register the same kernels, run by the emulator, for CPU tensors."""
    torch.ops.load_library(str(build(emulated_toolchain())))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compt_kernels.build", description=__doc__)
    parser.add_argument("--emulated", action="store_true", help="the library that tests run on the CPU")
    parser.add_argument("--architectures", default=",".join(map(str, ARCHITECTURES)), help="such as 90 or 80,90")
    options = parser.parse_args(arguments)
    try:
        architectures = [int(a) for a in options.architectures.split(",")]
        toolchain = emulated_toolchain() if options.emulated else cuda_toolchain(architectures)
        print(build(toolchain))
        bad = [] if options.emulated else spilled(toolchain)
    except BuildError as error:
        print(f"compt_kernels: {error}", file=sys.stderr)
        return 1
    for line in bad:
        print(f"compt_kernels: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
