# SPDX-License-Identifier: Apache-2.0
"""Sizes of the layers that are measured, and what one pass costs at least."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A layer of E SwiGLU experts and how many of them a token gets.

    Attributes
    ----------
    name : str
    hidden_size, intermediate_size, num_experts : int
        H, I and E.
    mean_experts : float
        Mean number of experts per token. Where it is a whole number every token gets that many (top-k).
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    mean_experts: float

    @property
    def is_top_k(self) -> bool:
        """Whether every token gets the same number of experts."""
        return float(self.mean_experts).is_integer()

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size

    def flops(self, num_rows: int, training: bool) -> int:
        """Multiplies and adds of ``num_rows`` pairs. What a backward pass computes again is not counted."""
        return (3 if training else 1) * 2 * num_rows * self.expert_values

    def describe(self) -> str:
        """For people: ``H 1024, I 2816, E 16, top-p with 1.8 on average``."""
        rule = f"top-{int(self.mean_experts)}" if self.is_top_k else f"top-p with {self.mean_experts} on average"
        return f"H {self.hidden_size}, I {self.intermediate_size}, E {self.num_experts}, {rule}"


SHAPES = {
    "A": Shape("A", 1024, 2816, 16, 1.8),
    "B": Shape("B", 2048, 768, 128, 8),
    "C": Shape("C", 256, 512, 8, 2),
}
