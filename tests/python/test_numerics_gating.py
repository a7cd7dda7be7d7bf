# SPDX-License-Identifier: Apache-2.0
"""Gating against float64: probabilities, statistics, gradients within a bound each, the selection by its own rule."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, GatingProblem, gating_problems, laid_out
from tolerances import Bounded, Precision, assert_within, precision
from torch import Tensor

from dynamic_moe import ops

RULES = ["top_p", "top_k"]


def gate(problem: GatingProblem, rule: str, logits: Tensor | None = None) -> ops.Gating:
    logits = problem.logits if logits is None else logits
    if rule == "top_p":
        return ops.top_p_gating(logits, **problem.top_p)  # type: ignore[arg-type]
    return ops.top_k_gating(logits, **problem.top_k)  # type: ignore[arg-type]


class Exact:
    """What follows from the logits in float64; tokens that the mask holds back are left out."""

    def __init__(self, problem: GatingProblem, kept: Tensor) -> None:
        self.p: Precision = precision(problem.dtype)
        z = problem.logits[kept].double() / problem.temperature
        self.z = z
        self.probabilities = z.softmax(1)
        self.log_probabilities = z.log_softmax(1).where(self.probabilities > 0, 0.0)
        self.entropy = -(self.probabilities * self.log_probabilities).sum(1)
        self.logsumexp = z.logsumexp(1)
        # The difference of two logits is rounded before exp: a relative error that grows with the difference.
        difference = (z - z.amax(1, keepdim=True)).where(z.isfinite(), 0.0).abs() if z.numel() else z
        self.relative = self.p.accumulator * (16 + 4 * difference)

    def probability_bound(self) -> Tensor:
        return self.relative * self.probabilities + self.p.smallest


def kept_tokens(problem: GatingProblem) -> Tensor:
    return torch.ones(problem.tokens, dtype=torch.bool) if problem.token_mask is None else problem.token_mask


@pytest.mark.parametrize("rule", RULES)
@given(problem=gating_problems())
def test_probabilities_and_statistics(rule: str, problem: GatingProblem) -> None:
    gating, kept = gate(problem, rule), kept_tokens(problem)
    exact = Exact(problem, kept)
    p = exact.p
    for name in ("expert_weights", "probabilities", "probability_sum", "entropy", "logsumexp"):
        assert getattr(gating, name).dtype == (torch.float64 if problem.dtype == torch.float64 else torch.float32)
        if name != "probability_sum":
            assert (getattr(gating, name)[~kept] == 0).all(), name

    bound = exact.probability_bound()
    assert_within(gating.probabilities[kept], Bounded(exact.probabilities, bound), "probabilities")
    total = exact.probabilities.sum(0)
    assert_within(
        gating.probability_sum, Bounded(total, bound.sum(0) + p.sums(total, problem.tokens)), "probability_sum"
    )
    spread = exact.probabilities * (1 + exact.log_probabilities.abs())
    entropy_bound = (exact.relative * spread).sum(1) + p.sums(spread.sum(1), problem.experts) + p.smallest
    assert_within(gating.entropy[kept], Bounded(exact.entropy, entropy_bound), "entropy")
    scale = 1 + exact.logsumexp.abs() + exact.z.amax(1).abs() if exact.z.numel() else exact.logsumexp
    assert_within(gating.logsumexp[kept], Bounded(exact.logsumexp, 8 * p.accumulator * scale), "logsumexp")


@pytest.mark.parametrize("rule", RULES)
@given(problem=gating_problems())
def test_selection_is_the_shortest_prefix_in_order_of_probability(rule: str, problem: GatingProblem) -> None:
    gating, kept = gate(problem, rule), kept_tokens(problem)
    num_experts = problem.experts
    slack = 16 * precision(problem.dtype).accumulator  # of a sum of probabilities
    assert gating.expert_ids.shape == (problem.tokens, problem.max_experts)
    for token in range(problem.tokens):
        ids = gating.expert_ids[token].tolist()
        probabilities = gating.probabilities[token].tolist()
        if not kept[token]:
            assert ids == [num_experts] * problem.max_experts
            continue
        order = sorted(range(num_experts), key=lambda e: (-probabilities[e], e))
        count = sum(e < num_experts for e in ids)
        assert ids == order[:count] + [num_experts] * (problem.max_experts - count)
        if rule == "top_k" or problem.p == 1:
            assert count == problem.max_experts
            continue
        mass = [0.0]
        for e in ids[:count]:
            mass.append(mass[-1] + probabilities[e])
        assert count == problem.max_experts or mass[count] >= problem.p - slack
        assert count >= 1
        assert count == 1 or mass[count - 1] < problem.p + slack
    live = gating.expert_ids[gating.expert_ids < num_experts].long()
    assert torch.equal(gating.tokens_per_expert, live.bincount(minlength=num_experts).int())


@pytest.mark.parametrize("rule", RULES)
@given(problem=gating_problems())
def test_weights_are_the_probabilities_of_the_selected(rule: str, problem: GatingProblem) -> None:
    gating = gate(problem, rule)
    used = gating.expert_ids < problem.experts
    selected = gating.probabilities.gather(1, gating.expert_ids.clamp(max=problem.experts - 1).long())
    selected = selected.where(used, 0.0)
    if not problem.renormalize:
        assert torch.equal(gating.expert_weights, selected)
        return
    mass = selected.double().sum(1, keepdim=True)
    expected = selected.double() / mass.where(mass > 0, 1.0)
    error = precision(problem.dtype).accumulator * 16 * expected
    assert_within(gating.expert_weights, Bounded(expected, error), "expert_weights")


def differentiate(problem: GatingProblem, gating: ops.Gating, cotangents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the exact gradient of the logits, selection given, and the sum of the absolute values of its parts."""
    kept = kept_tokens(problem)
    logits = problem.logits[kept].double().requires_grad_()
    z = logits / problem.temperature
    probabilities = z.softmax(1)
    log_probabilities = z.log_softmax(1).where(probabilities > 0, 0.0)
    ids = gating.expert_ids[kept].long()
    used = ids < problem.experts
    weights = torch.where(used, probabilities.gather(1, ids.clamp(max=problem.experts - 1)), 0.0)
    mass = weights.sum(1, keepdim=True) if problem.renormalize else torch.ones_like(weights[:, :1])
    weights = weights / mass
    entropy = -(probabilities * log_probabilities).sum(1)
    outputs = {
        "expert_weights": weights,
        "probabilities": probabilities,
        "probability_sum": probabilities.sum(0),
        "entropy": entropy,
        "logsumexp": z.logsumexp(1),
    }
    d = {name: (c if name == "probability_sum" else c[kept]).double() for name, c in cotangents.items()}
    loss = sum(((outputs[name] * d[name]).sum() for name in d), torch.zeros((), dtype=torch.float64))
    (exact,) = torch.autograd.grad(loss, logits, allow_unused=True)
    exact = torch.zeros_like(logits) if exact is None else exact

    with torch.no_grad():
        parts = torch.zeros_like(logits)
        if "probabilities" in d:
            parts += d["probabilities"].abs()
        if "probability_sum" in d:
            parts += d["probability_sum"].abs()
        if "expert_weights" in d:
            dw = d["expert_weights"].abs().where(used, 0.0)
            if problem.renormalize:
                dw = (dw + (dw * weights).sum(1, keepdim=True)) / mass
            index = ids.where(used, problem.experts)
            parts += torch.zeros(len(ids), problem.experts + 1).double().scatter_add_(1, index, dw)[:, :-1]
        parts += (probabilities * parts).sum(1, keepdim=True)
        if "entropy" in d:
            parts += d["entropy"].abs()[:, None] * (log_probabilities.abs() + entropy[:, None] + 1)
        if "logsumexp" in d:
            parts += d["logsumexp"].abs()[:, None]
        return exact, probabilities * parts / problem.temperature


OUTPUTS = ["expert_weights", "probabilities", "probability_sum", "entropy", "logsumexp"]


@given(problem=gating_problems(), rule=st.sampled_from(RULES), output=st.sampled_from([*OUTPUTS, "all", "all"]))
def test_gradients(problem: GatingProblem, rule: str, output: str) -> None:
    logits = problem.logits.detach().requires_grad_()
    gating = gate(problem, rule, logits)
    names = OUTPUTS if output == "all" else [output]
    outputs = [getattr(gating, name) for name in names]
    cotangents = [
        laid_out(torch.randn(out.shape, generator=problem.generator, dtype=out.dtype), problem.layout)
        for out in outputs
    ]
    (actual,) = torch.autograd.grad(outputs, logits, cotangents)
    assert actual.dtype == problem.dtype

    kept = kept_tokens(problem)
    assert (actual[~kept] == 0).all()
    exact, magnitude = differentiate(problem, gating, dict(zip(names, cotangents, strict=True)))
    token = Exact(problem, kept)
    largest = token.relative.amax(1, keepdim=True) if magnitude.numel() else magnitude
    bound = 4 * (largest + token.p.sums(torch.ones(()), problem.experts)) * magnitude
    smallest = 4 * token.p.smallest * (1 + magnitude / token.probabilities.clamp(min=1e-300))
    assert_within(actual[kept], Bounded(exact, bound + smallest + token.p.stored(exact)), "d_logits")


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
@given(problem=gating_problems(max_tokens=12))
def test_a_faulty_logit_changes_no_bit_of_another_token(rule: str, fault: float, problem: GatingProblem) -> None:
    if problem.tokens == 0:
        return
    hit = problem.seed % problem.tokens
    spoiled = problem.logits.clone()
    spoiled[hit, problem.seed % problem.experts] = fault
    others = torch.arange(problem.tokens) != hit
    clean, faulty = gate(problem, rule), gate(problem, rule, spoiled)
    for name in ("expert_ids", "expert_weights", "probabilities", "entropy", "logsumexp"):
        assert torch.equal(getattr(clean, name)[others], getattr(faulty, name)[others]), name
    assert faulty.probability_sum.isfinite().all()
    assert faulty.tokens_per_expert.sum() == (faulty.expert_ids < problem.experts).sum()
    if kept_tokens(problem)[hit]:
        assert faulty.expert_ids[hit].tolist() == [0] + [problem.experts] * (problem.max_experts - 1)
        assert faulty.expert_weights[hit, 0].isnan()
        assert faulty.probabilities[hit].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_faulty_token_changes_no_bit_of_another_tokens_gradient(rule: str, dtype: torch.dtype) -> None:
    logits = torch.randn(40, 16).to(dtype)

    def gradient(logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        options: dict[str, Any] = {"p": 0.6} if rule == "top_p" else {"k": 3}
        gating = getattr(ops, f"{rule}_gating")(leaf, renormalize=True, **options)
        loss = gating.expert_weights.square().sum() + gating.entropy.sum() + gating.logsumexp.square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    clean = gradient(logits)
    for hit in (0, 17, 39):
        spoiled = logits.clone()
        spoiled[hit, 5] = torch.nan
        others = torch.arange(40) != hit
        assert torch.equal(gradient(spoiled)[others], clean[others])
