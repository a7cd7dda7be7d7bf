# SPDX-License-Identifier: Apache-2.0
"""grouped_matmul and expert_mlp against float64, forward and gradients, with a bound for each element."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from strategies import RaggedProblem, ragged_problems
from tolerances import Bounded, Precision, assert_within, contraction, exactly, precision, scatter
from torch import Tensor
from torch.nn.functional import silu

from dynamic_moe import ops, reference


def groups(permutation: ops.Permutation) -> list[slice]:
    offsets = permutation.expert_offsets.tolist()
    return [slice(first, last) for first, last in pairwise(offsets)]


def times_matrix(p: Precision, rows: Bounded | Tensor, weight: Tensor, permutation: ops.Permutation) -> Bounded:
    """Multiply the rows of each expert by its matrix [E, N, K]: [R, N]."""

    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rows[group] @ matrix.mT for group, matrix in zip(groups(permutation), weight, strict=True)])

    return contraction(p, multiply, rows, weight, weight.shape[2])


def weight_gradient(p: Precision, a: Bounded | Tensor, b: Bounded | Tensor, permutation: ops.Permutation) -> Bounded:
    """Sum the outer products of the rows of each expert: [E, N, K]."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a[group].mT @ b[group] for group in groups(permutation)])

    return contraction(p, multiply, a, b, permutation.tokens_per_expert[:, None, None])


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1)


def swiglu(p: Precision, gate: Bounded, up: Bounded) -> Bounded:
    s = torch.sigmoid(gate.value)
    slope = (s * (1 + gate.value * (1 - s))).abs() + 0.5 * gate.bound
    function_error = 8 * p.accumulator * s * (1 + gate.value.abs()) + p.smallest
    return Bounded(silu(gate.value), slope * gate.bound + function_error) * up


@given(ragged_problems())
def test_grouped_matmul_with_gather(problem: RaggedProblem) -> None:
    p = precision(problem.dtype)
    permutation = ops.permute(problem.expert_ids, problem.experts)
    x, weight, _, _ = problem.leaves()
    y = ops.grouped_matmul(x, weight, permutation.expert_offsets, permutation.row_token)
    dy = problem.random(*y.shape)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert y.dtype == dx.dtype == dw.dtype == problem.dtype

    token = permutation.row_token.long()
    exact = times_matrix(p, x[token], weight, permutation).stored(p)
    expected = reference.grouped_matmul(x.double(), weight.double(), permutation.expert_offsets, permutation.row_token)
    torch.testing.assert_close(expected.detach(), exact.value)  # written apart from the oracle here
    assert_within(y, exact, "y")
    rows = times_matrix(p, dy, weight.mT, permutation)
    assert_within(dx, scatter(p, rows, token, problem.tokens).stored(p), "dx")
    assert_within(dw, weight_gradient(p, dy, x[token], permutation).stored(p), "dw")


@given(ragged_problems())
def test_grouped_matmul_in_place(problem: RaggedProblem) -> None:
    p = precision(problem.dtype)
    permutation = ops.permute(problem.expert_ids, problem.experts)
    weight = problem.gate_up_proj.detach().requires_grad_()
    rows = problem.random(permutation.row_token.numel(), problem.hidden).requires_grad_()
    y = ops.grouped_matmul(rows, weight, permutation.expert_offsets)
    dy = problem.random(*y.shape)
    d_rows, dw = torch.autograd.grad(y, (rows, weight), dy)

    assert_within(y, times_matrix(p, rows, weight, permutation).stored(p), "y")
    assert_within(d_rows, times_matrix(p, dy, weight.mT, permutation).stored(p), "dx")
    assert_within(dw, weight_gradient(p, dy, rows, permutation).stored(p), "dw")


@given(ragged_problems())
def test_expert_mlp(problem: RaggedProblem) -> None:
    p = precision(problem.dtype)
    x, gate_up_proj, down_proj, expert_weights = leaves = problem.leaves()
    y = ops.expert_mlp(x, gate_up_proj, down_proj, problem.expert_ids, expert_weights)
    dy = problem.random(*y.shape, scale=problem.hidden**-0.5)
    dx, d_gate_up, d_down, d_weights = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == dx.dtype == d_gate_up.dtype == d_down.dtype == problem.dtype
    assert d_weights.dtype == problem.accumulator

    permutation = ops.permute(problem.expert_ids, problem.experts)
    token, slot = permutation.row_token.long(), permutation.row_slot.long()
    scale = expert_weights.detach().double().flatten()[slot, None]
    pre = times_matrix(p, x[token], gate_up_proj, permutation).stored(p)
    gate, up = pre[:, : problem.intermediate], pre[:, problem.intermediate :]
    activation = swiglu(p, gate, up)
    y_rows = times_matrix(p, activation.stored(p) * scale, down_proj, permutation)
    exact_y = scatter(p, y_rows, token, problem.tokens).stored(p)
    assert_within(y, exact_y, "y")

    d_scaled = times_matrix(p, dy[token], down_proj.mT, permutation)
    rows = contraction(p, row_dots, d_scaled, activation, problem.intermediate)
    assert_within(d_weights.flatten(), scatter(p, rows, slot, d_weights.numel()), "d_expert_weights")
    d_activation = d_scaled * scale
    s = torch.sigmoid(gate.value)
    slope_error = 0.5 * gate.bound + 8 * p.accumulator * s * (1 + gate.value.abs()) + p.smallest
    slope = Bounded(s * (1 + gate.value * (1 - s)), slope_error)
    d_gate = (d_activation * up * slope).stored(p)
    d_up = (d_activation * swiglu(p, gate, exactly(torch.ones_like(up.value)))).stored(p)
    d_pre = Bounded(torch.cat([d_gate.value, d_up.value], 1), torch.cat([d_gate.bound, d_up.bound], 1))
    dx_rows = times_matrix(p, d_pre, gate_up_proj.mT, permutation)
    assert_within(dx, scatter(p, dx_rows, token, problem.tokens).stored(p), "dx")
    assert_within(d_gate_up, weight_gradient(p, d_pre, x[token], permutation).stored(p), "d_gate_up_proj")
    exact_d_down = weight_gradient(p, dy[token], (activation * scale).stored(p), permutation).stored(p)
    assert_within(d_down, exact_d_down, "d_down_proj")

    # The oracle above and the package's reference are written apart; they must agree.
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = reference.expert_mlp(*exact[:3], problem.expert_ids, exact[3])
    torch.testing.assert_close(expected.detach(), exact_y.value)


@given(ragged_problems(dtypes=[torch.float64]))
def test_gradients_of_expert_mlp_are_those_of_the_reference(problem: RaggedProblem) -> None:
    leaves, others = problem.leaves(), problem.leaves()
    y = ops.expert_mlp(*leaves[:3], problem.expert_ids, leaves[3])
    expected = reference.expert_mlp(*others[:3], problem.expert_ids, others[3])
    torch.testing.assert_close(y, expected)
    dy = problem.random(*y.shape)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, others, dy), strict=True):
        torch.testing.assert_close(a, b)


@given(ragged_problems())
def test_experts_and_slots_without_rows_have_a_gradient_of_exactly_zero(problem: RaggedProblem) -> None:
    leaves = problem.leaves()
    y = ops.expert_mlp(*leaves[:3], problem.expert_ids, leaves[3])
    dx, d_gate_up, d_down, d_weights = torch.autograd.grad(y, leaves, problem.random(*y.shape))
    used = problem.expert_ids < problem.experts
    idle = ops.permute(problem.expert_ids, problem.experts).tokens_per_expert == 0
    for name, rest in {
        "y": y[~used.any(1)],
        "dx": dx[~used.any(1)],
        "d_gate_up_proj": d_gate_up[idle],
        "d_down_proj": d_down[idle],
        "d_expert_weights": d_weights[~used],
    }.items():
        assert (rest == 0).all(), name


# (gate, up) of each column: beyond 65504 on every side, while silu(gate) * up is not.
BEYOND_FLOAT16 = [(1, 1), (1e5, 1e-3), (-1e5, 1), (-1e5, -1e5), (1e-3, -1e5), (-1e-3, 1e5), (66e3, 1e-2), (300, 100)]


@pytest.mark.parametrize("static_rows", [False, True])
def test_float16_gradients_of_a_pre_activation_beyond_its_range(static_rows: bool) -> None:
    tokens, experts, hidden = 9, 3, 25

    def near(value: Tensor) -> Tensor:
        return value * (1 + 0.3 * (torch.rand(value.shape) - 0.5))

    columns = torch.tensor(BEYOND_FLOAT16).T.reshape(1, -1, 1) / (8 * hidden)
    leaves = [
        near(torch.full((tokens, hidden), 8.0)).half(),
        near(columns.expand(experts, -1, hidden)).half(),
        (1e-2 * torch.randn(experts, hidden, len(BEYOND_FLOAT16))).half(),
        4 * torch.rand(tokens, 2),  # times an activation of 30000: beyond 65504 too
    ]
    ids = torch.randint(experts + 1, (tokens, 2), dtype=torch.int32)  # some slots are unused
    x, gate_up_proj, down_proj, weights = (leaf.requires_grad_() for leaf in leaves)
    y = ops.expert_mlp(x, gate_up_proj, down_proj, ids, weights, static_rows=static_rows)
    dy = (1e-2 * torch.randn(y.shape)).half()
    gradients = torch.autograd.grad(y, (x, gate_up_proj, down_proj, weights), dy)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.expert_mlp(exact[0], exact[1], exact[2], ids, exact[3])
    for name, got, wanted in zip(
        ["y", "x", "gate_up_proj", "down_proj", "expert_weights"],
        [y, *gradients],
        [expected, *torch.autograd.grad(expected, exact, dy.double())],
        strict=True,
    ):
        tolerance = 4 * 2**-11 * wanted.detach().abs().max().item()
        torch.testing.assert_close(
            got.double(), wanted, rtol=4 * 2**-11, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
