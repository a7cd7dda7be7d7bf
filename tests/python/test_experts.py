# SPDX-License-Identifier: Apache-2.0
"""Experts on their own: the call of Hugging Face's experts interface, and the shared expert."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dynamic_moe import SharedExpert, SwiGLUExperts

LOW_PRECISION = [torch.bfloat16, torch.float16]


def swiglu(x_TH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(x_TH, gate_up).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, down)


def loop_over_experts(experts: SwiGLUExperts, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The oracle: one expert after another, as Hugging Face's eager experts do it."""
    y_TH = torch.zeros_like(x_TH)
    for expert in range(experts.num_experts):
        tokens, slots = torch.where(ids_TK == expert)
        out = swiglu(x_TH[tokens], experts.gate_up_proj[expert], experts.down_proj[expert])
        y_TH = y_TH.index_add(0, tokens, out * weights_TK[tokens, slots, None])
    return y_TH


def problem(tokens: int, experts: int, slots: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of unit scale; about a third of the slots is unused, and some expert may get nothing."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    ids_TK = torch.where(torch.rand(tokens, slots, generator=generator) < 0.3, experts, ids_TK)
    weights_TK = torch.rand(tokens, slots, dtype=torch.float64, generator=generator)
    return x_TH, ids_TK, weights_TK.masked_fill(ids_TK == experts, 0.0)


def assert_close_to_float64(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the result; where sums, and not their rounding, are the error, within a few more."""
    assert ours.dtype == dtype
    roundings = 8 if dtype in LOW_PRECISION else 100
    error = (ours.double() - theirs).abs()
    assert (error <= roundings * torch.finfo(dtype).eps * (theirs.abs() + theirs.abs().mean() + 1e-30)).all(), (
        error.max()
    )


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 17),
    experts=st.integers(1, 6),
    slots=st.integers(1, 6),
    hidden=st.integers(1, 19),
    intermediate=st.integers(1, 21),
    seed=st.integers(0, 2**16),
)
def test_output_and_gradients_match_a_loop(
    tokens: int, experts: int, slots: int, hidden: int, intermediate: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = SwiGLUExperts(experts, hidden, intermediate, init_std=1.0, dtype=torch.float64)
    x_TH, ids_TK, weights_TK = problem(tokens, experts, min(slots, experts), hidden, seed)
    results = []
    for function in (module, lambda *arguments: loop_over_experts(module, *arguments)):
        x, weights = x_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        y = function(x, ids_TK, weights)
        gradients = torch.autograd.grad(y.square().sum(), [x, weights, module.gate_up_proj, module.down_proj])
        results.append((y, *gradients))
    used = ids_TK < experts
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        if index == 2:  # the loop has no gradient in unused slots either, but only because no row reads them
            assert (ours[~used] == 0).all()
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item() if theirs.numel() else 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_call_of_the_hugging_face_experts(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = SwiGLUExperts(5, 32, 48, init_std=0.2, dtype=dtype)
    oracle = copy.deepcopy(module).double()
    x_TH, ids_TK, weights_TK = problem(40, 5, 3, 32, seed=1)
    hidden_states = x_TH.to(dtype).requires_grad_()
    top_k_weights = weights_TK.to(dtype).requires_grad_()  # the router of a bfloat16 model gives bfloat16
    wide_states = hidden_states.detach().double().requires_grad_()
    wide_weights = top_k_weights.detach().double().requires_grad_()

    y = module(hidden_states, ids_TK.to(index_dtype), top_k_weights)
    d_y = torch.randn(y.shape).to(dtype)
    y.backward(d_y)
    expected = loop_over_experts(oracle, wide_states, ids_TK, wide_weights)
    expected.backward(d_y.double())
    assert_close_to_float64(y, expected, dtype)
    pairs = [
        (hidden_states, wide_states),
        (top_k_weights, wide_weights),
        *zip(module.parameters(), oracle.parameters(), strict=False),
    ]
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close_to_float64(ours.grad, theirs.grad, dtype)


def test_a_sentinel_slot_is_skipped_whatever_its_weight() -> None:
    module = SwiGLUExperts(3, 8, 8, init_std=1.0)
    x = torch.randn(4, 8)
    ids = torch.tensor([[1, 3], [3, 3], [0, 2], [3, 2]])
    weights = torch.rand(4, 2)
    poisoned = torch.where(ids == 3, float("nan"), weights)
    assert torch.equal(module(x, ids, poisoned), module(x, ids, weights))
    assert (module(x, ids, weights)[1] == 0).all()


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero() -> None:
    module = SwiGLUExperts(3, 8, 8, init_std=1.0)
    module(torch.randn(5, 8), torch.tensor([[0], [2], [0], [2], [2]]), torch.ones(5, 1)).sum().backward()
    assert module.gate_up_proj.grad is not None
    assert module.down_proj.grad is not None
    assert (module.gate_up_proj.grad[1] == 0).all()
    assert (module.down_proj.grad[1] == 0).all()
    assert (module.down_proj.grad[0] != 0).any()


def test_leading_dimensions_are_kept() -> None:
    module = SwiGLUExperts(4, 6, 5, init_std=1.0)
    x, ids, weights = torch.randn(2, 3, 6), torch.randint(0, 5, (2, 3, 1)), torch.rand(2, 3, 1)
    y = module(x, ids, weights)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(6, 6), module(x.reshape(6, 6), ids.reshape(6, 1), weights.reshape(6, 1)))
    assert torch.equal(y[0, 0], module(x[0, 0], ids[0, 0], weights[0, 0]))


def test_non_contiguous_inputs() -> None:
    module = SwiGLUExperts(4, 6, 5, init_std=1.0)
    x, ids, weights = torch.randn(6, 9).T, torch.randint(0, 4, (2, 9)).T, torch.rand(9, 4)[:, ::2]
    expected = module(x.contiguous(), ids.contiguous(), weights.contiguous())
    assert torch.equal(module(x, ids, weights), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_runs_the_products_in_its_dtype(dtype: torch.dtype) -> None:
    module = SwiGLUExperts(4, 16, 16, init_std=0.5)
    x, ids, weights = torch.randn(7, 16), torch.randint(0, 4, (7, 1)), torch.rand(7, 1)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x, ids, weights)
    assert y.dtype == dtype
    assert torch.equal(y, copy.deepcopy(module).to(dtype)(x.to(dtype), ids, weights))
    y.sum().backward()
    assert module.down_proj.grad is not None
    assert module.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
def test_the_shared_expert_is_a_dense_swiglu(gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = SharedExpert(24, 40, gated=gated, init_std=0.2, dtype=dtype)
    oracle = copy.deepcopy(module).double()
    x = torch.randn(2, 9, 24).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    d_y = torch.randn(x.shape).to(dtype)

    y = module(x)
    y.backward(d_y)
    expected = swiglu(wide, oracle.gate_up_proj, oracle.down_proj)
    if oracle.gate is not None:
        expected = expected * functional.linear(wide, oracle.gate).sigmoid()
    expected.backward(d_y.double())
    assert_close_to_float64(y, expected, dtype)
    for ours, theirs in ((x, wide), *zip(module.parameters(), oracle.parameters(), strict=True)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close_to_float64(ours.grad, theirs.grad, dtype)


def test_the_gate_of_the_shared_expert_is_float32_under_autocast() -> None:
    module = SharedExpert(16, 8, gated=True, init_std=1.0)
    x = torch.randn(5, 16)
    seen: list[torch.dtype] = []
    original = torch.Tensor.sigmoid

    def sigmoid(tensor: Tensor) -> Tensor:
        seen.append(tensor.dtype)
        return original(tensor)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch.Tensor, "sigmoid", sigmoid)
        module(x)
    assert seen == [torch.float32]


@pytest.mark.parametrize("module", [SwiGLUExperts(4, 6, 5), SharedExpert(6, 5, gated=True), SharedExpert(6, 5)])
def test_construction_on_the_meta_device(module: nn.Module) -> None:
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()  # type: ignore[operator]
    for name, parameter in empty.named_parameters():
        assert parameter.isfinite().all(), name
        assert 0.005 < parameter.std() < 0.08, name


ROUTED = SwiGLUExperts(4, 6, 5)
X, IDS, WEIGHTS = torch.zeros(3, 6), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ROUTED(X[:, :5], IDS, WEIGHTS), "x has width 5, but the module was built with hidden_size=6"),
        (
            lambda: ROUTED(X.double(), IDS, WEIGHTS),
            "x must have the dtype of the weights, torch.float32.*torch.float64",
        ),
        (lambda: ROUTED(X, IDS.float(), WEIGHTS), "expert_ids must be an int32 or int64 tensor, got torch.float32"),
        (lambda: ROUTED(X, IDS[:2], WEIGHTS[:2]), r"expert_ids must have shape \[3, 'K'\] with K >= 1.*got \[2, 2\]"),
        (lambda: ROUTED(X, IDS[:, :0], WEIGHTS[:, :0]), r"expert_ids must have shape .* got \[3, 0\]"),
        (lambda: ROUTED(X, IDS[0], WEIGHTS[0]), r"expert_ids must have shape .* got \[2\]"),
        (lambda: ROUTED(X, IDS, WEIGHTS[:, :1]), r"expert_weights must be a floating-point \[3, 2\].*\[3, 1\]"),
        (lambda: ROUTED(X, IDS, IDS), "expert_weights must be a floating-point .* got torch.int64"),
        (lambda: SharedExpert(6, 5)(X[:, :2]), "x has width 2, but the module was built with hidden_size=6"),
        (lambda: SharedExpert(6, 5)(X.half()), "x must have the dtype of the weights, torch.float32.*torch.float16"),
        (lambda: SwiGLUExperts(0, 6, 5), "num_experts must be an integer of at least 1, got 0"),
        (lambda: SwiGLUExperts(4, -1, 5), "hidden_size must be an integer of at least 1, got -1"),
        (lambda: SwiGLUExperts(4, 6, True), "intermediate_size must be an integer of at least 1, got True"),
        (lambda: SharedExpert(6, 5, init_std=float("inf")), "init_std must be finite and at least 0, got inf"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_shows_the_sizes() -> None:
    assert repr(ROUTED) == "SwiGLUExperts(num_experts=4, hidden_size=6, intermediate_size=5)"
    assert repr(SharedExpert(6, 5)) == "SharedExpert(hidden_size=6, intermediate_size=5, gated=False)"
