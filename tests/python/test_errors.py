# SPDX-License-Identifier: Apache-2.0
"""Whatever the arguments: an error that names them, or a result; never a crash, never a read or write elsewhere.

The errors of single arguments of the public functions are tested beside each function; here are the raw operators,
random index tensors, sizes of zero, sizes beyond int32, and tensors of unusual kinds.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamic_moe import ops, reference

raw = torch.ops.dynamic_moe

T, E, K, H, I = 3, 2, 2, 4, 5  # noqa: E741
INT_MAX = 2**31 - 1


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- random index tensors -------------------------------------------------------------------------------------------

indices = st.integers(-2, 7) | st.sampled_from([INT_MAX, INT_MAX - 1, -(2**31), 2**30, 65536])


def index_lists(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(indices, min_size=size, max_size=size) | st.lists(indices, max_size=9)


def raises_or_is_finite(call: Callable[[], Any]) -> None:
    message = ""
    try:
        result = call()
    except ValueError as error:
        message, result = str(error), ()
    assert not message or re.search(r"\w+ must ", message)
    for tensor in result if isinstance(result, tuple) else (result,):
        if tensor.is_floating_point():
            assert tensor.isfinite().all()


@given(offsets=index_lists(E + 1), row_token=st.none() | index_lists(3))
def test_random_groups(offsets: list[int], row_token: list[int] | None) -> None:
    x, weight = torch.randn(T, H), torch.randn(E, I, H)
    token = None if row_token is None else int32(row_token)
    dy = torch.randn(T if token is None else len(token), I)
    raises_or_is_finite(lambda: ops.grouped_matmul(x, weight, int32(offsets), token))
    raises_or_is_finite(lambda: raw.grouped_matmul(x, weight, int32(offsets), token))
    raises_or_is_finite(lambda: raw.grouped_matmul_dx(dy, weight, int32(offsets), token, T))
    raises_or_is_finite(lambda: raw.grouped_matmul_dw(dy, x, int32(offsets), token))


@given(offsets=index_lists(E + 1), row_token=index_lists(3), row_slot=index_lists(3))
def test_random_rows(offsets: list[int], row_token: list[int], row_slot: list[int]) -> None:
    x, weights = torch.randn(T, H), torch.randn(T, K)
    gate_up_proj, down_proj = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    problem = (x, gate_up_proj, down_proj, weights, int32(offsets), int32(row_token), int32(row_slot))
    raises_or_is_finite(lambda: raw.expert_mlp(*problem, True))
    pre_activation = torch.randn(len(row_token), 2 * I)
    raises_or_is_finite(lambda: raw.expert_mlp_backward(x, *problem, pre_activation, True, True, True))
    permutation = ops.Permutation(
        int32([1, 2]), int32(offsets), int32(row_token), int32(row_slot), int32([0, -1] * T).view(T, K)
    )
    ids = torch.zeros(T, K, dtype=torch.int32)
    raises_or_is_finite(lambda: ops.expert_mlp(x, gate_up_proj, down_proj, ids, weights, permutation))


@given(slots=st.lists(indices, min_size=T * K, max_size=T * K))
def test_random_slots(slots: list[int]) -> None:
    rows, weights, slot_row = torch.randn(4, H), torch.randn(T, K), int32(slots).view(T, K)
    raises_or_is_finite(lambda: ops.combine(rows, weights, slot_row))
    raises_or_is_finite(lambda: raw.combine_backward(torch.randn(T, H), rows, weights, slot_row, True, True))


@given(ids=st.lists(indices, min_size=T * K, max_size=T * K))
def test_random_expert_ids(ids: list[int]) -> None:
    expert_ids = int32(ids).view(T, K)
    for wide in (expert_ids, expert_ids.long() * 2**20):
        permutation = ops.permute(wide, E)
        assert int(permutation.expert_offsets[-1]) == sum(0 <= e < E for e in wide.flatten().tolist())
    probabilities = torch.rand(T, E)
    raises_or_is_finite(
        lambda: raw.gating_backward(
            probabilities, expert_ids, torch.rand(T), None, torch.rand(T, K), *[None] * 4, False, 1.0, torch.float32
        )
    )


# ---- arguments of the raw operators ---------------------------------------------------------------------------------

LOGITS = torch.zeros(T, E)
GATING_BACKWARD: dict[str, Any] = {
    "probabilities": torch.rand(T, E),
    "expert_ids": int32([0, 1, 1, 2, 0, 2]).view(T, K),
    "entropy": torch.rand(T),
    "token_mask": None,
    "d_expert_weights": torch.rand(T, K),
    "d_probabilities": None,
    "d_probability_sum": None,
    "d_entropy": None,
    "d_logsumexp": None,
    "renormalize": False,
    "temperature": 1.0,
    "logits_dtype": torch.float32,
}
PERMUTATION = ops.permute(GATING_BACKWARD["expert_ids"], E)
EXPERT_MLP: dict[str, Any] = {
    "x": torch.rand(T, H),
    "gate_up_proj": torch.rand(E, 2 * I, H),
    "down_proj": torch.rand(E, H, I),
    "expert_weights": torch.rand(T, K),
    "expert_offsets": PERMUTATION.expert_offsets,
    "row_token": PERMUTATION.row_token,
    "row_slot": PERMUTATION.row_slot,
}
BACKWARD = EXPERT_MLP | {
    "dy": torch.rand(T, H),
    "pre_activation": torch.rand(len(PERMUTATION.row_token), 2 * I),
    "need_x": True,
    "need_weights": True,
    "need_expert_weights": True,
}


def gating_backward(**changes: Any) -> Any:
    return raw.gating_backward(**(GATING_BACKWARD | changes))


def expert_mlp(**changes: Any) -> Any:
    return raw.expert_mlp(**(EXPERT_MLP | {"keep_pre_activation": True} | changes))


def backward(**changes: Any) -> Any:
    return raw.expert_mlp_backward(**(BACKWARD | changes))


def test_the_unchanged_arguments_are_fine() -> None:
    gating_backward()
    expert_mlp()
    backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: raw.top_p_gating(LOGITS, 0.0, 2, False, False, 1.0, None, False), "top_p must be in (0, 1], got 0"),
        (lambda: raw.top_p_gating(LOGITS, 1.1, 2, False, False, 1.0, None, False), "top_p must be in (0, 1], got 1.1"),
        (
            lambda: raw.top_p_gating(LOGITS, torch.nan, 2, False, False, 1.0, None, False),
            "top_p must be in (0, 1], got nan",
        ),
        (
            lambda: raw.top_p_gating(LOGITS, 0.5, 3, False, False, 1.0, None, False),
            "max_experts must be in [1, 2], got 3",
        ),
        (lambda: raw.top_k_gating(LOGITS, 0, False, 1.0, None, False), "k must be in [1, 2], got 0"),
        (lambda: raw.top_k_gating(LOGITS, 2**40, False, 1.0, None, False), f"k must be in [1, 2], got {2**40}"),
        (lambda: raw.top_k_gating(LOGITS, 1, False, -1.0, None, False), "temperature must be positive and finite"),
        (lambda: raw.top_k_gating(LOGITS, 1, False, torch.inf, None, False), "temperature must be positive and finite"),
        (
            lambda: raw.top_k_gating(LOGITS.long(), 1, False, 1.0, None, False),
            "logits must be float32, float64, bfloat16 or float16, got int64",
        ),
        (lambda: raw.top_k_gating(LOGITS[0], 1, False, 1.0, None, False), "logits must be float32 of shape [any, any]"),
        (
            lambda: raw.top_k_gating(LOGITS, 1, False, 1.0, torch.ones(T), False),
            "token_mask must be bool of shape [3], got float32 of shape [3]",
        ),
        (lambda: gating_backward(entropy=torch.rand(T + 1)), "entropy must be float32 of shape [3], got float32 of"),
        (lambda: gating_backward(d_expert_weights=torch.rand(T, K).double()), "d_expert_weights must be float32 of"),
        (lambda: gating_backward(d_probability_sum=torch.rand(T)), "d_probability_sum must be float32 of shape [2]"),
        (lambda: gating_backward(temperature=0.0), "temperature must be positive and finite, got 0"),
        (lambda: gating_backward(logits_dtype=torch.int32), "logits_dtype must be float32, float64, bfloat16 or"),
        (lambda: raw.permute(LOGITS, 2), "expert_ids must be int32 of shape [any, any], got float32 of shape [3, 2]"),
        (lambda: raw.permute(int32([0]).view(1, 1), -1), "num_experts must be in [1, 2147483646], got -1"),
        (lambda: expert_mlp(x=torch.rand(T, H + 1)), "down_proj must be float32 of shape [any, 5, any], got"),
        (lambda: expert_mlp(expert_weights=torch.rand(T, K).bfloat16()), "expert_weights must be float32 of shape"),
        (lambda: expert_mlp(expert_offsets=PERMUTATION.expert_offsets.long()), "expert_offsets must be int32 of shape"),
        (lambda: backward(dy=torch.rand(T, H).half()), "dy must be float32 of shape [3, 4], got float16 of shape"),
        (lambda: backward(pre_activation=torch.rand(1, 2 * I)), "pre_activation must be float32 of shape [4, 10], got"),
        (
            lambda: raw.grouped_matmul_dx(torch.rand(2, 3), torch.rand(1, 3, 4), int32([0, 2]), int32([0, 0]), 2**31),
            "num_tokens must be in [0, 2147483647], got 2147483648",
        ),
        (
            lambda: raw.grouped_matmul_dx(torch.rand(2, 3), torch.rand(1, 3, 4), int32([0, 2]), int32([0, 0]), -1),
            "num_tokens must be in [0, 2147483647], got -1",
        ),
        (
            lambda: raw.grouped_matmul(torch.rand(2, 4), torch.rand(0, 3, 4), int32([0]), None),
            "the number of experts must be in [1, 2147483646], got 0",
        ),
    ],
)
def test_raw_operators_name_the_argument_the_value_and_the_bound(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_more_slots_than_int32_can_number_are_an_error() -> None:
    """No memory is behind these sizes: they are checked before anything is allocated or read."""
    no_tokens = torch.empty(0, 2**31, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"the number of experts per token .*must be at most 2147483647"):
        ops.permute(no_tokens, 2)
    with pytest.raises(ValueError, match=r"num_experts must be in \[1, 2147483646\], got 2147483648"):
        ops.permute(torch.zeros(1, 1, dtype=torch.int32), 2**31)


@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(3, 0, 5), (3, 4, 0), (3, 0, 0), (0, 0, 0), (0, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sizes_of_zero_give_empty_sums(tokens: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    shapes = [(tokens, hidden), (E, 2 * intermediate, hidden), (E, hidden, intermediate)]
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(tokens, K, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    ids = torch.randint(0, E, (tokens, K), dtype=torch.int32)
    y = ops.expert_mlp(*tensors, ids, weights)
    assert y.shape == (tokens, hidden)
    assert (y == 0).all()
    for tensor, gradient in zip(
        [*tensors, weights], torch.autograd.grad(y, [*tensors, weights], torch.ones_like(y)), strict=True
    ):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()
    permutation = ops.permute(ids, E)
    rows = ops.grouped_matmul(tensors[0], tensors[1], permutation.expert_offsets, permutation.row_token)
    assert rows.shape == (tokens * K, 2 * intermediate)
    assert (rows == 0).all() or (hidden > 0 and intermediate > 0)
    combined = ops.combine(torch.zeros(tokens * K, hidden, dtype=dtype), weights, permutation.slot_row)
    assert combined.shape == (tokens, hidden)


# ---- tensors of unusual kinds ---------------------------------------------------------------------------------------


def test_lazily_negated_tensors_are_read_as_what_they_mean() -> None:
    """The imaginary part of a conjugate is a view with a flag: its memory holds the opposite numbers."""
    x = torch.randn(T, H, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    others = EXPERT_MLP["gate_up_proj"], EXPERT_MLP["down_proj"], GATING_BACKWARD["expert_ids"], torch.rand(T, K)
    assert torch.equal(ops.expert_mlp(x, *others), ops.expert_mlp(x.clone(), *others))
    logits = torch.randn(T, E, dtype=torch.complex64).conj().imag
    for lazy, plain in zip(ops.top_p_gating(logits), ops.top_p_gating(logits.clone()), strict=True):
        assert torch.equal(lazy, plain)


def test_expanded_tensors_are_read_as_what_they_mean() -> None:
    x = torch.randn(1, H).expand(T, H)
    weight = torch.randn(1, I, H).expand(E, I, H)
    offsets = int32([0, 2, 3])
    expected = reference.grouped_matmul(x, weight, offsets)
    torch.testing.assert_close(ops.grouped_matmul(x, weight, offsets), expected)


@pytest.mark.parametrize("kind", ["sparse", "meta", "list", "none"])
def test_what_the_kernels_cannot_read_is_an_error(kind: str) -> None:
    x = torch.randn(T, H)
    strange: Any = {"sparse": x.to_sparse(), "meta": x.to("meta"), "list": x.tolist(), "none": None}[kind]
    errors = (ValueError, TypeError, RuntimeError)  # NotImplementedError is a RuntimeError
    with pytest.raises(errors):
        ops.grouped_matmul(strange, torch.randn(E, I, H), int32([0, 1, 3]))
    with pytest.raises(errors):
        ops.combine(strange, None, torch.zeros(T, K, dtype=torch.int32))
    if kind != "meta":  # no other argument is on another device
        with pytest.raises(errors):
            ops.top_k_gating(strange)
