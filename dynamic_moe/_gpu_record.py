# SPDX-License-Identifier: Apache-2.0
"""Whether a GPU has confirmed the CUDA kernels: the record that a passed ``make gpu-check`` writes, to be committed."""

import json
import warnings
from pathlib import Path
from typing import TypedDict

import torch

PATH = Path(__file__).with_name("gpu_record.json")


class GpuRecord(TypedDict):
    """Where and when everything that needs a GPU has passed."""

    device: str
    compute_capability: str
    date: str
    commit: str
    dynamic_moe: str
    torch: str
    cuda: str


def read() -> GpuRecord | None:
    """Return the record that is part of this package; None where there is none yet."""
    return json.loads(PATH.read_text()) if PATH.exists() else None


is_confirmed = read() is not None
_has_warned = False


# torch.compile cannot trace a warning: it calls this function while it compiles.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_unless_confirmed() -> None:
    """Say, once in a process, that no device has confirmed the CUDA kernels; nothing where one has."""
    global _has_warned
    if is_confirmed or _has_warned:
        return
    _has_warned = True
    warnings.warn(
        "no GPU has confirmed the CUDA kernels of dynamic_moe yet: no run of `make gpu-check` that passed is recorded, "
        "so results may be wrong; compare them with dynamic_moe.reference or with the CPU, or run `make gpu-check`",
        stacklevel=3,
    )
