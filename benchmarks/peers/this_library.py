# SPDX-License-Identifier: Apache-2.0
"""dynamic_moe itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.base import Peer, Step, step_of
from benchmarks.problem import Problem


class DynamicMoe(Peer):
    """`dynamic_moe.ops.expert_mlp` on plain weights; the permutation is computed in every step."""

    name = "dynamic_moe"
    trains = True

    @classmethod
    def missing(cls) -> str | None:
        """Whether the extension is built."""
        if importlib.util.find_spec("dynamic_moe._C") is None:
            return "the extension is not built: pip install -e ."
        return None

    def prepare(self, problem: Problem) -> Step:
        """Nothing beforehand."""
        from dynamic_moe import ops

        def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return ops.expert_mlp(x, gate_up, down, ids, weights)

        return step_of(expert_pass, problem)


class DynamicMoePrepacked(DynamicMoe):
    """`dynamic_moe.experts.SwiGLUExperts` after ``prepack()``: inference on weights that were rearranged beforehand."""

    name = "dynamic_moe, prepacked"
    trains = False
    prepacked = True
    weight_copies = (1, 1)

    @classmethod
    def missing(cls) -> str | None:
        """Whether this version can prepack."""
        reason = super().missing()
        if reason is None:
            from dynamic_moe.experts import SwiGLUExperts

            if not hasattr(SwiGLUExperts, "prepack"):
                return "this version has no prepack()"
        return reason

    def prepare(self, problem: Problem) -> Step:
        """Build the module around the problem's weights and pack them."""
        from dynamic_moe.experts import SwiGLUExperts

        shape = problem.shape
        with torch.device("meta"):
            experts: Any = SwiGLUExperts(shape.num_experts, shape.hidden_size, shape.intermediate_size)
        experts.gate_up_proj = nn.Parameter(problem.gate_up_proj, requires_grad=False)
        experts.down_proj = nn.Parameter(problem.down_proj, requires_grad=False)
        experts.prepack()

        def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y: Tensor = experts(x, ids, weights)
            return y

        return step_of(expert_pass, problem)
