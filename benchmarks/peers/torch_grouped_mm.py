# SPDX-License-Identifier: Apache-2.0
"""What a user of PyTorch can compose from ``torch.nn.functional.grouped_mm``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import silu

from benchmarks.peers.base import Peer, Step, step_of
from benchmarks.problem import Problem


def grouped_mm_pass(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sort the pairs by expert, gather, two grouped products, weigh, ``index_add``. Any number of experts per token."""
    num_experts, num_slots = gate_up_proj.shape[0], ids.shape[1]
    expert, order = ids.flatten().sort(stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    offsets = counts.cumsum(0, dtype=torch.int32)
    order = order[: int(offsets[-1])]
    token = order // num_slots
    hidden = functional.grouped_mm(x[token], gate_up_proj.transpose(1, 2), offs=offsets)
    gate, up = hidden.chunk(2, dim=-1)
    rows = functional.grouped_mm(silu(gate) * up, down_proj.transpose(1, 2), offs=offsets)
    rows = rows * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, rows)


class TorchGroupedMm(Peer):
    """``torch.nn.functional.grouped_mm`` with torch's sort, gather and ``index_add``."""

    name = "F.grouped_mm composition"
    trains = True

    @classmethod
    def missing(cls) -> str | None:
        """Whether this torch has it."""
        return None if hasattr(functional, "grouped_mm") else f"torch {torch.__version__} has no grouped_mm"

    def prepare(self, problem: Problem) -> Step:
        """Nothing beforehand."""
        return step_of(grouped_mm_pass, problem)
