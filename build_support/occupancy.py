# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a kernel a multiprocessor holds at once, from what a block takes.

Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the units in which registers and
shared memory are handed out are those of NVIDIA's ``cuda_occupancy.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256  # a warp's registers are handed out in multiples of this
SUBPARTITIONS = 4  # each warp lives in one of them, and they share the registers evenly
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # by the system, for each block
KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of one architecture has."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 * KIB),
    "sm_90": Limits(64, 32, 228 * KIB),
    "sm_100": Limits(64, 32, 228 * KIB),
    "sm_110": Limits(48, 24, 228 * KIB),
    "sm_120": Limits(48, 24, 100 * KIB),
}


def blocks_per_sm(arch: str, threads: int, registers: int, shared: int) -> int:
    """Return the number of blocks that fit.

    Parameters
    ----------
    arch : str
        A key of `LIMITS`.
    threads, registers : int
        Threads of a block, registers of a thread.
    shared : int
        Static and dynamic shared memory of a block in bytes.
    """
    limits = LIMITS[arch]
    warps = round_up(threads, WARP) // WARP
    by_warps = limits.warps // warps
    registers_per_warp = round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // SUBPARTITIONS // registers_per_warp * SUBPARTITIONS // warps
    by_shared = limits.shared // (round_up(shared, SHARED_UNIT) + SHARED_RESERVED)
    return min(limits.blocks, by_warps, by_registers, by_shared)


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit
