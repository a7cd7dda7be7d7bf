# SPDX-License-Identifier: Apache-2.0
"""Finds the CUDA toolkit to build with. No GPU is asked for, here or anywhere in the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PLACES = ("/usr/local/cuda",)  # where it is looked for beside CUDA_HOME, CUDA_PATH and PATH

# Compute capabilities that get machine code: the first of each major number, whose code later minor numbers run. No
# instruction of the kernels needs the "a" targets, whose code runs on one capability alone.
CAPABILITIES = ("8.0", "9.0", "10.0", "11.0", "12.0")


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


def cuda_architectures(toolkit: Path) -> str:
    """Return what a toolkit compiles for by default, in the form of TORCH_CUDA_ARCH_LIST: every device from 8.0 on."""
    command = [toolkit / "bin" / "nvcc", "--list-gpu-arch"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return architecture_list(set(re.findall(r"^compute_(\d+)$", output, re.MULTILINE)))


def architecture_list(known: set[str]) -> str:
    """Choose among the capabilities that nvcc knows, such as ``90``.

    PTX, which the driver compiles for any device above, goes with the last one before each that nvcc does not know, so
    for devices newer than the toolkit, too; and with 8.0, because integrated devices (Jetson Orin, 8.7) are promised no
    machine code but their own.
    """
    names = []
    for capability, following in zip(CAPABILITIES, (*CAPABILITIES[1:], ""), strict=True):
        if capability.replace(".", "") in known:
            needs_ptx = capability == CAPABILITIES[0] or following.replace(".", "") not in known
            names.append(capability + ("+PTX" if needs_ptx else ""))
    if not names:
        raise RuntimeError(f"nvcc must know one of the compute capabilities {', '.join(CAPABILITIES)}, got {known}")
    return ";".join(names)


def nvcc_version(toolkit: Path) -> str:
    """Return the release of a toolkit's compiler, e.g. ``13.0``."""
    output = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    if match is None:
        raise RuntimeError(f"cannot read the version of {toolkit}/bin/nvcc from {output!r}")
    return match[1]
