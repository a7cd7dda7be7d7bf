# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks ask of everybody who can do the expert pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Batch, Problem


class Outputs(NamedTuple):
    """What a step computed.

    Attributes
    ----------
    y : Tensor
        [T, H], or [R, H] where the peer was given one (token, expert) pair per row.
    dx : Tensor or None
        Likewise; None after a forward pass, as are all below.
    d_gate_up_proj, d_down_proj : Tensor or None
        [E, 2I, H] and [E, H, I].
    d_expert_weights : Tensor or None
        [T, K] or [R, 1].
    """

    y: Tensor
    dx: Tensor | None = None
    d_gate_up_proj: Tensor | None = None
    d_down_proj: Tensor | None = None
    d_expert_weights: Tensor | None = None


Step = Callable[[Batch], Outputs]
ExpertPass = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Peer(ABC):
    """One way to do the expert pass.

    Attributes
    ----------
    name : str
        As it is printed.
    dtypes : tuple of torch.dtype
        That it can do.
    trains : bool
        Whether it has a backward pass.
    prepacked : bool
        Whether it runs on weights that were rearranged beforehand, which is not timed.
    weight_copies : float
        Copies of the weights that it makes for itself, in forward passes and in training.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    trains: ClassVar[bool] = False
    prepacked: ClassVar[bool] = False
    weight_copies: ClassVar[tuple[float, float]] = (0, 1)

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be imported, or None."""

    @classmethod
    def unable(cls, problem: Problem) -> str | None:
        """Why it cannot do this problem, or None."""
        if problem.training and not cls.trains:
            return "no backward pass"
        if problem.dtype not in cls.dtypes:
            return f"no {str(problem.dtype).removeprefix('torch.')}"
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Step:
        """Do what may be done beforehand. The step returned is what is timed."""

    def close(self) -> None:
        """Let go of what `prepare` made."""
        return


def forward_step(expert_pass: ExpertPass, problem: Problem, *, pairs: bool) -> Step:
    """A forward pass of a differentiable function; of pairs, or of tokens with unused slots."""

    @torch.no_grad()
    def step(batch: Batch) -> Outputs:
        x, ids, weights = _inputs(batch, pairs)
        return Outputs(expert_pass(x, problem.gate_up_proj, problem.down_proj, ids, weights))

    return step


def training_step(expert_pass: ExpertPass, problem: Problem, *, pairs: bool) -> Step:
    """Forward and backward: the gradients of x, both projections and the expert weights."""
    gate_up = problem.gate_up_proj.detach().requires_grad_()
    down = problem.down_proj.detach().requires_grad_()

    def step(batch: Batch) -> Outputs:
        x, ids, weights = _inputs(batch, pairs)
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        y = expert_pass(x, gate_up, down, ids, weights)
        dy = batch.pair_dy if pairs else batch.dy
        dx, d_gate_up, d_down, d_weights = torch.autograd.grad(y, (x, gate_up, down, weights), dy)
        return Outputs(y.detach(), dx, d_gate_up, d_down, d_weights)

    return step


def step_of(expert_pass: ExpertPass, problem: Problem, *, pairs: bool = False) -> Step:
    """The step of a differentiable function, as the problem asks for it."""
    return (training_step if problem.training else forward_step)(expert_pass, problem, pairs=pairs)


def _inputs(batch: Batch, pairs: bool) -> tuple[Tensor, Tensor, Tensor]:
    if pairs:
        return batch.pair_x, batch.pair_ids, batch.pair_weights
    return batch.x, batch.expert_ids, batch.expert_weights


def is_padded(problem: Problem) -> bool:
    """Whether tokens have different numbers of experts, which peers with a fixed number cannot express."""
    return not problem.shape.is_top_k
