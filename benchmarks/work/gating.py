# SPDX-License-Identifier: Apache-2.0
"""Top-p gating with its statistics: this library's operator against the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problem import SEED
from benchmarks.work.subject import Cost, Opened, Subject

TOP_P = 0.4
Gate = Callable[[Tensor], tuple[Tensor, ...]]


def torch_top_p_gating(logits: Tensor) -> tuple[Tensor, ...]:
    """Softmax, sort, cumulated mass, threshold, counts, statistics.

    Returns
    -------
    tuple of Tensor
        expert_ids, expert_weights, tokens_per_expert, probabilities, probability_sum, entropy, logsumexp: the fields of
        `dynamic_moe.ops.Gating`, and their meaning.
    """
    num_experts = logits.shape[1]
    logsumexp = logits.logsumexp(dim=1)
    probabilities = logits.softmax(dim=1)
    ranked, order = probabilities.sort(dim=1, descending=True)
    unused = ranked.cumsum(dim=1) - ranked >= TOP_P
    expert_ids = order.masked_fill(unused, num_experts).to(torch.int32)
    expert_weights = ranked.masked_fill(unused, 0)
    tokens_per_expert = torch.bincount(expert_ids.flatten(), minlength=num_experts + 1)[:num_experts]
    entropy = logsumexp - (probabilities * logits).sum(dim=1)
    return expert_ids, expert_weights, tokens_per_expert, probabilities, probabilities.sum(dim=0), entropy, logsumexp


def draw_logits(num_tokens: int, num_experts: int, mean_experts: float) -> Tensor:
    """Normal logits [T, E], scaled so that top-p chooses ``mean_experts`` on average."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(SEED))
    return logits * scale_for_mean(logits, mean_experts)


def scale_for_mean(logits: Tensor, mean_experts: float) -> float:
    """The scale of the logits at which top-p chooses ``mean_experts`` on average, by bisection."""
    low, high = 0.0, 50.0
    for _ in range(20):
        scale = (low + high) / 2
        chosen = torch_top_p_gating(logits[:4096] * scale)[1].count_nonzero() / min(4096, len(logits))
        low, high = (scale, high) if chosen > mean_experts else (low, scale)
    return high


def open_gating(case: Case) -> Opened:
    """Both ways, checked against each other."""
    from dynamic_moe import ops

    num_experts = case.shape.num_experts
    logits = draw_logits(case.num_tokens, num_experts, case.shape.mean_experts)
    gates: dict[str, Gate] = {
        "dynamic_moe": partial(ops.top_p_gating, p=TOP_P),
        "PyTorch composition": torch_top_p_gating,
    }
    _check(gates, logits)
    cost = _cost(case)
    make_call = _training_call if case.training else _forward_call
    subjects = [Subject(name, make_call(gate, logits), cost) for name, gate in gates.items()]
    mean = float((ops.top_p_gating(logits, TOP_P).expert_weights > 0).sum() / len(logits))
    return Opened(subjects=subjects, facts={"mean experts per token": mean})


def _cost(case: Case) -> Cost:
    """Read the logits, write ids, weights and probabilities; backward: read two of these and write one."""
    values = case.num_tokens * case.shape.num_experts
    return Cost(bytes=4.0 * values * (7 if case.training else 4), bandwidth="copy")


def _forward_call(gate: Gate, logits: Tensor) -> Callable[[int], object]:
    @torch.no_grad()
    def call(_: int) -> object:
        return gate(logits)

    return call


def _training_call(gate: Gate, logits: Tensor) -> Callable[[int], object]:
    logits = logits.detach().requires_grad_()
    generator = torch.Generator().manual_seed(SEED)
    differentiable = (1, 4, 5, 6)  # expert_weights, probability_sum, entropy, logsumexp: what a model uses
    with torch.no_grad():
        outputs = gate(logits)
    gradients = [torch.randn(outputs[i].shape, generator=generator) for i in differentiable]

    def call(_: int) -> object:
        outputs = gate(logits)
        return torch.autograd.grad([outputs[i] for i in differentiable], logits, gradients)

    return call


def _check(gates: dict[str, Gate], logits: Tensor) -> None:
    ours, theirs = (gate(logits) for gate in gates.values())
    # A token whose mass meets p up to rounding may get one expert more on one side.
    same = (ours[0] == theirs[0]).all(dim=1)
    if same.float().mean() < 0.999:
        raise RuntimeError(f"gating disagrees with PyTorch on {int((~same).sum())} of {len(same)} tokens")
    for index in (1, 3, 5, 6):
        torch.testing.assert_close(ours[index][same], theirs[index][same], rtol=1e-4, atol=1e-5)
