# SPDX-License-Identifier: Apache-2.0
"""top_p_gating and top_k_gating: the rules, the worked numbers, the edges, the errors."""

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynamic_moe import DynamicMoE, TopPRouter, ops, reference

LOGITS = [[2.0, 0.0, -1.0, 0.5], [0.2, 0.1, 0.0, -0.1], [1.0, 0.8, 0.0, -2.0], [-0.5, 0.9, 0.7, 0.3]]
FLOATS = ("expert_weights", "probabilities", "probability_sum", "entropy", "logsumexp")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"threshold_rule": "released", "renormalize": True},
    {"temperature": 0.7, "max_experts": 2},
    {"renormalize": True, "temperature": 1.5},
]


def selected(gating: ops.Gating) -> list[list[int]]:
    num_experts = gating.probabilities.shape[1]
    return [[e for e in row if e != num_experts] for row in gating.expert_ids.tolist()]


def assert_same_gating(actual: ops.Gating, expected: ops.Gating, tolerance: float) -> None:
    for name, a, b in zip(ops.Gating._fields, actual, expected, strict=True):
        assert_close(
            a, b, atol=tolerance, rtol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("p", "experts", "mass"),
    [
        (0.4, [[0], [0, 1], [0], [1, 2]], [0.710100, 0.549834, 0.447148, 0.695728]),
        (0.6, [[0], [0, 1, 2], [0, 1], [1, 2]], [0.710100, 0.786162, 0.813241, 0.695728]),
        (0.9, [[0, 3, 1], [0, 1, 2, 3], [0, 1, 2], [1, 2, 3]], [0.964646, 1.0, 0.977738, 0.905668]),
    ],
)
def test_worked_example(p: float, experts: list[list[int]], mass: list[float], dtype: torch.dtype) -> None:
    gating = ops.top_p_gating(torch.tensor(LOGITS, dtype=dtype), p)
    assert selected(gating) == experts
    assert_close(gating.expert_weights.sum(1), torch.tensor(mass, dtype=dtype), atol=2e-6, rtol=0)
    assert_close(gating.entropy, torch.tensor([0.878281, 1.380071, 1.109368, 1.281602], dtype=dtype), atol=2e-6, rtol=0)
    assert_close(
        gating.probability_sum / 4,
        torch.tensor([0.385058, 0.276478, 0.187343, 0.151121], dtype=dtype),
        atol=2e-6,
        rtol=0,
    )


@pytest.mark.parametrize(("rule", "p", "count"), [("paper", 0.5, 8), ("released", 0.5, 9), ("paper", 0.4, 7)])
def test_uniform_probabilities_break_ties_by_lower_index(rule: Any, p: float, count: int) -> None:
    gating = ops.top_p_gating(torch.zeros(3, 16), p, threshold_rule=rule)
    assert selected(gating) == [list(range(count))] * 3


def test_the_rules_differ_where_the_mass_is_exactly_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    assert selected(ops.top_p_gating(logits, 0.5)) in ([[0]], [[0, 1]])  # log and exp round
    exact = torch.tensor([[0.0, 0.0]])  # [0.5, 0.5] without rounding
    assert selected(ops.top_p_gating(exact, 0.5, threshold_rule="paper")) == [[0]]
    assert selected(ops.top_p_gating(exact, 0.5, threshold_rule="released")) == [[0, 1]]


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_p_of_one_selects_all(rule: Any) -> None:
    assert_close(
        ops.top_p_gating(torch.randn(5, 6) * 20, 1.0, threshold_rule=rule).tokens_per_expert.sum(), torch.tensor(30)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (17, 2), (40, 8), (40, 33)])
def test_top_p_matches_the_reference(tokens: int, experts: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**options, "max_experts": min(options.get("max_experts", experts), experts)}
    logits = torch.randn(tokens, experts).to(dtype)
    expected = reference.top_p_gating(logits, 0.57, **options)
    assert_same_gating(ops.top_p_gating(logits, 0.57, **options), expected, 2e-5)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 2), (33, 8), (5, 5)])
def test_top_k_matches_the_reference(experts: int, k: int, renormalize: bool) -> None:
    logits = torch.randn(40, experts)
    expected = reference.top_k_gating(logits, k, renormalize=renormalize)
    assert_same_gating(ops.top_k_gating(logits, k, renormalize=renormalize), expected, 2e-5)


def test_masked_tokens_get_nothing_and_count_nowhere() -> None:
    logits = torch.randn(6, 4)
    mask = torch.tensor([True, False, True, True, False, True])
    logits[4] = math.nan
    gating = ops.top_p_gating(logits, 0.7, token_mask=mask, check_finite=True)
    assert_same_gating(gating, reference.top_p_gating(logits, 0.7, token_mask=mask), 1e-6)
    alone = ops.top_p_gating(logits[mask], 0.7)
    assert torch.equal(gating.expert_ids[mask], alone.expert_ids)
    assert torch.equal(gating.tokens_per_expert, alone.tokens_per_expert)
    assert (gating.expert_ids[~mask] == 4).all()
    for name in ("expert_weights", "probabilities", "entropy", "logsumexp"):
        assert (getattr(gating, name)[~mask] == 0).all(), name


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_faulty_token_shows_its_fault_and_leaves_the_others_alone(fault: float) -> None:
    logits = torch.randn(7, 5)
    sound = [0, 1, 3, 4, 5, 6]
    clean = ops.top_p_gating(logits[sound], 0.6)
    logits[2] = fault
    gating = ops.top_p_gating(logits, 0.6, check_finite=False)
    for name in ("expert_ids", "expert_weights", "probabilities", "entropy", "logsumexp"):
        assert torch.equal(getattr(gating, name)[sound], getattr(clean, name)), name
    assert gating.expert_ids[2].tolist() == [0, 5, 5, 5, 5]
    assert gating.expert_weights[2, 0].isnan()
    assert (gating.expert_weights[2, 1:] == 0).all()
    assert gating.probabilities[2].isnan().all()
    assert gating.entropy[2].isnan()
    assert gating.logsumexp[2].isnan()
    assert_close(gating.probability_sum, clean.probability_sum)
    with pytest.raises(ValueError, match=r"logits must be finite.* 1 of 7 tokens"):
        ops.top_p_gating(logits, 0.6, check_finite=True)


def test_checked_mode_is_the_default_of_check_finite() -> None:
    logits = torch.full((2, 3), math.nan)
    assert not ops.checked_mode()
    ops.set_checked_mode(True)
    try:
        with pytest.raises(ValueError, match="finite"):
            ops.top_k_gating(logits, 2)
        ops.top_k_gating(logits, 2, check_finite=False)
    finally:
        ops.set_checked_mode(False)
    ops.top_k_gating(logits, 2)


def test_minus_infinity_disables_an_expert() -> None:
    logits = torch.zeros(3, 4)
    logits[:, 1] = -math.inf
    gating = ops.top_p_gating(logits, 0.99)
    assert selected(gating) == [[0, 2, 3]] * 3
    assert_close(gating.entropy, torch.full((3,), math.log(3)))
    assert selected(ops.top_k_gating(logits, 4)) == [[0, 2, 3, 1]] * 3  # k cannot be met without it


def test_non_contiguous_logits() -> None:
    logits = torch.randn(4, 12)[:, ::3]
    assert_same_gating(ops.top_p_gating(logits), ops.top_p_gating(logits.contiguous()), 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FLOATS)
def test_gradient_matches_the_reference(name: str, options: dict[str, Any]) -> None:
    logits = torch.randn(12, 6, dtype=torch.float64)
    logits[3, 2] = -math.inf
    mask = torch.rand(12) > 0.3

    def gradient(module: Any) -> Tensor:
        leaf = logits.clone().requires_grad_()
        output = getattr(module.top_p_gating(leaf, 0.6, token_mask=mask, **options), name)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        return torch.autograd.grad((output * weights).sum(), leaf)[0]

    assert_close(gradient(ops), gradient(reference), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 5).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    for module, leaf in ((ops, logits), (reference, exact)):
        gating = module.top_k_gating(leaf, 2)
        (gating.expert_weights[:, 0].sum() + gating.entropy.sum()).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert_close(logits.grad.double(), exact.grad, atol=4 * epsilon, rtol=2 * epsilon)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.top_p_gating(torch.zeros(2, 4), 0.0), "p must be in (0, 1], got 0.0"),
        (lambda: ops.top_p_gating(torch.zeros(2, 4), 1.5), "p must be in (0, 1], got 1.5"),
        (lambda: ops.top_p_gating(torch.zeros(2, 4), math.nan), "p must be in (0, 1], got nan"),
        (
            lambda: ops.top_p_gating(torch.zeros(2, 4), max_experts=5),
            "max_experts must be in [1, 4] with 4 experts, got 5",
        ),
        (
            lambda: ops.top_p_gating(torch.zeros(2, 4), max_experts=0),
            "max_experts must be in [1, 4] with 4 experts, got 0",
        ),
        (
            lambda: ops.top_p_gating(torch.zeros(2, 4), threshold_rule="strict"),  # type: ignore[arg-type]
            "threshold_rule must be 'paper' or 'released', got 'strict'",
        ),
        (
            lambda: ops.top_p_gating(torch.zeros(2, 4), temperature=0.0),
            "temperature must be positive and finite, got 0.0",
        ),
        (lambda: ops.top_k_gating(torch.zeros(2, 4), 5), "k must be in [1, 4] with 4 experts, got 5"),
        (lambda: ops.top_k_gating(torch.zeros(2, 4), True), "k must be an integer, got True"),
        (lambda: ops.top_k_gating(torch.zeros(2, 4), 4.0), "k must be an integer, got 4.0"),  # type: ignore[arg-type]
        (lambda: ops.top_p_gating(torch.zeros(2, 4), None), "p must be a number or a tensor, got None"),  # type: ignore[arg-type]
        (lambda: ops.top_k_gating(torch.zeros(2, 0), 1), "logits must have at least one expert, got shape [2, 0]"),
        (lambda: ops.top_k_gating(torch.zeros(4), 1), "logits must have shape [T, E], got [4]"),
        (
            lambda: ops.top_k_gating(torch.zeros(2, 4, dtype=torch.int64), 1),
            "logits must have dtype float32 or float64",
        ),
        (
            lambda: ops.top_k_gating(torch.zeros(2, 4), token_mask=torch.ones(3, dtype=torch.bool)),
            "token_mask must have shape [T=2], got [3]",
        ),
        (
            lambda: ops.top_k_gating(torch.zeros(2, 4), token_mask=torch.ones(2)),
            "token_mask must have dtype bool, got float32",
        ),
    ],
)
def test_errors_name_the_argument_the_value_and_the_bound(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_threshold_that_changes_is_compiled_once() -> None:
    torch._dynamo.reset()
    layers = [DynamicMoE(6, 4, 5, top_p=(index + 1) / 50) for index in range(50)]
    x = torch.randn(9, 6)
    for layer in layers:  # a p of its own for each layer
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert_close(y, layer(x))
        y.sum().backward()
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for index in range(50):  # a p that a controller moves
        layers[0].router.p = 1 - index / 50
        assert_close(compiled(x), layers[0](x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_as_threshold_is_the_number(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 9, dtype=dtype)
    for p in (1e-6, 0.4, 0.9, 1.0):
        for rule in ("paper", "released"):
            number = ops.top_p_gating(logits, p, threshold_rule=rule)  # type: ignore[arg-type]
            tensor = ops.top_p_gating(logits, torch.tensor([p], dtype=torch.float64), threshold_rule=rule)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


@pytest.mark.parametrize("p", [0.0, -1.0, 1.5, math.nan, torch.tensor(0.0), torch.tensor([0.1, 0.2]), torch.tensor(1)])
def test_thresholds_out_of_range(p: Any) -> None:
    with pytest.raises(ValueError, match=r"\bp must be (a number or|in \(0, 1\], got)|top_p must be in \(0, 1\]"):
        ops.top_p_gating(torch.randn(3, 4), p)
    router = TopPRouter(4, 3, p=0.3)
    with pytest.raises(ValueError, match=r"p must be (a number )?in \(0, 1\]"):
        router.p = p
    assert router.p == 0.3


def test_the_threshold_of_a_router_keeps_its_value_through_casts_and_devices() -> None:
    with torch.device("meta"):
        router = TopPRouter(4, 3, p=0.3)
    router = router.to_empty(device="cpu").bfloat16()
    router.reset_parameters()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, 4, dtype=torch.bfloat16)
    for copied in (router, compiled, copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(copied(x).expert_ids, ops.top_p_gating(router.logits(x), 0.3).expert_ids)
