# SPDX-License-Identifier: Apache-2.0
"""Writes ``docs/kernels.md`` from what ``cuda_check.py`` found in the machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from device_code import DEVICES

if TYPE_CHECKING:
    from cuda_check import Compiled, Tile

ISSUE_SLOTS = 4  # of a multiprocessor per clock, each one instruction of a warp


@dataclass(frozen=True)
class Gpu:
    """Published figures. Peaks are dense, at boost clock, in FLOP/s."""

    name: str
    arch: str
    sms: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    peaks: dict[str, float]


# Sources: NVIDIA A100 Tensor Core GPU Architecture (2020), NVIDIA H100 Tensor Core GPU Architecture (2022), datasheets.
GPUS = (
    Gpu(
        "A100 80 GB SXM",
        "sm_80",
        108,
        1.41e9,
        2.039e12,
        {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    ),
    Gpu(
        "H100 80 GB SXM",
        "sm_90",
        132,
        1.83e9,
        3.35e12,
        {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    ),
)


@dataclass(frozen=True)
class Problem:
    """A grouped product: rows of E groups of equal size, gathered from tokens, times matrices [width, depth]."""

    tokens: int
    rows: int
    experts: int
    width: int
    depth: int
    element_bytes: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.width * self.depth

    @property
    def least_bytes(self) -> int:
        """Every input read once and the result written once."""
        return self.element_bytes * (
            self.tokens * self.depth + self.experts * self.width * self.depth + self.rows * self.width
        )


@dataclass(frozen=True)
class Bound:
    """Lower bounds on a product's time in seconds, by what is used up, and the bytes that its tiles ask for."""

    arithmetic: float
    memory: float
    issue: float
    tile_bytes: int

    @property
    def seconds(self) -> float:
        """The largest: no run can be faster."""
        return max(self.arithmetic, self.memory, self.issue)


def bound(gpu: Gpu, problem: Problem, tile: Tile, loop_instructions: int) -> Bound:
    """Bound the time of a product whose result is cut into whole tiles.

    ``loop_instructions`` is what each warp issues for one step of the depth.
    """
    rows_each = problem.rows // problem.experts
    tiles = problem.experts * -(-rows_each // tile.tile_m) * -(-problem.width // tile.tile_n)
    steps = tiles * -(-problem.depth // tile.tile_k)
    loaded = steps * (tile.tile_m + tile.tile_n) * tile.tile_k * problem.element_bytes
    return Bound(
        arithmetic=problem.flops / gpu.peaks[tile.math],
        memory=problem.least_bytes / gpu.bandwidth,
        issue=steps * tile.warps * loop_instructions / (ISSUE_SLOTS * gpu.sms * gpu.clock),
        tile_bytes=loaded + problem.rows * problem.width * problem.element_bytes,
    )


def write_report(path: Path, kernels: list[Compiled], runs: dict[str, str | None], nvcc: str, state: str) -> None:
    """Write the report. `runs`: the code that each device runs."""
    path.write_text("\n".join(lines(kernels, runs, nvcc, state)) + "\n")


def lines(kernels: list[Compiled], runs: dict[str, str | None], nvcc: str, state: str) -> Iterator[str]:
    """Yield the report line by line."""
    architectures = list(dict.fromkeys(kernel.arch for kernel in kernels))
    architectures.sort(key=lambda arch: int("".join(filter(str.isdigit, arch))))
    yield "# CUDA kernels, as compiled"
    yield ""
    yield (
        f"Written by `make cuda-check` with nvcc {nvcc} for the state `{state}`; no GPU was used. It fails on local "
        "memory (spills), on a hot loop of a tensor-core product without HMMA, LDSM and 16-byte LDGSTS, on a one- or "
        "two-byte store in an aligned epilogue, on more registers than `csrc/grouped_matmul/policy.h` allows, and on a "
        "device without code. [cuda.md](cuda.md) explains the kernels."
    )
    yield ""
    yield "## Findings"
    yield ""
    found = [kernel for kernel in kernels if kernel.findings]
    yield from (f"- `{kernel.name}`, {kernel.arch}: {'; '.join(kernel.findings)}" for kernel in found)
    if not found:
        yield "None."
    yield ""
    yield "## Which device runs which code"
    yield ""
    yield (
        "As `cuobjdump` lists the objects of a default build. Machine code runs on later minor numbers of its major "
        "one, but integrated devices are promised their own only; the driver compiles PTX at first use."
    )
    yield ""
    yield "| compute capability | for example | code |"
    yield "|---|---|---|"
    yield from (f"| {device} | {DEVICES[device]} | {code or '**none**'} |" for device, code in runs.items())
    yield ""
    yield "## Lower bounds on time"
    yield ""
    yield (
        "**Bounds, not measurements.** No run on such a GPU can be faster than the largest of three times: the "
        "arithmetic at the published dense peak, every operand moved once at the published bandwidth, and the "
        "instructions of the hot loop at one per scheduler and clock. How much slower it is, only a GPU can tell; the "
        "peak of an H100 is that of instructions (wgmma) that these kernels do not use."
    )
    yield ""
    yield from bound_lines(kernels)
    yield ""
    yield "## What each kernel takes"
    yield ""
    yield (
        "Registers of a thread, shared memory of a block in bytes (static, and dynamic for tile kernels), blocks per "
        "multiprocessor that this leaves room for."
    )
    yield ""
    yield "| kernel | threads | " + " | ".join(architectures) + " |"
    yield "|---|---|" + "---|" * len(architectures)
    by_name: dict[str, dict[str, Compiled]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    for name, compiled in sorted(by_name.items()):
        threads = next(iter(compiled.values())).threads
        cells = [
            f"{each.registers}, {each.shared}, {each.blocks}" if (each := compiled.get(arch)) else ""
            for arch in architectures
        ]
        yield f"| `{name}` | {threads} | " + " | ".join(cells) + " |"
    yield ""
    yield "## Hot loops of the products"
    yield ""
    yield (
        "Multiplying instructions (HMMA; FFMA in exact float32) of one step of the depth against all other "
        "instructions that take an issue slot."
    )
    yield ""
    yield "| kernel | " + " | ".join(architectures) + " |"
    yield "|---|" + "---|" * len(architectures)
    for name, compiled in sorted(by_name.items()):
        if any(each.loop_multiplying for each in compiled.values()):
            cells = [
                f"{each.loop_multiplying} : {each.loop_other}" if (each := compiled.get(arch)) else ""
                for arch in architectures
            ]
            yield f"| `{name}` | " + " | ".join(cells) + " |"


def bound_lines(kernels: list[Compiled]) -> Iterator[str]:
    """Yield the table of bounds: the forward product of a layer with many rows for each expert and with few."""
    problems = {"many rows": (16384, 32768, 64, 2816, 2048), "few rows": (256, 512, 64, 2816, 2048)}
    yield (
        'Problem: the gate and up product `[R, H] x [2I, H]` of E = 64 experts, H = 2048, I = 1408; "many rows" has '
        'R = 32768 rows (16384 tokens, two experts each), "few rows" R = 512 (256 tokens), the same number for each '
        "expert. Bytes: least is every operand once, tiles is what the tiles ask of the caches, without the partial "
        "sums where few rows split the depth."
    )
    yield ""
    yield "| GPU | regime | dtype | FLOP | least bytes | tiles' bytes | arithmetic | memory | issue | **bound** |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for regime, sizes in problems.items():
            for math in ("bfloat16", "float16", "tf32", "float32"):
                candidates = [
                    kernel
                    for kernel in kernels
                    if kernel.tile is not None
                    and kernel.arch == gpu.arch
                    and (kernel.tile.product, kernel.tile.math, kernel.tile.regime) == ("forward", math, regime)
                ]
                if not candidates:
                    continue
                best = min(candidates, key=lambda kernel: kernel.loop_multiplying + kernel.loop_other)
                assert best.tile is not None
                problem = Problem(*sizes, 2 if math.endswith("16") else 4)
                limit = bound(gpu, problem, best.tile, best.loop_multiplying + best.loop_other)
                times = " | ".join(
                    f"{1e6 * value:.0f} us" for value in (limit.arithmetic, limit.memory, limit.issue, limit.seconds)
                )
                yield (
                    f"| {gpu.name} | {regime} | {math} | {problem.flops / 1e9:.0f} G "
                    f"| {problem.least_bytes / 1e6:.0f} MB | {limit.tile_bytes / 1e6:.0f} MB | {times} |"
                )
