# SPDX-License-Identifier: Apache-2.0
"""The work of each kind of case."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.work.subject import Cost, Opened, Subject

__all__ = ["Cost", "Opened", "Subject", "open_case"]


def open_case(case: Case, wanted: set[str] | None) -> Opened:
    """Build what a case needs.

    Parameters
    ----------
    case : Case
    wanted : set of str, optional
        Names of the peers for the cases that have peers. Default: all.
    """
    from benchmarks.work import experts, gating, layer, memory, movement

    match case.kind:
        case "experts":
            return experts.open_experts(case, wanted)
        case "sweep":
            return experts.open_sweep(case)
        case "layer":
            return layer.open_layer(case)
        case "gating":
            return gating.open_gating(case)
        case "permute":
            return movement.open_permute(case)
        case "combine":
            return movement.open_combine(case)
        case "memory":
            return memory.open_memory(case, wanted)
