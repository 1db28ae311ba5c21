"""Programs without torch that run kernels on the emulator: with any compiler flags, and with planted faults."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compt_kernels.build import PACKAGE, compile_file, emulated_toolchain

HERE = Path(__file__).parent
PLAIN: tuple[str, ...] = ()
ADDRESS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-g1", "-fsanitize=thread", "-DEMULATOR_THREADS")


@dataclass(frozen=True)
class Fault:
    """A change of one place of one source that a test must notice."""

    file: str
    old: str
    new: str


def program(
    folder: Path, harness: str, kernels: Sequence[str], flags: Sequence[str] = PLAIN, fault: Fault | None = None
) -> Path:
    """The executable of tests/kernels/`harness` with `kernels` of csrc/ and the emulator, compiled where changed."""
    toolchain = emulated_toolchain(*flags)
    package = PACKAGE
    if fault is not None:
        package = folder / "package"
        for part in ("csrc", "emulator"):
            shutil.copytree(PACKAGE / part, package / part)
        source = package / "csrc" / fault.file
        text = source.read_text()
        assert text.count(fault.old) == 1, f"{fault.file} has {fault.old!r} {text.count(fault.old)} times"
        source.write_text(text.replace(fault.old, fault.new))
    sources = [package / "csrc" / name for name in kernels]
    sources += [package / "emulator" / "emulator.cpp", HERE / harness]
    objects = [str(compile_file(toolchain, source)) for source in sources]
    target = folder / "program"
    linker = [flag for flag in toolchain.linker if flag != "-shared"]
    subprocess.run([*linker, *objects, "-o", str(target)], check=True)
    return target


def run(target: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a program; a report of a sanitizer ends it with a status that is not 0."""
    env = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run([str(target), *arguments], capture_output=True, text=True, timeout=timeout, env=env)
    if "unexpected memory mapping" in done.stderr:  # ThreadSanitizer of older compilers under newer kernels
        command = ["setarch", "-R", str(target), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    return done
