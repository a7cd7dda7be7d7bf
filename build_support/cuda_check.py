# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for every architecture, looks into the machine code, and fails on what costs speed.

Needs nvcc and no GPU: ``make cuda-check``. Fails on

* any access to local memory, so on any spill;
* a hot loop of a tensor-core matmul without HMMA, LDSM and 16-byte asynchronous copies;
* a store of one or two bytes in the epilogue of an aligned matmul;
* more registers than the policy of the matmul (``csrc/grouped_matmul/policy.h``) says.

Writes ``docs/kernels.md``: what each kernel takes, and lower bounds on time that follow for two GPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import occupancy
import sass
from compile_flags import CSRC, ROOT, compiler, cuda_flags
from cuda_toolkit import TORCH_DEFINES, cuda_toolkit, nvcc_version
from kernel_report import write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
MAX_THREADS = b"\x04\x05\x0c\x00"  # EIATTR_MAX_THREADS in .nv.info: three 32-bit sizes follow


@dataclass(frozen=True)
class Tile:
    """Which matmul a tile kernel is, and what the policy says of it."""

    product: str
    math: str
    regime: str
    tile_m: int
    tile_n: int
    tile_k: int
    stages: int
    warps: int
    registers: int
    shared: int

    @property
    def is_tensor_core(self) -> bool:
        """Whether it multiplies on tensor cores."""
        return self.math != "float32"

    @property
    def needs_ldmatrix(self) -> bool:
        """Whether its fragments come by ldmatrix, which cannot transpose 32-bit elements."""
        return self.is_tensor_core and not (self.math == "tf32" and self.product == "weight gradient")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    arch: str
    name: str  # demangled
    threads: int
    registers: int
    shared: int  # static, and dynamic where the policy says it
    blocks: int
    tile: Tile | None
    loop_multiplying: int  # instructions of the hot loop: HMMA, or FFMA in exact float32
    loop_other: int
    findings: list[str]


Policies = dict[tuple[str, str, str], Tile]


def main() -> int:
    """Compile, check, report; return 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    parser.add_argument("--report", type=Path, help="default: docs/kernels.md if all architectures are checked")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args()
    toolkit = cuda_toolkit()
    if toolkit is None:
        sys.exit("cuda-check needs a CUDA toolkit: set CUDA_HOME to its folder")
    console = Console()
    sources = sorted(path for path in CSRC.rglob("*.cu"))
    policies = {arch: policy_table(arch) for arch in options.arch}
    kernels: list[Compiled] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.jobs) as pool,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("Compiling and reading", total=len(sources) * len(options.arch))
        jobs = {
            pool.submit(examine, toolkit, source, arch, Path(folder), policies[arch]): (source, arch)
            for source in sources
            for arch in options.arch
        }
        for job in as_completed(jobs):
            source, arch = jobs[job]
            kernels += job.result()
            progress.update(task, advance=1, description=f"{source.name} for {arch}")
    kernels.sort(key=lambda kernel: (kernel.name, ARCHITECTURES.index(kernel.arch)))
    failed = [kernel for kernel in kernels if kernel.findings]
    for kernel in failed:
        console.print(f"[red]{kernel.arch}[/red] {kernel.name}", highlight=False, markup=True)
        for finding in kernel.findings:
            console.print(f"    {finding}", highlight=False, markup=False)
    report = options.report
    if report is None and tuple(options.arch) == ARCHITECTURES:
        report = ROOT / "docs" / "kernels.md"
    if report is not None:
        write_report(report, kernels, nvcc_version(toolkit))
        console.print(f"Wrote {report}", highlight=False)
    names = len({kernel.name for kernel in kernels})
    console.print(f"cuda-check: {names} kernels, {len(kernels)} compiled, {len(failed)} with findings")
    return 1 if failed or not kernels else 0


def examine(toolkit: Path, source: Path, arch: str, folder: Path, policies: Policies) -> list[Compiled]:
    """Compile a file for one architecture and look at its kernels."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    virtual = arch.replace("sm_", "compute_")
    command = [toolkit / "bin" / "nvcc", *cuda_flags(), *TORCH_DEFINES, f"-I{CSRC}"]
    command += [f"-gencode=arch={virtual},code={arch}", "-cubin", source, "-o", cubin]
    run(command)
    usage = run([tool("cuobjdump"), "--dump-resource-usage", cubin])
    resources = {
        name: (int(registers), int(shared))
        for name, registers, shared in re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", usage)
    }
    if not resources:
        return []  # a file of host code
    threads = max_threads(cubin.read_bytes())
    code = list(sass.parse(run([tool("nvdisasm"), "-c", cubin])))
    names = demangle([kernel.name for kernel in code])
    return [
        judge(arch, kernel, names[kernel.name], threads.get(kernel.name, 1024), *resources[kernel.name], policies)
        for kernel in code
    ]


def judge(
    arch: str, kernel: sass.Kernel, name: str, threads: int, registers: int, shared: int, policies: Policies
) -> Compiled:
    """Apply the rules to one kernel."""
    findings = sass.local_memory_accesses(kernel)
    tile = tile_of(kernel.name, policies)
    multiplying = ("FFMA",) if tile is not None and not tile.is_tensor_core else sass.TENSOR
    loop = kernel.hot_loop(*multiplying)
    if tile is not None:
        shared += tile.shared
        if registers > tile.registers:
            findings.append(f"{registers} registers, the policy says at most {tile.registers}")
        if tile.regime != "unaligned":
            findings += sass.narrow_stores(kernel)
            if tile.is_tensor_core:
                missing = sass.missing_from_hot_loop(kernel)
                findings += [each for each in missing if tile.needs_ldmatrix or "LDSM" not in each]
    return Compiled(
        arch=arch,
        name=name,
        threads=threads,
        registers=registers,
        shared=shared,
        blocks=occupancy.blocks_per_sm(arch, threads, registers, shared),
        tile=tile,
        loop_multiplying=sass.count(loop, *multiplying),
        loop_other=len(loop) - sass.count(loop, *multiplying),
        findings=findings,
    )


def tile_of(mangled: str, policies: Policies) -> Tile | None:
    """Return what the policy says of a tile kernel, which carries its `TileConfig` in its name; None for others."""
    match = re.search(r"tile_kernel.*?TileConfigILNS_7ProductE(\d)ELNS_4MathE(\d)ELNS_6RegimeE(\d)E", mangled)
    if match is None:
        return None
    product = ("forward", "input gradient", "weight gradient")[int(match[1])]
    math = ("bfloat16", "float16", "tf32", "float32")[int(match[2])]
    regime = ("few rows", "some rows", "many rows", "weight gradient", "unaligned")[int(match[3])]
    return policies[product, math, regime]


def policy_table(arch: str) -> Policies:
    """Let the policy print itself and return the lines of one architecture, for each product."""
    program = '#include <iostream>\n#include "grouped_matmul/policy.h"\n'
    program += "int main() { dynamic_moe::print_policies(std::cout); }\n"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "policies.cpp", Path(folder) / "policies"
        source.write_text(program)
        run([*compiler(), "-std=c++20", f"-I{CSRC}", source, "-o", binary])
        return parse_policies(run([binary]), arch.rstrip("a"))


def parse_policies(text: str, arch: str) -> Policies:
    """Read what ``print_policies`` prints."""
    line = re.compile(
        r"^(\w+), (\w+), ([\w ]+): (\d+) x (\d+) x (\d+), (\d+) stages, (\d+) x (\d+) warps, "
        r"at most (\d+) registers, (\d+) blocks per SM, (\d+) bytes",
        re.MULTILINE,
    )
    policies = {}
    for match in line.finditer(text):
        if match[1] != arch:
            continue
        m, n, k, stages, warps_m, warps_n, registers, _, shared = map(int, match.groups()[3:])
        for product in ("forward", "input gradient", "weight gradient"):
            policies[product, match[2], match[3]] = Tile(
                product, match[2], match[3], m, n, k, stages, warps_m * warps_n, registers, shared
            )
    return policies


def max_threads(cubin: bytes) -> dict[str, int]:
    """Return the threads of a block by ``__launch_bounds__``, for each kernel of a cubin (64-bit ELF) that has them."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(number)]
    strings = sections[names][4]
    threads = {}
    for name_offset, _, _, _, offset, length in sections:
        start = strings + name_offset
        name = cubin[start : cubin.index(b"\0", start)].decode()
        at = cubin.find(MAX_THREADS, offset, offset + length) if name.startswith(".nv.info.") else -1
        if at >= 0:
            x, y, z = struct.unpack_from("<III", cubin, at + len(MAX_THREADS))
            threads[name.removeprefix(".nv.info.")] = x * y * z
    return threads


def demangle(names: list[str]) -> dict[str, str]:
    """Return readable names, without parameters and namespaces."""
    plain = run(["c++filt"], text="\n".join(names)).splitlines() if shutil.which("c++filt") else names
    return {name: shortened(text) for name, text in zip(names, plain, strict=True)}


def shortened(name: str) -> str:
    """Drop from a demangled name what every name has: the result, the namespaces, the parameters, the enums' casts."""
    name = re.sub(r"^void |dynamic_moe::|\(anonymous namespace\)::", "", name)
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:index]
            break
    enums = {
        "Product": ("forward", "input gradient", "weight gradient"),
        "Math": ("bfloat16", "float16", "tf32", "float32"),
        "Regime": ("few rows", "some rows", "many rows", "weight gradient", "unaligned"),
    }
    name = re.sub(r"\((Product|Math|Regime)\)(\d)", lambda match: enums[match[1]][int(match[2])], name)
    return re.sub(r"\(\w+\)(\d+)", r"\1", name).replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


def tool(name: str) -> str:
    """Return the path of a tool of the packages in ``requirements/cuda.txt``."""
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/*/bin/{name}"))
    if not found:
        sys.exit(f"cuda-check needs {name}: pip install -r requirements/cuda.txt")
    return str(found[-1])


def run(command: list[str | Path], text: str | None = None) -> str:
    """Run a command and return its output; a failure shows what it printed."""
    result = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
