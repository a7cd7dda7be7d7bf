# SPDX-License-Identifier: Apache-2.0
"""permute by its definition, combine and its gradients against float64."""

import torch
from hypothesis import given
from strategies import RaggedProblem, laid_out, ragged_problems
from tolerances import Bounded, assert_within, precision

from dynamic_moe import ops


@given(ragged_problems())
def test_permute_sorts_by_expert_and_then_by_slot(problem: RaggedProblem) -> None:
    permutation = ops.permute(problem.expert_ids, problem.experts)
    slots = problem.expert_ids.flatten().tolist()
    live = sorted((e, slot) for slot, e in enumerate(slots) if e < problem.experts)
    assert permutation.row_slot.tolist() == [slot for _, slot in live]
    assert permutation.row_token.tolist() == [slot // problem.slots for _, slot in live]
    counts = [sum(e == expert for e in slots) for expert in range(problem.experts)]
    assert permutation.tokens_per_expert.tolist() == counts
    assert permutation.expert_offsets.tolist() == [sum(counts[:e]) for e in range(problem.experts + 1)]
    row_of = {slot: row for row, (_, slot) in enumerate(live)}
    assert permutation.slot_row.flatten().tolist() == [row_of.get(slot, -1) for slot in range(len(slots))]
    assert permutation.slot_row.shape == problem.expert_ids.shape


@given(ragged_problems())
def test_combine(problem: RaggedProblem) -> None:
    p = precision(problem.dtype)
    slot_row = ops.permute(problem.expert_ids, problem.experts).slot_row
    used = slot_row >= 0
    rows = problem.random(int(used.sum()), problem.hidden).requires_grad_()
    weights = problem.expert_weights.detach().requires_grad_()
    y = ops.combine(rows, weights, laid_out(slot_row, problem.layout))
    dy = problem.random(*y.shape)
    d_rows, d_weights = torch.autograd.grad(y, (rows, weights), dy)
    assert y.dtype == d_rows.dtype == problem.dtype
    assert d_weights.dtype == problem.accumulator

    with torch.no_grad():
        of_slot = torch.zeros(*slot_row.shape, problem.hidden, dtype=torch.float64)
        of_slot[used] = rows.double()[slot_row[used].long()]
        terms = of_slot * weights.double()[..., None]
        exact = terms.sum(1)
        bound = p.sums(terms.abs().sum(1), problem.slots) + p.stored(exact)
        assert_within(y, Bounded(exact, bound), "y")

        per_slot = dy.double()[:, None] * weights.double()[..., None]
        exact = torch.zeros_like(rows, dtype=torch.float64)
        exact[slot_row[used].long()] = per_slot[used]
        assert_within(d_rows, Bounded(exact, 2 * p.stored(exact)), "d_rows")

        terms = dy.double()[:, None] * of_slot
        bound = p.sums(terms.abs().sum(2), problem.hidden)
        assert_within(d_weights, Bounded(terms.sum(2), bound), "d_weights")
        assert (d_weights[~used] == 0).all()


@given(ragged_problems())
def test_combine_without_weights(problem: RaggedProblem) -> None:
    slot_row = ops.permute(problem.expert_ids, problem.experts).slot_row
    rows = problem.random(int((slot_row >= 0).sum()), problem.hidden).requires_grad_()
    y = ops.combine(rows, None, slot_row)
    weighted = ops.combine(rows, torch.ones(slot_row.shape), slot_row)
    assert torch.equal(y, weighted)
    dy = problem.random(*y.shape)
    (d_rows,) = torch.autograd.grad(y, rows, dy)
    token = ops.permute(problem.expert_ids, problem.experts).row_token.long()
    assert torch.equal(d_rows, dy[token])


@given(ragged_problems())
def test_combine_keeps_faults_to_their_tokens(problem: RaggedProblem) -> None:
    permutation = ops.permute(problem.expert_ids, problem.experts)
    rows = problem.random(permutation.row_token.numel(), problem.hidden)
    if rows.shape[0] == 0:
        return
    clean = ops.combine(rows, problem.expert_weights, permutation.slot_row)
    hit = problem.seed % rows.shape[0]
    spoiled = rows.clone()
    spoiled[hit] = torch.nan
    faulty = ops.combine(spoiled, problem.expert_weights, permutation.slot_row)
    others = torch.arange(problem.tokens) != permutation.row_token[hit]
    assert torch.equal(clean[others], faulty[others])
    assert faulty[permutation.row_token[hit]].isnan().all()
