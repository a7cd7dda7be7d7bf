# SPDX-License-Identifier: Apache-2.0
"""Which flags compile which source file; for C++ by the table ``csrc/common/isa_flags.txt``, which CMake reads too.

And where the objects lie.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


@functools.cache
def flag_table() -> dict[str, list[str]]:
    """Return ``isa_flags.txt``: ``base`` and the CPU levels, worst first, each with its flags."""
    lines = (CSRC / "common" / "isa_flags.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return {name: flags for name, *flags in rows}


@functools.cache
def compiled_levels() -> tuple[str, ...]:
    """Return the CPU levels that this compiler can compile for this processor family."""
    levels = [name for name in flag_table() if name != "base"]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("scalar",)
    return tuple(name for name in levels if accepts(flag_table()[name]))


def accepts(flags: list[str]) -> bool:
    """Tell whether the compiler knows `flags`."""
    command = [*compiler(), *flags, "-fsyntax-only", "-x", "c++", "-"]
    return not flags or subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def compiler() -> list[str]:
    """Return the C++ compiler that `torch.utils.cpp_extension` uses."""
    return shlex.split(os.environ.get("CXX", "c++"))


def level_of(source: Path) -> str | None:
    """Return the CPU level that a source belongs to, or None if it is compiled with the base flags."""
    match = re.fullmatch(r".*_cpu_(\w+?)\.cpp", source.name)
    levels = [name for name in flag_table() if name != "base"]
    return match[1] if match and match[1] in levels else None


def base_flags() -> list[str]:
    """Return the flags of every C++ file: optimized, without debug information, without this machine's paths."""
    flags = ["-O3", "-g0", "-DNDEBUG", "-fPIC", f"-ffile-prefix-map={ROOT}=dynamic_moe"]
    return [*flags, *flag_table()["base"], *(f"-DDYNAMIC_MOE_HAS_{name.upper()}=1" for name in compiled_levels())]


def cuda_flags() -> list[str]:
    """Return nvcc's flags for every CUDA file. Device code stays within C++17; ptxas says what each kernel takes."""
    host = ["-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=dynamic_moe"]
    return ["-O3", "-std=c++17", "-DNDEBUG", "-Xptxas=-v", *(f"-Xcompiler={flag}" for flag in host)]


def build_temp() -> Path:
    """Return where builds in the source tree keep their objects, as setuptools names it by default.

    Those of the CPU levels lie in its folder ``levels``, in the folders of their sources.
    """
    return ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
