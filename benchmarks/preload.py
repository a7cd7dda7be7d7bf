# SPDX-License-Identifier: Apache-2.0
"""The settings under which things are measured, as environments of worker processes."""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import dataclass

from benchmarks.compile import HERE, compile_shared_library
from benchmarks.machine import is_amd

ROOT = HERE.parent
KEEP_PAGES = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
GLIBC_KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 38), "MALLOC_TOP_PAD_": str(1 << 26)}


@dataclass(frozen=True)
class Setting:
    """One way to run the same code.

    Attributes
    ----------
    name : str
        "warm": an allocator that keeps its pages, so that no step pays for mapping them. "default": glibc's, as most
        programs run. "mkl": as "warm", with MKL made to take its fast path on a CPU that is not Intel's.
    allocator : str
        What it is, for people.
    environment : dict
        Variables to set.
    """

    name: str
    allocator: str
    environment: dict[str, str]


def settings(threads: int) -> dict[str, Setting]:
    """All settings that this machine offers, by name."""
    common = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path(), "ZENTORCH_LOG_LEVEL": "ERROR"}
    allocator, warm = _warm_allocator()
    found = {
        "warm": Setting("warm", allocator, common | warm),
        "default": Setting("default", "glibc, default", common),
    }
    if is_amd():
        found["mkl"] = Setting("mkl", allocator, common | warm | _preload(_mkl_shim(), warm.get("LD_PRELOAD")))
    return found


def _warm_allocator() -> tuple[str, dict[str, str]]:
    """Jemalloc without decay where it is installed (Debian: libjemalloc2), else glibc told to keep its memory."""
    library = os.environ.get("DYNAMIC_MOE_JEMALLOC") or ctypes.util.find_library("jemalloc")
    if library:
        return "jemalloc, no decay", {"LD_PRELOAD": library, "MALLOC_CONF": KEEP_PAGES}
    return "glibc, no mmap and no trim", dict(GLIBC_KEEP_PAGES)


def _mkl_shim() -> str:
    """MKL asks this function whether the CPU is Intel's before it takes its AVX-512 and AVX2 code for Intel."""
    return str(compile_shared_library(HERE / "mkl_shim.cpp", ["-O2"]))


def _preload(*libraries: str | None) -> dict[str, str]:
    return {"LD_PRELOAD": ":".join(library for library in libraries if library)}


def _python_path() -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def worker_environment(setting: Setting) -> dict[str, str]:
    """The full environment of a worker."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LD_PRELOAD", "MALLOC_"))}
    return inherited | setting.environment


def jemalloc_purge() -> None:
    """Give free pages back between cases; an allocator that never does would in the end hold the sum of all of them."""
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is not None:
        every_arena = b"arena.4096.purge"
        mallctl(every_arena, None, None, None, ctypes.c_size_t(0))
