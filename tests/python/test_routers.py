# SPDX-License-Identifier: Apache-2.0
"""Routers: the rules, their options, float32 logits, and a rule of one's own."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from dynamic_moe import Router, Routing, TopKRouter, TopPRouter
from dynamic_moe.models.activation_router import ActivationDtypeTopPRouter
from dynamic_moe.routers import base as routers_base

# Rows of logits, and what top-p selects from them, worked by hand from Huang et al. 2024, eq. 2-5.
LOGITS = torch.tensor(
    [[2.0, 0.0, -1.0, 0.5], [0.2, 0.1, 0.0, -0.1], [1.0, 0.8, 0.0, -2.0], [-0.5, 0.9, 0.7, 0.3]], dtype=torch.float64
)
SELECTED = {
    0.4: ([[0], [0, 1], [0], [1, 2]], [0.710100, 0.549834, 0.447148, 0.695728]),
    0.6: ([[0], [0, 1, 2], [0, 1], [1, 2]], [0.710100, 0.786162, 0.813241, 0.695728]),
    0.9: ([[0, 3, 1], [0, 1, 2, 3], [0, 1, 2], [1, 2, 3]], [0.964646, 1.0, 0.977738, 0.905668]),
}


def with_logits(router: Any, logits_TE: Tensor) -> Routing:
    """Route unit vectors through a router whose weight maps token t to row t of the logits."""
    num_tokens = logits_TE.shape[0]
    with torch.no_grad():
        router.to(logits_TE.dtype).weight.copy_(logits_TE.T)
    routing: Routing = router(torch.eye(num_tokens, dtype=logits_TE.dtype))
    return routing


def tensors_in(routing: Routing) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(routing) if leaf is not None]


def selected(routing: Routing) -> list[list[int]]:
    return [[e for e in row if e < routing.num_experts] for row in routing.expert_ids.tolist()]


@pytest.mark.parametrize("p", SELECTED)
def test_top_p_selects_the_worked_experts(p: float) -> None:
    ids, mass = SELECTED[p]
    routing = with_logits(TopPRouter(4, 4, p=p), LOGITS)
    assert selected(routing) == ids
    assert routing.experts_per_token.tolist() == [len(row) for row in ids]
    assert routing.expert_weights.sum(-1).tolist() == pytest.approx(mass, abs=6e-7)
    assert routing.expert_ids.shape == (4, 4)
    assert torch.equal(routing.logits, LOGITS)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_top_p_never_exceeds_the_cap(num_slots: int) -> None:
    routing = with_logits(TopPRouter(4, 4, p=0.9, max_experts=num_slots), LOGITS)
    assert selected(routing) == [row[:num_slots] for row in SELECTED[0.9][0]]
    assert routing.expert_ids.shape == (4, num_slots)


def test_the_threshold_rules_differ_where_the_mass_equals_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert selected(with_logits(TopPRouter(1, 4, p=0.5), logits)) == [[0]]
    assert selected(with_logits(TopPRouter(1, 4, p=0.5, threshold_rule="released"), logits)) == [[0, 1]]


@pytest.mark.parametrize(
    ("p", "rule", "count"), [(0.4, "paper", 7), (0.4, "released", 7), (0.5, "paper", 8), (0.5, "released", 9)]
)
def test_uniform_probabilities_of_sixteen_experts(p: float, rule: Any, count: int) -> None:
    routing = with_logits(TopPRouter(1, 16, p=p, threshold_rule=rule), torch.zeros(1, 16))
    assert selected(routing) == [list(range(count))]


def test_p_of_one_selects_every_expert() -> None:
    assert with_logits(TopPRouter(4, 4, p=1.0), LOGITS).experts_per_token.tolist() == [4, 4, 4, 4]


def test_renormalized_weights_sum_to_one() -> None:
    routing = with_logits(TopPRouter(4, 4, p=0.6, renormalize=True), LOGITS)
    assert selected(routing) == SELECTED[0.6][0]
    assert routing.expert_weights.sum(-1).tolist() == pytest.approx([1.0] * 4)


def test_temperature_divides_the_logits() -> None:
    hot = with_logits(TopPRouter(4, 4, temperature=2.0), LOGITS)
    torch.testing.assert_close(hot.probabilities, (LOGITS / 2.0).softmax(-1))
    torch.testing.assert_close(hot.logsumexp, (LOGITS / 2.0).logsumexp(-1))
    assert torch.equal(hot.logits, LOGITS)


@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k_takes_the_k_most_probable(renormalize: bool) -> None:
    routing = with_logits(TopKRouter(4, 4, k=3, renormalize=renormalize), LOGITS)
    values, ids = LOGITS.softmax(-1).topk(3)
    assert torch.equal(routing.expert_ids, ids.int())
    torch.testing.assert_close(routing.expert_weights, values / values.sum(-1, keepdim=True) if renormalize else values)


def test_defaults_are_those_of_the_papers() -> None:
    top_p, top_k = TopPRouter(8, 4), TopKRouter(8, 4)
    assert (top_p.p, top_p.max_experts, top_p.renormalize, top_p.threshold_rule) == (0.4, None, False, "paper")
    assert (top_k.k, top_k.renormalize) == (2, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_exact_float32_for_low_precision_inputs(dtype: torch.dtype, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    router = TopPRouter(64, 8, init_std=1.0, dtype=dtype)
    x = torch.randn(10, 64, generator=generator).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x)
    assert routing.logits.dtype == torch.float32
    exact = x.double() @ router.weight.double().T
    torch.testing.assert_close(routing.logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_touch_a_float32_router() -> None:
    router, x = TopPRouter(32, 4, init_std=1.0), torch.randn(6, 32)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    for ours, theirs in zip(tensors_in(routing), tensors_in(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_does_not_touch_a_rule_of_ones_own() -> None:
    class Projected(TopKRouter):
        def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
            return super().select(logits_TE @ torch.eye(self.num_experts), token_mask_T)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Projected(8, 4)(torch.randn(3, 8)).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_match_float64_and_keep_no_wide_copy_of_x(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    router = TopKRouter(64, 8, init_std=0.5, dtype=dtype)
    oracle = copy.deepcopy(router).double()
    x = torch.randn(12, 64, generator=generator).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = router.logits(x)
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in kept} == {((12, 64), dtype), ((8, 64), dtype)}
    d_logits = torch.randn(12, 8, generator=generator)
    logits.backward(d_logits)
    oracle.logits(wide).backward(d_logits.double())
    assert x.grad is not None
    assert wide.grad is not None
    assert router.weight.grad is not None
    assert oracle.weight.grad is not None
    for ours, theirs in ((x.grad, wide.grad), (router.weight.grad, oracle.weight.grad)):
        assert ours.dtype == dtype
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_a_backward_pass_inside_autocast_is_not_rounded() -> None:
    router = TopKRouter(64, 8, init_std=0.5)
    x = torch.randn(12, 64).bfloat16()  # a bfloat16 activation meets a float32 weight
    d_logits = torch.randn(12, 8)
    router.logits(x).backward(d_logits)
    expected, router.weight.grad = router.weight.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router.logits(x).backward(d_logits)
    assert expected is not None
    assert router.weight.grad is not None
    assert torch.equal(router.weight.grad, expected)


def test_float64_is_float64_throughout() -> None:
    routing = TopPRouter(8, 4, dtype=torch.float64)(torch.randn(3, 8, dtype=torch.float64))
    assert {tensor.dtype for tensor in tensors_in(routing)} == {torch.float64, torch.int32}


def test_a_frozen_router_still_differentiates_its_input() -> None:
    router = TopPRouter(8, 4, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    router.logits(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert router.weight.grad is None


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(0, 9), experts=st.integers(1, 6), p=st.floats(0.05, 1.0), seed=st.integers(0, 2**16))
def test_top_p_is_the_shortest_prefix_that_reaches_p(tokens: int, experts: int, p: float, seed: int) -> None:
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    router = TopPRouter(5, experts, p=p, dtype=torch.float64)
    routing = router.select(logits)
    for row, ids in zip(logits.softmax(-1), selected(routing), strict=True):
        mass = row[ids].cumsum(0)
        assert ids == row.argsort(descending=True)[: len(ids)].tolist()
        assert mass[-1] >= min(p, 1.0) - 1e-12
        assert len(ids) == 1 or mass[-2] < p + 1e-12


class ThresholdRouter(Router):
    """Routes each token to the experts whose probability is at least 1 / E."""

    def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        probabilities_TE = logits_TE.softmax(-1)
        weights_TE, ids_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
        ids_TE = ids_TE.masked_fill(weights_TE < 1 / self.num_experts, self.num_experts)
        return Routing.from_selection(logits_TE, ids_TE, weights_TE, token_mask_T=token_mask_T)


def test_a_rule_of_ones_own_needs_one_method() -> None:
    routing = with_logits(ThresholdRouter(4, 4), LOGITS)
    assert selected(routing) == [[0], [0, 1], [0, 1], [1, 2]]
    probabilities = LOGITS.softmax(-1)
    assert routing.expert_weights[2, :2].tolist() == pytest.approx(probabilities[2, :2].tolist())
    assert routing.tokens_per_expert.tolist() == [3, 3, 1, 0]


def test_a_rule_without_select_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="Router must define select"):
        Router(4, 4)(torch.randn(2, 4))


@pytest.mark.parametrize("make", [TopPRouter, TopKRouter, ThresholdRouter])
def test_leading_dimensions_and_mask_are_flattened(make: type[Router]) -> None:
    router = make(6, 4)
    x = torch.randn(2, 3, 6)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    routing = router(x, mask)
    flat = router(x.reshape(6, 6), mask.reshape(6))
    fields = zip((*routing[:-1], *routing.scores_for("test")), (*flat[:-1], *flat.scores_for("test")), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in fields)
    assert (routing.experts_per_token > 0).tolist() == mask.flatten().tolist()


@pytest.mark.level_independent
@pytest.mark.parametrize("make", [TopPRouter, TopKRouter, ThresholdRouter])
def test_routers_compile_into_one_graph(make: type[Router]) -> None:
    router = make(6, 4)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 6)
        for ours, theirs in zip(compiled(x)[:-1], router(x)[:-1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_shallow_copy_has_a_p_of_its_own() -> None:
    router = TopPRouter(8, 4, p=0.2, init_std=2.0)
    x = torch.randn(6, 8)
    copy.copy(router).p = 1.0
    assert router.p == 0.2
    compiled = torch.compile(router, backend="aot_eager")
    assert torch.equal(compiled(x).expert_ids, router(x).expert_ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopPRouter(4, 4, p=0.0), r"p must be in \(0, 1\], got 0.0"),
        (lambda: TopPRouter(4, 4, p=1.5), r"p must be in \(0, 1\], got 1.5"),
        (lambda: TopPRouter(4, 4, p=float("nan")), r"p must be in \(0, 1\], got nan"),
        (lambda: TopPRouter(4, 4, max_experts=5), "max_experts must be at most num_experts=4, got 5"),
        (lambda: TopPRouter(4, 4, max_experts=0), "max_experts must be an integer of at least 1, got 0"),
        (
            lambda: TopPRouter(4, 4, threshold_rule="strict"),
            "threshold_rule must be 'paper' or 'released', got 'strict'",
        ),  # type: ignore[arg-type]
        (lambda: TopPRouter(4, 4, temperature=0.0), "temperature must be finite and above 0, got 0.0"),
        (lambda: TopKRouter(4, 4, k=5), "k must be at most num_experts=4, got 5"),
        (lambda: TopKRouter(4, 4, k=0), "k must be an integer of at least 1, got 0"),
        (lambda: TopPRouter(4, 4, torch.tensor(0.5)), r"p must be a number .* got tensor.*item\(\)"),  # type: ignore[arg-type]
        (lambda: TopKRouter(4, 4, temperature="1"), "temperature must be a number, got '1'"),
        (lambda: TopPRouter(4, 4, temperature=torch.ones(())), r"temperature must be a number, got tensor.*item\(\)"),
        (lambda: TopKRouter(4, 4, dtype=torch.float8_e4m3fn), "dtype must be float32, .*, got torch.float8_e4m3fn"),
        (lambda: TopKRouter(4, 4, temperature=-1.0), "temperature must be finite and above 0, got -1.0"),
        (lambda: TopPRouter(0, 4), "hidden_size must be an integer of at least 1, got 0"),
        (lambda: TopPRouter(4, 2.0), "num_experts must be an integer of at least 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: TopPRouter(4, 4, init_std=-0.1), "init_std must be finite and at least 0, got -0.1"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(3, 5), None, "x has width 5, but the module was built with hidden_size=4"),
        (torch.zeros(()), None, r"x must have shape \[..., 4\], got a scalar"),
        (torch.zeros(3, 4, dtype=torch.int32), None, "x must be a floating-point tensor, got torch.int32"),
        (torch.zeros(3, 4), torch.ones(3), "token_mask must be a bool tensor .*, got torch.float32"),
        (
            torch.zeros(3, 4),
            torch.ones(2, dtype=torch.bool),
            r"token_mask must have the leading shape of x, \[3\], got \[2\]",
        ),
    ],
)
def test_wrong_inputs_are_named(x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopPRouter(4, 4)(x, mask)


def test_repr_shows_the_options() -> None:
    assert repr(TopPRouter(8, 4, p=0.3, max_experts=2)) == (
        "TopPRouter(hidden_size=8, num_experts=4, p=0.3, max_experts=2, renormalize=False, threshold_rule='paper', "
        "temperature=1.0)"
    )
    assert repr(TopKRouter(8, 4)) == "TopKRouter(hidden_size=8, num_experts=4, k=2, renormalize=True, temperature=1.0)"


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: TopPRouter(8, 4, 0.3, init_std=0.4, dtype=torch.float64, **options),
        lambda **options: TopKRouter(8, 4, 1, init_std=0.4, dtype=torch.float64, **options),
        lambda **options: ActivationDtypeTopPRouter(8, 4, 0.3, init_std=0.4, dtype=torch.float64, **options),
    ],
    ids=["top-p", "top-1", "activation dtype"],
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.level_independent)])
@pytest.mark.filterwarnings("ignore:.*renormalize=True")
def test_straight_through_keeps_the_weights_and_lets_the_gradient_through(make: Any, compiled: bool) -> None:
    torch._dynamo.reset()  # each of these routers is compiled anew, and has no part in the limit of others
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(renormalize: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        router = make(renormalize=renormalize)
        function = torch.compile(router, backend="aot_eager", fullgraph=True) if compiled else router
        weights = function(x).expert_weights
        (weights * upstream[:, : weights.shape[1]]).sum().backward()
        return weights.detach(), router.weight.grad

    (plain, gradient), (divided, _), (weights, through) = run(False), run(True), run("straight_through")
    assert ((divided > 0).sum(1) == 1).sum() > 5
    assert torch.equal(weights, divided)
    assert not torch.equal(weights, plain)
    torch.testing.assert_close(through, gradient)


def test_a_token_without_a_gradient_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers_base, "_has_warned_of_single_experts", False)
    x = torch.randn(5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopPRouter(8, 4, 0.3, renormalize="straight_through")(x)
        TopPRouter(8, 4, 0.3)(x)
        TopKRouter(8, 4, 2)(x)
        TopKRouter(8, 4, 1).eval()(x)
        with torch.no_grad():
            TopKRouter(8, 4, 1)(x)
    with pytest.warns(
        UserWarning, match=r"^TopKRouter\(renormalize=True\): 5 of 5 tokens have one expert.*straight_thr"
    ):
        TopKRouter(8, 4, 1)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(8, 4, 1)(x)


@pytest.mark.parametrize("router", [TopKRouter, TopPRouter])
def test_an_unknown_way_to_renormalize_is_named(router: Any) -> None:
    with pytest.raises(ValueError, match="renormalize must be False, True or 'straight_through', got 'straight'"):
        router(8, 4, renormalize="straight")
