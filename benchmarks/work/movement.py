# SPDX-License-Identifier: Apache-2.0
"""Moving data: the permutation, and the weighted sum of the experts' rows back to tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problem import SEED, draw_experts
from benchmarks.work.subject import Cost, Opened, Subject

Combine = Callable[[Tensor, Tensor], Tensor]


def torch_permute(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The permutation by a sort: the fields of `dynamic_moe.ops.Permutation`, and their meaning."""
    num_slots = expert_ids.shape[1]
    expert, order = expert_ids.flatten().sort(stable=True)
    tokens_per_expert = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    offsets = torch.nn.functional.pad(tokens_per_expert.cumsum(0), (1, 0)).to(torch.int32)
    row_slot = order[: int(offsets[-1])]
    slot_row = torch.full_like(expert_ids, -1)
    slot_row.view(-1)[row_slot] = torch.arange(len(row_slot), dtype=torch.int32)
    return tokens_per_expert, offsets, row_slot // num_slots, row_slot, slot_row


def combine_by_index_add(rows: Tensor, weights: Tensor, row_token: Tensor, row_slot: Tensor, num_tokens: int) -> Tensor:
    """Weigh the rows and add each to its token."""
    weighted = rows * weights.flatten()[row_slot, None].to(rows.dtype)
    return torch.zeros(num_tokens, rows.shape[1], dtype=rows.dtype).index_add_(0, row_token, weighted)


def combine_by_gather(rows: Tensor, weights: Tensor, slot_row: Tensor) -> Tensor:
    """Gather the rows of all slots, used or not, and sum them by token."""
    gathered = rows.index_select(0, slot_row.clamp(min=0).flatten()).view(*slot_row.shape, rows.shape[1])
    return (gathered * weights[..., None].to(rows.dtype)).sum(dim=1)


def open_permute(case: Case) -> Opened:
    """Counting, by this library, against PyTorch's sort."""
    from dynamic_moe import ops

    shape = case.shape
    expert_ids = draw_experts(shape, case.num_tokens, torch.Generator().manual_seed(SEED))
    ways: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
        "dynamic_moe": ops.permute,
        "PyTorch composition": torch_permute,
    }
    ours, theirs = (way(expert_ids, shape.num_experts) for way in ways.values())
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual.long(), expected.long(), rtol=0, atol=0)
    num_rows = int(ours[1][-1])
    cost = Cost(bytes=4.0 * (2 * expert_ids.numel() + 2 * num_rows), bandwidth="copy")
    subjects = [Subject(name, _ignore(partial(way, expert_ids, shape.num_experts)), cost) for name, way in ways.items()]
    return Opened(subjects=subjects, facts={"rows": num_rows})


def open_combine(case: Case) -> Opened:
    """Gather-and-sum, by this library, against two ways in PyTorch."""
    from dynamic_moe import ops

    shape, generator = case.shape, torch.Generator().manual_seed(SEED)
    dtype: torch.dtype = getattr(torch, case.dtype)
    permutation = ops.permute(draw_experts(shape, case.num_tokens, generator), shape.num_experts)
    row_token, row_slot, slot_row = permutation.row_token.long(), permutation.row_slot.long(), permutation.slot_row
    rows = torch.randn(len(row_token), shape.hidden_size, generator=generator).to(dtype)
    weights = torch.rand(slot_row.shape, generator=generator).masked_fill(slot_row < 0, 0)
    ways: dict[str, Combine] = {
        "dynamic_moe": lambda r, w: ops.combine(r, w, slot_row),
        "PyTorch index_add": lambda r, w: combine_by_index_add(r, w, row_token, row_slot, case.num_tokens),
        "PyTorch gather and sum": lambda r, w: combine_by_gather(r, w, slot_row),
    }
    expected = ways["PyTorch index_add"](rows.float(), weights)
    for way in ways.values():
        torch.testing.assert_close(way(rows, weights).float(), expected, rtol=0.05, atol=0.1)
    dy = torch.randn(expected.shape, generator=generator).to(dtype)
    make_call = partial(_training_call, dy=dy) if case.training else _forward_call
    cost = Cost(bytes=float(_combine_bytes(rows, dy, case.training)), bandwidth="copy")
    return Opened(subjects=[Subject(name, make_call(way, rows, weights), cost) for name, way in ways.items()])


def _combine_bytes(rows: Tensor, dy: Tensor, training: bool) -> int:
    """Forward: read rows, write y. Backward: read dy and the rows, write the rows' gradient."""
    forward = rows.nbytes + dy.nbytes
    return forward + (2 * rows.nbytes + dy.nbytes) * training


def _forward_call(way: Combine, rows: Tensor, weights: Tensor) -> Callable[[int], object]:
    @torch.no_grad()
    def call(_: int) -> object:
        return way(rows, weights)

    return call


def _training_call(way: Combine, rows: Tensor, weights: Tensor, *, dy: Tensor) -> Callable[[int], object]:
    rows, weights = rows.detach().requires_grad_(), weights.detach().requires_grad_()

    def call(_: int) -> object:
        return torch.autograd.grad(way(rows, weights), (rows, weights), dy)

    return call


def _ignore(function: Callable[[], object]) -> Callable[[int], object]:
    """``function`` as a call with a batch number."""
    return lambda _: function()
