# SPDX-License-Identifier: Apache-2.0
"""Finds the CUDA toolkit to build with. No GPU is asked for, here or anywhere in the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PLACES = ("/usr/local/cuda",)  # where it is looked for beside CUDA_HOME, CUDA_PATH and PATH
CUDA_ARCHITECTURES = "8.0;9.0a;10.0a;12.0+PTX"  # in the form of TORCH_CUDA_ARCH_LIST

# torch.utils.cpp_extension adds these, which take conversions and operators of the 16-bit types away: other builds of
# the kernels add them too, so that all see one language.
TORCH_DEFINES = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)


def cuda_toolkit() -> Path | None:
    """Return the CUDA toolkit to build with, or None for a CPU build.

    A ``nvcc`` on PATH may be a wrapper script, so its folder counts only if the toolkit's headers are beside it.
    """
    wish = os.environ.get("DYNAMIC_MOE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"DYNAMIC_MOE_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *PLACES]
    places.append(str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    for place in filter(None, places):
        if (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include" / "cuda_runtime.h").exists():
            return Path(place)
    if wish == "1":
        raise RuntimeError("DYNAMIC_MOE_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to its folder")
    return None


def nvcc_version(toolkit: Path) -> str:
    """Return the release of a toolkit's compiler, e.g. ``13.0``."""
    output = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    if match is None:
        raise RuntimeError(f"cannot read the version of {toolkit}/bin/nvcc from {output!r}")
    return match[1]
