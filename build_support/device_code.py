# SPDX-License-Identifier: Apache-2.0
"""Which of the code in a built object a CUDA device runs, by the rules of NVIDIA's compatibility guides.

Machine code runs on devices of its major number whose minor number is not below its own. Integrated devices (Jetson)
are outside of that promise: they run what was made for exactly them. Code for an "a" target runs on that very
capability, code for an "f" target on its family: the same major number, the minor one not below. Where no machine code
fits, the driver compiles PTX, which may be of any capability that is not above the device's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Compute capabilities from 8.0 on that nvcc 13.0 knows, with devices that have them.
DEVICES = {
    "8.0": "A100",
    "8.6": "A10, A40, RTX 30",
    "8.7": "Jetson Orin",
    "8.8": "",
    "8.9": "L4, L40, RTX 40",
    "9.0": "H100, H200",
    "10.0": "B200",
    "10.3": "B300",
    "11.0": "Jetson Thor",
    "12.0": "RTX 50, RTX PRO Blackwell",
    "12.1": "DGX Spark",
}
INTEGRATED = ("8.7", "8.8", "11.0")


class Target(NamedTuple):
    """A capability that code was made for, and "a", "f" or nothing."""

    major: int
    minor: int
    suffix: str

    @property
    def number(self) -> str:
        """As nvcc writes it, e.g. ``90a``."""
        return f"{self.major}{self.minor}{self.suffix}"


def targets(listing: str) -> set[Target]:
    """Read what ``cuobjdump --list-elf`` or ``--list-ptx`` prints."""
    found = re.findall(r"\.sm_(\d+)(\d)([af]?)\.(?:cubin|ptx)$", listing, re.MULTILINE)
    return {Target(int(major), int(minor), suffix) for major, minor, suffix in found}


def code_of(device: str, cubins: set[Target], ptx: set[Target]) -> str | None:
    """Return what a device of this compute capability runs: ``sm_80``, or ``PTX of compute_80``, or None."""
    own = tuple(map(int, device.split(".")))

    def fits(target: Target, is_ptx: bool) -> bool:
        made_for = (target.major, target.minor)
        if target.suffix == "a" or (not is_ptx and device in INTEGRATED):
            return made_for == own
        if is_ptx and not target.suffix:
            return made_for <= own
        return target.major == own[0] and target.minor <= own[1]

    if best := max((target for target in cubins if fits(target, is_ptx=False)), default=None):
        return f"sm_{best.number}"
    if best := max((target for target in ptx if fits(target, is_ptx=True)), default=None):
        return f"PTX of compute_{best.number}"
    return None


def without_code(cubins: set[Target], ptx: set[Target]) -> list[str]:
    """Return the devices that can run none of it."""
    return [device for device in DEVICES if code_of(device, cubins, ptx) is None]
