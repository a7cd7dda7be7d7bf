# SPDX-License-Identifier: Apache-2.0
"""A Python loop over the experts, as the released Dynamic MoE and most model code has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.peers.base import Peer, Step, step_of
from benchmarks.problem import Problem


def loop_over_experts(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """For each expert: find its tokens, gather, three products, weigh, ``index_add``. Any number of experts."""
    y = torch.zeros_like(x)
    for expert in range(gate_up_proj.shape[0]):
        token, slot = torch.where(ids == expert)
        gate, up = linear(x[token], gate_up_proj[expert]).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, down_proj[expert]) * weights[token, slot, None].to(x.dtype)
        y.index_add_(0, token, rows)
    return y


class TorchLoop(Peer):
    """A Python loop over experts, torch's matrix products, ``index_add``."""

    name = "Python loop over experts"
    trains = True

    @classmethod
    def missing(cls) -> str | None:
        """It is always there."""
        return None

    def prepare(self, problem: Problem) -> Step:
        """Nothing beforehand."""
        return step_of(loop_over_experts, problem)
