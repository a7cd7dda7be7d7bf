# SPDX-License-Identifier: Apache-2.0
"""permute, combine, grouped_matmul and expert_mlp: results, gradients and errors."""

import re
from typing import Any

import pytest
import torch
from problems import Problem, make_problem
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from dynamic_moe import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 3, 4, 5), (1, 1, 1, 1), (9, 4, 10, 7), (70, 3, 48, 33), (40, 8, 64, 32)]


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare with a float64 result: a few units of ``dtype`` in the last place of the tensor's largest value."""
    assert actual.shape == exact.shape
    scale = max(1.0, exact.detach().abs().max().item()) if exact.numel() else 1.0
    bound = 1e-12 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert_close(actual.double(), exact, atol=bound * scale, rtol=0)


def as_float64(problem: Problem) -> Problem:
    floats = {
        name: getattr(problem, name).detach().double().requires_grad_() for name in ("x", "gate_up_proj", "down_proj")
    }
    weights = problem.expert_weights.detach().double().requires_grad_()
    return Problem(
        logits=problem.logits,
        expert_ids=problem.expert_ids,
        expert_weights=weights,
        permutation=problem.permutation,
        **floats,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(0, 2, 3), (5, 0, 3), (1, 1, 1), (100, 4, 7), (3000, 8, 64)])
def test_permute_matches_the_reference(tokens: int, slots: int, experts: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-2, experts + 3, (tokens, slots), dtype=dtype)
    actual, expected = ops.permute(ids, experts)[:-1], reference.permute(ids, experts)[:-1]
    for name, a, b in zip(ops.Permutation._fields[:-1], actual, expected, strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a, b), name


def test_int64_ids_beyond_int32_are_unused_slots() -> None:
    assert ops.permute(torch.tensor([[2**32, 1, -(2**32) + 1]]), 3).row_slot.tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "hidden", "intermediate"), SIZES)
def test_expert_mlp_and_its_gradients(
    tokens: int, experts: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> None:
    problem = make_problem(tokens, experts, hidden, intermediate, dtype, grad=True)
    exact = as_float64(problem)
    y, y_exact = problem.expert_mlp(), exact.expert_mlp(reference)
    dy = torch.randn_like(y)
    assert y.dtype == dtype
    assert_near(y, y_exact, dtype)
    gradients = torch.autograd.grad(y, problem.floats, dy)
    for actual, expected in zip(gradients, torch.autograd.grad(y_exact, exact.floats, dy.double()), strict=True):
        assert_near(actual, expected, dtype)
    if experts > 1:
        assert (gradients[1][-1] == 0).all()
        assert (gradients[2][-1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "hidden", "intermediate"), SIZES)
def test_grouped_matmul_and_its_gradients(
    tokens: int, experts: int, hidden: int, intermediate: int, gather: bool, dtype: torch.dtype
) -> None:
    problem = make_problem(tokens, experts, hidden, intermediate, dtype)
    offsets, row_token = problem.permutation.expert_offsets, problem.permutation.row_token
    x = problem.x if gather else torch.randn(row_token.numel(), hidden, dtype=dtype)
    tensors = [x.requires_grad_(), problem.gate_up_proj.requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = ops.grouped_matmul(*tensors, offsets, row_token if gather else None)
    y_exact = reference.grouped_matmul(*exact, offsets, row_token if gather else None)
    assert_near(y, y_exact, dtype)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y_exact, exact, dy.double())
    for actual, gradient in zip(torch.autograd.grad(y, tensors, dy), expected, strict=True):
        assert_near(actual, gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 9, 200])
def test_combine_and_its_gradients(tokens: int, weighted: bool, dtype: torch.dtype) -> None:
    problem = make_problem(tokens, 5, 12, 3, dtype)
    rows = torch.randn(problem.permutation.row_token.numel(), 12, dtype=dtype).requires_grad_()
    weights = problem.expert_weights.requires_grad_() if weighted else None
    exact_rows = rows.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_() if weights is not None else None
    y = ops.combine(rows, weights, problem.permutation.slot_row)
    y_exact = reference.combine(exact_rows, exact_weights, problem.permutation.slot_row)
    assert_near(y, y_exact, dtype)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, [rows] if weights is None else [rows, weights], dy)
    inputs = [exact_rows] if exact_weights is None else [exact_rows, exact_weights]
    for a, b in zip(actual, torch.autograd.grad(y_exact, inputs, dy.double()), strict=True):
        assert_near(a, b, dtype)


def test_a_permutation_may_be_given() -> None:
    problem = make_problem()
    given = ops.expert_mlp(
        problem.x,
        problem.gate_up_proj,
        problem.down_proj,
        problem.expert_ids.long(),
        problem.expert_weights,
        problem.permutation,
    )
    assert torch.equal(given, problem.expert_mlp())


def test_an_expert_may_be_named_twice_by_one_token() -> None:
    problem = make_problem(tokens=3, grad=True)
    problem.expert_ids = torch.tensor([[1, 1], [0, 2], [2, 2]])
    problem.expert_weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    y, expected = problem.expert_mlp(), problem.expert_mlp(reference)
    assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), problem.floats), torch.autograd.grad(expected.sum(), problem.floats), strict=True
    ):
        assert_close(a, b)


def test_weights_of_unused_slots_do_not_matter() -> None:
    problem = make_problem()
    expected = problem.expert_mlp()
    problem.expert_weights = torch.where(problem.expert_ids == 4, torch.nan, problem.expert_weights)
    assert torch.equal(problem.expert_mlp(), expected)


def test_non_contiguous_inputs_and_gradients() -> None:
    problem = make_problem(grad=True)
    y = problem.expert_mlp()
    strided = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in problem.floats]
    x, gate_up_proj, down_proj, expert_weights = strided
    assert not x.is_contiguous()
    other = ops.expert_mlp(x, gate_up_proj, down_proj, problem.expert_ids.T.contiguous().T, expert_weights)
    assert torch.equal(y, other)
    y.sum().backward()  # the incoming gradient is expanded: strides 0
    torch.autograd.backward(other, torch.ones_like(other))
    for a, b in zip(problem.floats, strided, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: int) -> None:
    problem = make_problem(grad=True)
    everything = torch.autograd.grad(problem.expert_mlp().sum(), problem.floats)
    problem.floats[frozen].requires_grad_(False)
    problem.expert_mlp().sum().backward()
    for index, tensor in enumerate(problem.floats):
        if index == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, everything[index])


def saved_bytes(call: Any) -> int:
    """Bytes of the distinct tensors that autograd keeps for a call."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_the_backward_pass_keeps_x_and_the_pre_activation_alone() -> None:
    problem = make_problem(tokens=64, hidden=96, intermediate=80, dtype=torch.bfloat16)
    problem.x.requires_grad_()
    rows = problem.permutation.row_token.numel()
    given = [problem.gate_up_proj, problem.down_proj, problem.expert_weights, problem.permutation.expert_offsets]
    given += [problem.permutation.row_token, problem.permutation.row_slot]
    call = (problem.x, problem.gate_up_proj, problem.down_proj, problem.expert_ids, problem.expert_weights)
    kept = saved_bytes(lambda: ops.expert_mlp(*call, problem.permutation))
    inputs = sum(tensor.untyped_storage().nbytes() for tensor in given)
    assert kept - inputs == 2 * 64 * 96 + 2 * rows * 2 * 80


def test_without_a_gradient_the_pre_activation_is_not_made() -> None:
    problem = make_problem(grad=True)
    calls: list[tuple[Any, ...]] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.ops.dynamic_moe.expert_mlp.default:
                calls.append(tuple(output[1].shape))
            return output

    with Spy():
        problem.expert_mlp()
        with torch.no_grad():
            problem.expert_mlp()
    rows = problem.permutation.row_token.numel()
    assert calls == [(rows, 14), (0, 14)]


P = make_problem(dtype=torch.float32)
OFFSETS = P.permutation.expert_offsets


def mlp(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": P.x,
        "gate_up_proj": P.gate_up_proj,
        "down_proj": P.down_proj,
        "expert_ids": P.expert_ids,
        "expert_weights": P.expert_weights,
    }
    return lambda: ops.expert_mlp(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (mlp(x=torch.zeros(9, 11)), "down_proj must have shape [E, H=11, I], got [4, 10, 7]"),
        (mlp(x=P.x.double()), "down_proj must have dtype float64, got float32"),
        (mlp(x=P.x.long()), "x must have dtype float32 or float64 or bfloat16 or float16, got int64"),
        (mlp(gate_up_proj=P.gate_up_proj[:, 1:]), "gate_up_proj must have shape [E=4, 2I=14, H=10], got [4, 13, 10]"),
        (mlp(expert_ids=P.expert_ids[:, :2]), "expert_ids must have shape [T=9, K=4], got [9, 2]"),
        (mlp(expert_ids=P.expert_ids.float()), "expert_ids must have dtype int32 or int64, got float32"),
        (mlp(expert_weights=P.expert_weights[:-1]), "expert_weights must have shape [T=9, K], got [8, 4]"),
        (mlp(down_proj=P.down_proj.to("meta")), "down_proj must be on cpu like the other arguments, got meta"),
        (lambda: ops.permute(P.expert_ids, 0), "num_experts must be at least 1, got 0"),
        (lambda: ops.permute(P.expert_ids[0], 4), "expert_ids must have shape [T, K], got [4]"),
        (lambda: ops.combine(P.x, None, P.expert_ids.long()), "slot_row must have dtype int32, got int64"),
        (
            lambda: ops.combine(P.x, P.expert_weights[:2], P.expert_ids),
            "weights must have shape [T=9, K=4], got [2, 4]",
        ),
        (lambda: ops.grouped_matmul(P.x, P.down_proj, OFFSETS), "weight must have shape [E, N, K=10], got [4, 10, 7]"),
        (
            lambda: ops.grouped_matmul(P.x, P.gate_up_proj, OFFSETS[1:]),
            "expert_offsets must have shape [E + 1=5], got [4]",
        ),
    ],
)
def test_errors_name_the_argument_the_value_and_the_bound(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_what_is_no_tensor_raises_a_type_error() -> None:
    with pytest.raises(TypeError, match="expert_ids must be a Tensor, got list"):
        ops.permute([[0, 1]], 2)  # type: ignore[arg-type]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("offsets", "row_token", "message"),
    [
        (int32(1, 2, 3), None, "expert_offsets must start at 0, got 1"),
        (int32(0, 7, 3), None, "expert_offsets must not descend, got 7 then 3 at expert 1"),
        (int32(0, 1, 4), None, "expert_offsets must end at most at the number of rows, 3, got 4"),
        (int32(0, 1, 2**31 - 1), None, "expert_offsets must end at most at the number of rows, 3, got 2147483647"),
        (int32(0, 1, 3), int32(0, 3, 1), "row_token must hold values in [0, 2], got 3 at flat index 1"),
        (int32(0, 1, 3), int32(0, 1, -1), "row_token must hold values in [0, 2], got -1 at flat index 2"),
        (int32(0, 1, 2), int32(0, 2**31 - 1), "row_token must hold values in [0, 2], got 2147483647 at flat index 1"),
    ],
)
def test_bad_groups_raise_instead_of_reading_elsewhere(offsets: Tensor, row_token: Tensor, message: str) -> None:
    raw = torch.ops.dynamic_moe
    x, weight = torch.randn(3, 4), torch.randn(2, 5, 4)
    dy = torch.randn(3 if row_token is None else row_token.numel(), 5)
    for call in (
        lambda: ops.grouped_matmul(x, weight, offsets, row_token),
        lambda: raw.grouped_matmul(x, weight, offsets, row_token),
        lambda: raw.grouped_matmul_dx(dy, weight, offsets, row_token, 3),
        lambda: raw.grouped_matmul_dw(dy, x, offsets, row_token),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("row_token", "row_slot", "message"),
    [
        (int32(0, 9), int32(0, 18), "row_token must hold values in [0, 2], got 9 at flat index 1"),
        (
            int32(0, 1),
            int32(0, 6),
            "row_slot must be a slot of the row's own token, in [2, 3] for token 1, got 6 at row 1",
        ),
        (int32(0, 1), int32(-1, 2), "row_slot must be a slot of the row's own token, in [0, 1] for token 0, got -1"),
        (int32(0, 1), int32(0, 2, 4), "row_slot must be int32 of shape [2], got int32 of shape [3]"),
    ],
)
def test_bad_rows_raise_instead_of_writing_elsewhere(row_token: Tensor, row_slot: Tensor, message: str) -> None:
    raw = torch.ops.dynamic_moe
    x, gate_up, down, weights = torch.randn(3, 4), torch.randn(2, 10, 4), torch.randn(2, 4, 5), torch.rand(3, 2)
    offsets = int32(0, 1, 2)
    for call in (
        lambda: raw.expert_mlp(x, gate_up, down, weights, offsets, row_token, row_slot, True),
        lambda: raw.expert_mlp_backward(
            x, x, gate_up, down, weights, offsets, row_token, row_slot, torch.randn(2, 10), True, True, True
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("slot_row", "message"),
    [
        (int32(0, 1, 2, 5).view(2, 2), "slot_row must hold values in [-1, 2], got 5 at flat index 3"),
        (int32(0, 1, -2, 2).view(2, 2), "slot_row must hold values in [-1, 2], got -2 at flat index 2"),
    ],
)
def test_bad_slots_raise(slot_row: Tensor, message: str) -> None:
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.combine(rows, None, slot_row)
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.dynamic_moe.combine_backward(torch.randn(2, 4), rows, None, slot_row, True, True)


def test_combine_backward_wants_no_row_twice() -> None:
    with pytest.raises(ValueError, match="slot_row must name each row once, got row 1 twice"):
        torch.ops.dynamic_moe.combine_backward(
            torch.randn(2, 4), torch.randn(3, 4), None, int32(0, 1, 1, 2).view(2, 2), True, True
        )


def test_combine_gives_no_gradient_to_rows_that_no_slot_names() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    dy = torch.randn(2, 4)
    ops.combine(rows, None, int32(1, -1, -1, 0).view(2, 2)).backward(dy)
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.stack([dy[1], dy[0], torch.zeros(4)]))


class TestRowCapacity:
    """Row buffers of T * K rows give what those of R rows give; smaller ones drop last slots first."""

    @pytest.mark.parametrize("excess", [-9, -1, 0, 1, 5])
    def test_what_does_not_fit_is_dropped(self, excess: int) -> None:
        problem = make_problem(grad=True)
        x, gate_up, down, weights = problem.floats
        capacity = problem.permutation.row_token.numel() + excess
        p = ops.permute(problem.expert_ids, 4, row_capacity=capacity)
        expected = reference.permute(problem.expert_ids, 4, row_capacity=capacity)
        for a, b in zip(p, expected, strict=True):
            assert torch.equal(a, b)
        assert p.overflow.item() == max(-excess, 0)
        assert p.row_token.shape == (capacity,)
        dy = torch.randn_like(x)
        kept = torch.where(p.slot_row >= 0, problem.expert_ids, -1)
        results = []
        for ids, options in ((problem.expert_ids, {"row_capacity": capacity}), (kept, {})):
            y = ops.expert_mlp(x, gate_up, down, ids, weights, **options)
            results.append([y, *torch.autograd.grad(y, problem.floats, dy)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        # Nobody loses a slot before everybody has lost all later ones.
        lost = (p.slot_row < 0) & (problem.permutation.slot_row >= 0)
        held = (p.slot_row >= 0).any(0)
        assert not any(lost[:, k].any() and held[k + 1 :].any() for k in range(lost.shape[1]))

    def test_too_little_is_an_error_in_checked_mode_and_in_the_raw_operator(self) -> None:
        problem = make_problem()
        rows = problem.permutation.row_token.numel()
        message = f"row_capacity must be at least the number of used slots, {rows}, got {rows - 1}"
        with pytest.raises(ValueError, match=message):
            torch.ops.dynamic_moe.permute(problem.expert_ids, 4, rows - 1)
        ops.set_checked_mode(True)
        try:
            ops.permute(problem.expert_ids, 4, row_capacity=rows)
            with pytest.raises(ValueError, match=message):
                ops.permute(problem.expert_ids, 4, row_capacity=rows - 1)
        finally:
            ops.set_checked_mode(False)
        for wrong in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="row_capacity must be an integer of at least 1, got"):
                ops.permute(problem.expert_ids, 4, row_capacity=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="static_rows must be False where row_capacity is given, got True"):
            ops.permute(problem.expert_ids, 4, row_capacity=rows, static_rows=True)

    def test_permutation_is_the_same_with_zeros_behind(self) -> None:
        problem = make_problem()
        exact, static = problem.permutation, ops.permute(problem.expert_ids, 4, static_rows=True)
        rows, slots = exact.row_token.numel(), problem.expert_ids.numel()
        assert rows < slots
        for name in ("tokens_per_expert", "expert_offsets", "slot_row"):
            assert torch.equal(getattr(exact, name), getattr(static, name))
        for name in ("row_token", "row_slot"):
            assert torch.equal(getattr(static, name), pad(getattr(exact, name), (0, slots - rows)))
        for a, b in zip(static[:-1], reference.permute(problem.expert_ids, 4, static_rows=True)[:-1], strict=True):
            assert torch.equal(a, b)
        assert exact.overflow is static.overflow is None

    def test_expert_pass_is_the_same_bit_for_bit(self) -> None:
        problem = make_problem(grad=True)
        x, gate_up, down, weights = problem.floats
        dy = torch.randn_like(x)

        def run(static_rows: bool) -> list[Tensor]:
            y = ops.expert_mlp(x, gate_up, down, problem.expert_ids, weights, static_rows=static_rows)
            return [y, *torch.autograd.grad(y, problem.floats, dy)]

        for a, b in zip(run(True), run(False), strict=True):
            assert torch.equal(a, b)

    def test_products_and_sums_are_the_same_bit_for_bit(self) -> None:
        problem = make_problem(grad=True)
        dy = torch.randn(problem.x.shape[0], problem.gate_up_proj.shape[1], dtype=torch.float64)

        def run(static_rows: bool) -> list[Tensor]:
            p = ops.permute(problem.expert_ids, 4, static_rows=static_rows)
            rows = ops.grouped_matmul(problem.x, problem.gate_up_proj, p.expert_offsets, p.row_token)
            rows = ops.grouped_matmul(rows, problem.gate_up_proj.transpose(1, 2), p.expert_offsets)  # no row_token
            rows = ops.grouped_matmul(rows, problem.gate_up_proj, p.expert_offsets)
            y = ops.combine(rows, problem.expert_weights, p.slot_row)
            return [y, *torch.autograd.grad(y, (problem.x, problem.gate_up_proj, problem.expert_weights), dy)]

        for a, b in zip(run(True), run(False), strict=True):
            assert torch.equal(a, b)

    def test_no_shape_depends_on_data(self) -> None:
        ids = torch.full((5, 3), 2, dtype=torch.int32)  # nothing is selected
        with torch._subclasses.FakeTensorMode() as mode:
            p = ops.permute(mode.from_tensor(ids), 2, static_rows=True)
        assert p.row_token.shape == (15,)
        assert ops.permute(ids, 2, static_rows=True).row_slot.tolist() == [0] * 15


def test_more_tokens_than_int32_can_number_raise() -> None:
    with pytest.raises(ValueError, match=r"the number of tokens must be at most 2147483647.*, got 1099511627776"):
        ops.permute(torch.empty((2**40, 0), dtype=torch.int32), 3)
