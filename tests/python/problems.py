# SPDX-License-Identifier: Apache-2.0
"""Small inputs for the tests of the operators."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamic_moe import ops


@dataclass
class Problem:
    """A ragged expert pass. Tensors that can have a gradient are leaves that ask for it where ``grad`` is set."""

    logits: Tensor  # [T, E]
    x: Tensor  # [T, H]
    gate_up_proj: Tensor  # [E, 2I, H]
    down_proj: Tensor  # [E, H, I]
    expert_ids: Tensor  # [T, K]
    expert_weights: Tensor  # [T, K]
    permutation: ops.Permutation

    @property
    def floats(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.gate_up_proj, self.down_proj, self.expert_weights

    def expert_mlp(self, module: Any = ops) -> Tensor:
        x, gate_up_proj, down_proj, expert_weights = self.floats
        return module.expert_mlp(x, gate_up_proj, down_proj, self.expert_ids, expert_weights)


def make_problem(
    tokens: int = 9,
    experts: int = 4,
    hidden: int = 10,
    intermediate: int = 7,
    dtype: torch.dtype = torch.float64,
    p: float = 0.6,
    grad: bool = False,
) -> Problem:
    """Make a problem whose values have unit scale all the way through. The last of several experts has no token."""
    logits = torch.randn(tokens, experts, dtype=dtype)
    if experts > 1:
        logits[:, -1] = -torch.inf
    gating = ops.top_p_gating(logits, p)
    return Problem(
        logits=torch.randn(tokens, experts, dtype=dtype).requires_grad_(grad),
        x=torch.randn(tokens, hidden, dtype=dtype).requires_grad_(grad),
        gate_up_proj=(torch.randn(experts, 2 * intermediate, hidden, dtype=dtype) / hidden**0.5).requires_grad_(grad),
        down_proj=(torch.randn(experts, hidden, intermediate, dtype=dtype) / intermediate**0.5).requires_grad_(grad),
        expert_ids=gating.expert_ids,
        expert_weights=gating.expert_weights.clone().requires_grad_(grad),
        permutation=ops.permute(gating.expert_ids, experts),
    )
