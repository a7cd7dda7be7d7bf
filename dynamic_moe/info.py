# SPDX-License-Identifier: Apache-2.0
"""What is installed and what it runs on: ``python -m dynamic_moe.info``, for bug reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from dynamic_moe import _C, _gpu_record


class Gpu(TypedDict):
    """A CUDA device that torch sees."""

    name: str
    compute_capability: str
    memory_gib: float


class Info(TypedDict):
    """Everything that a bug report needs; see `collect`."""

    dynamic_moe: _C.BuildInfo
    python: str
    torch: str
    torch_cuda: str | None
    os: str
    processor: str
    cpus: int
    threads: int
    cpu_isa: str
    supported_cpu_isas: list[str]
    amx_tiles: _C.AmxTiles
    gpus: list[Gpu]
    gpu_record: _gpu_record.GpuRecord | None


def collect(ask_for_tiles: bool = False) -> Info:
    """Return the versions, the CPU level in use, and the devices that torch sees.

    Parameters
    ----------
    ask_for_tiles : bool, default False
        Ask Linux for the AMX tiles, as the first bfloat16 product does, if nothing has yet and the processor has them.
        A grant cannot be given back, and from then on alternate signal stacks without room for the tiles fail.

    Returns
    -------
    Info
        Plain values that ``json.dumps`` takes. ``dynamic_moe`` is what the native part was built with; ``cpus`` counts
        the processors that this process may use and ``threads`` those that torch uses. ``amx_tiles["state"]`` is "not
        in this build", "not on this processor", "not saved by this operating system", "not asked for yet", "granted"
        or "refused", the last with a ``reason``. ``gpu_record`` is where `make gpu-check` has
        passed, or None.
    """
    return {
        "dynamic_moe": _C.build_info(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "os": platform.platform(),
        "processor": processor_name(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _C.cpu_isa(),
        "supported_cpu_isas": _C.supported_cpu_isas(),
        "amx_tiles": _C.amx_tiles(ask_for_tiles),
        "gpus": [gpu(index) for index in range(torch.cuda.device_count())],
        "gpu_record": _gpu_record.read(),
    }


def gpu(index: int) -> Gpu:
    """Describe the CUDA device number `index`."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def processor_name() -> str:
    """Return the processor's name as Linux knows it, or its family where there is no such thing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def usable_cpus() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tiles_text(info: Info) -> str:
    """Say whether AMX tiles may be used, and what follows for bfloat16."""
    tiles = info["amx_tiles"]
    if tiles["state"] != "refused":
        return tiles["state"]
    follows = f"; bfloat16 at {tiles['bfloat16_isa_when_refused']}, or an error where amx was forced"
    return f"refused: {tiles['reason']}" + (follows if info["cpu_isa"] == "amx" else "")


def record_text(info: Info) -> str:
    """Say on which device `make gpu-check` has passed."""
    record = info["gpu_record"]
    if record is None:
        return "no GPU yet: no passed run of make gpu-check is recorded"
    return (
        f"{record['device']} (compute capability {record['compute_capability']}), {record['date']}, "
        f"commit {record['commit']}, torch {record['torch']}, CUDA {record['cuda']}"
    )


def as_text(info: Info) -> str:
    """Lay `info` out for people."""
    build = info["dynamic_moe"]
    architectures = ", ".join(build["cuda_architectures"])
    gpus = [
        f"{each['name']} (compute capability {each['compute_capability']}, {each['memory_gib']} GiB)"
        for each in info["gpus"]
    ]
    rows = {
        "dynamic_moe": f"{build['version']} ({build['compiler']}, for torch >= {build['torch_target']})",
        "Python": info["python"],
        "torch": info["torch"] + (f" (CUDA {info['torch_cuda']})" if info["torch_cuda"] else " (without CUDA)"),
        "OS": info["os"],
        "processor": f"{info['processor']}, {info['cpus']} usable",
        "threads": str(info["threads"]),
        "CPU level": f"{info['cpu_isa']} (supported here: {', '.join(info['supported_cpu_isas'])})",
        "AMX tiles": tiles_text(info),
        "CUDA kernels": f"for {architectures} (CUDA {build['cuda']})" if architectures else "none in this build",
        "confirmed on": record_text(info),
        "GPU": "; ".join(gpus) or "none seen",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what `collect` finds, as text or as JSON; asks for the AMX tiles, since this process ends here."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_moe.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    info = collect(ask_for_tiles=True)
    print(json.dumps(info, indent=2) if options.json else as_text(info))


if __name__ == "__main__":
    main()
