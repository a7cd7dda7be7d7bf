# SPDX-License-Identifier: Apache-2.0
"""Makes a default build, looks into the machine code of every CUDA kernel, and fails on what costs speed.

Needs nvcc and no GPU: ``make cuda-check``. Fails on

* any access to local memory, so on any spill;
* a hot loop of a tensor-core matmul without HMMA, LDSM and 16-byte asynchronous copies;
* a store of one or two bytes in the epilogue of an aligned matmul;
* more registers than the policy of the matmul (``csrc/grouped_matmul/policy.h``) says;
* a device from compute capability 8.0 on that can run neither machine code nor PTX of an object.

Writes ``docs/kernels.md``: what each kernel takes, and lower bounds on time that follow for two GPUs. The page names a
hash of what it depends on; ``--if-changed`` does nothing where that is still the same.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
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
from compile_flags import CSRC, ROOT, build_temp, compiler, cuda_flags
from cuda_toolkit import cuda_architectures, cuda_toolkit, nvcc_version
from device_code import DEVICES, Target, code_of, targets, without_code
from kernel_report import write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PAGE = ROOT / "docs" / "kernels.md"
CHECKERS = ("compile_flags.py", "cuda_check.py", "device_code.py", "occupancy.py", "sass.py")
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


@dataclass(frozen=True)
class Object:
    """A compiled file: its kernels on every architecture, and what it holds code for."""

    source: Path
    kernels: list[Compiled]
    cubins: set[Target]
    ptx: set[Target]


Policies = dict[tuple[str, str, str], Tile]


def main() -> int:
    """Compile, check, report; return 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", help="such as 8.0 or 12.0+PTX; default: those of a default build")
    parser.add_argument("--report", type=Path, help="default: docs/kernels.md if --arch is not given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers, then readers, at once")
    parser.add_argument("--if-changed", action="store_true", help="only if docs/kernels.md is of another state")
    options = parser.parse_args()
    toolkit = cuda_toolkit()
    if toolkit is None:
        sys.exit("cuda-check needs a CUDA toolkit: set CUDA_HOME to its folder")
    console = Console()
    architectures = ";".join(options.arch or []) or cuda_architectures(toolkit)
    state = state_of(architectures, nvcc_version(toolkit))
    if options.if_changed and f"`{state}`" in PAGE.read_text():
        console.print("cuda-check: nothing has changed since docs/kernels.md was written", highlight=False)
        return 0
    objects = examine_all(build_all(architectures, options.jobs), options.jobs, console)
    kernels = [kernel for each in objects for kernel in each.kernels]
    kernels.sort(key=lambda kernel: (kernel.name, int(kernel.arch.strip("sm_af"))))
    failed = [kernel for kernel in kernels if kernel.findings]
    for kernel in failed:
        console.print(f"[red]{kernel.arch}[/red] {kernel.name}", highlight=False, markup=True)
        for finding in kernel.findings:
            console.print(f"    {finding}", highlight=False, markup=False)
    lacking = [] if options.arch else [each for each in objects if without_code(each.cubins, each.ptx)]
    for each in lacking:
        devices = ", ".join(without_code(each.cubins, each.ptx))
        console.print(f"{each.source.name}: no code for devices of compute capability {devices}", highlight=False)
    report = options.report or (None if options.arch else PAGE)
    if report is not None:
        write_report(report, kernels, code_by_device(objects), nvcc_version(toolkit), state)
        console.print(f"Wrote {report}", highlight=False)
    names = len({kernel.name for kernel in kernels})
    console.print(
        f"cuda-check: {names} kernels for {architectures}, {len(kernels)} compiled, {len(failed)} with findings; "
        f"{len(objects)} objects, {len(lacking)} without code for some device",
        highlight=False,
    )
    return 1 if failed or lacking or not kernels else 0


def state_of(architectures: str, nvcc: str) -> str:
    """Return a hash of all that the machine code and its judgement depend on."""
    waiting = [*CSRC.rglob("*.cu"), *(Path(__file__).parent / name for name in CHECKERS)]
    files: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            included = re.findall(r'^\s*#include "(.+)"', path.read_text(), re.MULTILINE)
            waiting += [CSRC / name for name in included if (CSRC / name).exists()]
    state = hashlib.sha256(f"{architectures} {nvcc} {' '.join(cuda_flags())}".replace(str(ROOT), "").encode())
    for path in sorted(files):
        state.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return state.hexdigest()[:16]


def build_all(architectures: str, jobs: int) -> list[Path]:
    """Build the extension where ``make wheel`` builds it, which then finds the work done; return the CUDA objects."""
    environment = os.environ | {
        "TORCH_CUDA_ARCH_LIST": architectures,
        "DYNAMIC_MOE_CUDA": "1",
        "MAX_JOBS": str(jobs),
    }
    subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environment, check=True)
    return [(build_temp() / source.relative_to(ROOT)).with_suffix(".o") for source in sorted(CSRC.rglob("*.cu"))]


def examine_all(built: list[Path], jobs: int, console: Console) -> list[Object]:
    """Look into every CUDA object; those of host code only are left out."""
    objects = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ThreadPoolExecutor(jobs) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("Reading", total=len(built))
        waiting = {pool.submit(examine, path): path for path in built}
        for job in as_completed(waiting):
            if job.result().kernels:
                objects.append(job.result())
            progress.update(task, advance=1, description=waiting[job].name)
    return objects


def code_by_device(objects: list[Object]) -> dict[str, str | None]:
    """Return what each device runs; None where it has no code for one of the objects."""
    runs: dict[str, str | None] = {}
    for device in DEVICES:
        codes = {code_of(device, each.cubins, each.ptx) for each in objects}
        runs[device] = None if None in codes else ", ".join(sorted(map(str, codes)))
    return runs


def examine(built: Path) -> Object:
    """Look at the kernels of an object, on each architecture."""
    cubins = run([tool("cuobjdump"), "--list-elf", built])
    ptx = run([tool("cuobjdump"), "--list-ptx", built])
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        run([tool("cuobjdump"), "--extract-elf", "all", built], folder=Path(folder))
        for name, arch in re.findall(r": +(\S+\.(sm_\w+)\.cubin)$", cubins, re.MULTILINE):
            kernels += examine_cubin(Path(folder) / name, arch)
    return Object(built.with_suffix(".cu"), kernels, targets(cubins), targets(ptx))


def examine_cubin(cubin: Path, arch: str) -> list[Compiled]:
    """Look at the kernels of a file on one architecture."""
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
    policies = policy_table(arch)
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
    """Return the policy's lines of one architecture, for each product."""
    return parse_policies(printed_policies(), arch)


@functools.cache
def printed_policies() -> str:
    """Let the policy print itself."""
    program = '#include <iostream>\n#include "grouped_matmul/policy.h"\n'
    program += "int main() { dynamic_moe::print_policies(std::cout); }\n"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "policies.cpp", Path(folder) / "policies"
        source.write_text(program)
        run([*compiler(), "-std=c++20", f"-I{CSRC}", source, "-o", binary])
        return run([binary])


def parse_policies(text: str, arch: str) -> Policies:
    """Read what ``print_policies`` prints of an architecture, or of the last one before it that has its own lines."""
    line = re.compile(
        r"^sm_(\d+), (\w+), ([\w ]+): (\d+) x (\d+) x (\d+), (\d+) stages, (\d+) x (\d+) warps, "
        r"at most (\d+) registers, (\d+) blocks per SM, (\d+) bytes",
        re.MULTILINE,
    )
    lines = list(line.finditer(text))
    own = max(int(match[1]) for match in lines if int(match[1]) <= int(arch.strip("sm_af")))
    policies = {}
    for match in lines:
        if int(match[1]) != own:
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


def run(command: list[str | Path], text: str | None = None, folder: Path | None = None) -> str:
    """Run a command and return its output; a failure shows what it printed."""
    result = subprocess.run(
        list(map(str, command)), input=text, cwd=folder, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
