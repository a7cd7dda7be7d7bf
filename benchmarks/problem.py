# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case: weights, and batches of tokens that are routed already."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import DTYPE_BYTES, Shape

LAST_LEVEL_CACHE = 32 << 20  # bytes; what small batches must outrun
SEED = 20241122


@dataclass(frozen=True)
class Batch:
    """Tokens and the experts that they go to.

    Attributes
    ----------
    x, dy : Tensor
        [T, H]. Input, and gradient of the output.
    expert_ids : Tensor
        int32 [T, K], best first, E in unused slots; K is the largest number of experts of a token.
    expert_weights : Tensor
        float32 [T, K], 0 in unused slots.
    pair_token : Tensor
        int64 [R], the token of each (token, expert) pair, tokens in order.
    pair_x, pair_dy : Tensor
        [R, H]. What a peer gets that knows no variable number of experts: one pair per row.
    pair_ids, pair_weights : Tensor
        int32 and float32 [R, 1].
    """

    x: Tensor
    dy: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    pair_token: Tensor
    pair_x: Tensor
    pair_dy: Tensor
    pair_ids: Tensor
    pair_weights: Tensor

    @property
    def num_rows(self) -> int:
        """R."""
        return self.pair_token.shape[0]

    @property
    def distinct_experts(self) -> int:
        """Number of experts that have a row."""
        return len(set(self.pair_ids.flatten().tolist()))


@dataclass(frozen=True)
class Problem:
    """The expert pass of one shape.

    Attributes
    ----------
    shape : Shape
    dtype : torch.dtype
    training : bool
    gate_up_proj, down_proj : Tensor
        [E, 2I, H] and [E, H, I].
    batches : list of Batch
        Taken in turn. Where T is small there are so many that the weights of one have left the caches when its turn
        comes again.
    """

    shape: Shape
    dtype: torch.dtype
    training: bool
    gate_up_proj: Tensor
    down_proj: Tensor
    batches: list[Batch]

    @property
    def num_rows(self) -> float:
        """Mean number of rows of a batch."""
        return sum(batch.num_rows for batch in self.batches) / len(self.batches)


def make_problem(shape: Shape, dtype: str, num_tokens: int, training: bool) -> Problem:
    """Draw the weights and the batches of a case; the same in every process."""
    generator = torch.Generator().manual_seed(SEED)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate_up = _scaled_normal((experts, 2 * intermediate, hidden), hidden, torch_dtype, generator)
    down = _scaled_normal((experts, hidden, intermediate), intermediate, torch_dtype, generator)
    batches = _make_batches(shape, dtype, num_tokens, training, generator)
    return Problem(shape, torch_dtype, training, gate_up, down, batches)


def _make_batches(shape: Shape, dtype: str, num_tokens: int, training: bool, generator: torch.Generator) -> list[Batch]:
    count = _number_of_batches(shape, dtype, num_tokens)
    slots = draw_experts(shape, num_tokens * count, generator)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return [_make_batch(shape, part, torch_dtype, training, generator) for part in torch.split(slots, num_tokens)]


def _number_of_batches(shape: Shape, dtype: str, num_tokens: int) -> int:
    """So many that they read at least four times the last-level cache before the first comes again."""
    if num_tokens >= 512:
        return 1
    rows = max(1, int(num_tokens * shape.mean_experts))
    experts = shape.num_experts * (1 - (1 - 1 / shape.num_experts) ** rows)  # expected number of distinct ones
    batch_bytes = experts * shape.expert_values * DTYPE_BYTES[dtype]
    return max(1, math.ceil(4 * LAST_LEVEL_CACHE / batch_bytes), 10 // num_tokens)


def draw_experts(shape: Shape, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Give each token different experts, evenly loaded on average.

    Returns
    -------
    Tensor
        int32 [T, K], E in unused slots.
    """
    counts = _experts_per_token(shape, num_tokens, generator)
    num_slots = int(counts.max())
    order = torch.rand(num_tokens, shape.num_experts, generator=generator).argsort(dim=1)
    if num_tokens * num_slots <= 4 * shape.num_experts:
        # Few tokens: walk through all experts, so that none comes again while it may be in a cache.
        order = (torch.arange(num_tokens)[:, None] * num_slots + torch.arange(shape.num_experts)) % shape.num_experts
    unused = torch.arange(num_slots) >= counts[:, None]
    return order[:, :num_slots].masked_fill(unused, shape.num_experts).to(torch.int32)


def _experts_per_token(shape: Shape, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Number of experts of each token: the same for top-k, else spread from one to four, with the exact mean."""
    if shape.is_top_k:
        return torch.full((num_tokens,), int(shape.mean_experts))
    total = max(num_tokens, round(shape.mean_experts * num_tokens))
    # Each token has one; the others go to tokens at random, at most three to one of them.
    places = torch.arange(num_tokens).repeat(3)
    chosen = places[torch.randperm(3 * num_tokens, generator=generator)[: total - num_tokens]]
    return 1 + torch.bincount(chosen, minlength=num_tokens)


def _make_batch(
    shape: Shape, expert_ids: Tensor, dtype: torch.dtype, training: bool, generator: torch.Generator
) -> Batch:
    num_tokens = expert_ids.shape[0]
    used = expert_ids < shape.num_experts
    weights = torch.rand(expert_ids.shape, generator=generator).masked_fill(~used, 0)
    weights = (weights + 0.1 * used) / (weights + 0.1 * used).sum(1, keepdim=True)
    x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype)
    dy = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype) if training else torch.empty(0)
    pair_token = used.nonzero()[:, 0]
    return Batch(
        x=x,
        dy=dy,
        expert_ids=expert_ids.contiguous(),
        expert_weights=weights,
        pair_token=pair_token,
        pair_x=x[pair_token],
        pair_dy=dy[pair_token] if training else dy,
        pair_ids=expert_ids[used][:, None].contiguous(),
        pair_weights=weights[used][:, None].contiguous(),
    )


def _scaled_normal(size: tuple[int, ...], fan_in: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """N(0, 1 / fan_in) in ``dtype``, one expert at a time so that no second float32 copy of all of them exists."""
    weight = torch.empty(size, dtype=dtype)
    for matrix in weight:
        matrix.copy_(torch.randn(size[1:], generator=generator) * fan_in**-0.5)
    return weight
