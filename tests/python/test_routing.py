# SPDX-License-Identifier: Apache-2.0
"""Routing: what from_selection derives, and what the statistics say."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from dynamic_moe import RouterScores, Routing, losses, ops


def threshold_selection(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
    """Routes to every expert of at least the mean probability: between 1 and E experts."""
    probabilities_TE = logits_TE.softmax(-1)
    weights_TE, ids_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
    num_experts = logits_TE.shape[1]
    ids_TE = ids_TE.masked_fill(weights_TE < 1 / num_experts, num_experts)
    return Routing.from_selection(logits_TE, ids_TE, weights_TE, token_mask_T=token_mask_T)


def test_from_selection_agrees_with_the_fused_gating() -> None:
    logits = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gating = ops.top_k_gating(logits, 3, renormalize=False)
    fused = Routing.from_gating(gating, logits)
    values, ids = logits.softmax(-1).topk(3)
    composed = Routing.from_selection(logits, ids, values)
    for name in ("expert_ids", "expert_weights", "tokens_per_expert", *RouterScores._fields):
        ours, theirs = getattr(composed, name), getattr(fused, name)
        assert ours.dtype == theirs.dtype, name
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_from_selection_has_the_gradient_of_the_fused_gating() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 6, dtype=torch.float64, generator=generator)
    weights = torch.randn(20, 2, dtype=torch.float64, generator=generator)

    def gradient(fused: bool) -> Tensor:
        leaf = logits.clone().requires_grad_()
        if fused:
            routing = Routing.from_gating(ops.top_k_gating(leaf, 2, renormalize=False), leaf)
        else:
            routing = Routing.from_selection(leaf, *reversed(leaf.softmax(-1).topk(2)))
        value = (routing.expert_weights * weights).sum() + routing.probability_sum.square().sum()
        (value + routing.entropy.sum() + routing.logsumexp.square().sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-10, atol=1e-12)


def test_any_id_outside_the_experts_marks_an_unused_slot() -> None:
    logits = torch.zeros(3, 4)
    ids = torch.tensor([[2, -1], [4, 0], [99, -7]])
    weights = torch.tensor([[0.5, float("nan")], [3.0, 0.25], [1.0, 1.0]])
    routing = Routing.from_selection(logits, ids, weights)
    assert routing.expert_ids.dtype == torch.int32
    assert routing.expert_ids.tolist() == [[2, 4], [4, 0], [4, 4]]
    assert routing.expert_weights.tolist() == [[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]
    assert routing.tokens_per_expert.tolist() == [1, 0, 1, 0]
    assert routing.experts_per_token.tolist() == [1, 1, 0]
    assert routing.dropped_tokens.item() == 1


def test_low_precision_selection_is_widened_to_float32() -> None:
    logits = torch.randn(3, 4).bfloat16()
    routing = Routing.from_selection(logits, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1).half())
    for name in ("expert_weights", "probabilities", "logits", "probability_sum", "entropy", "logsumexp"):
        assert getattr(routing, name).dtype == torch.float32, name


def test_a_disabled_expert_leaves_finite_gradients() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5], [0.0, 0.2, -math.inf]], requires_grad=True)
    routing = threshold_selection(logits)
    (routing.entropy.sum() + routing.logsumexp.sum() + routing.expert_weights.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_masked_tokens_enter_nothing() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([True, False, True, True, False, True])
    routing = threshold_selection(logits, mask)
    without = threshold_selection(logits[mask])
    assert (routing.expert_ids[~mask] == 5).all()
    for name in ("expert_weights", "probabilities", "entropy", "logsumexp"):
        assert (getattr(routing, name)[~mask] == 0).all(), name
    for name in ("tokens_per_expert", "probability_sum"):
        torch.testing.assert_close(getattr(routing, name), getattr(without, name))
    for ours, theirs in zip(routing.statistics(), without.statistics(), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 12),
    slots=st.integers(1, 5),
    experts=st.integers(1, 7),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_statistics_match_a_count_by_hand(tokens: int, slots: int, experts: int, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = min(slots, experts)
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    ids = torch.where(torch.rand(tokens, slots, generator=generator) < 0.4, experts, order)
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    logits = torch.randn(tokens, experts, generator=generator)
    statistics = Routing.from_selection(logits, ids, torch.rand(tokens, slots), token_mask_T=mask).statistics()

    kept = [t for t in range(tokens) if mask is None or mask[t]]
    chosen = [[e for e in ids[t].tolist() if e < experts] for t in kept]
    rows = sum(map(len, chosen))
    loads = [sum(e in token for token in chosen) for e in range(experts)]
    assert statistics.num_tokens.item() == len(kept)
    assert statistics.tokens_per_expert.tolist() == loads
    assert statistics.experts_per_token_histogram.tolist() == [
        sum(len(token) == count for token in chosen) for count in range(slots + 1)
    ]
    assert statistics.dropped_tokens.item() == sum(not token for token in chosen)
    assert statistics.mean_experts_per_token.item() == pytest.approx(rows / max(len(kept), 1))
    assert statistics.load.tolist() == pytest.approx([load / max(rows, 1) for load in loads])
    distributions = logits[kept].double().softmax(-1)
    entropy = -(distributions * distributions.log()).sum(-1)
    assert statistics.mean_entropy.item() == pytest.approx(entropy.mean().item() if kept else 0.0, rel=1e-5, abs=1e-7)


def test_statistics_carry_no_gradient_and_the_routing_does() -> None:
    routing = threshold_selection(torch.randn(4, 3, requires_grad=True))
    assert routing.mean_entropy.requires_grad
    assert not any(figure.requires_grad for figure in routing.statistics())
    detached = routing.detach()
    assert not any(field.requires_grad for field in pytree.tree_leaves(detached) if field is not None)
    assert routing.probabilities.requires_grad


@pytest.mark.level_independent
def test_statistics_compile_into_one_graph_for_any_number_of_tokens() -> None:
    def figures(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(threshold_selection(logits).statistics())

    compiled = torch.compile(figures, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 12):
        logits = torch.randn(tokens, 5)
        for ours, theirs in zip(compiled(logits), figures(logits), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_routing_is_a_pytree_and_pickles() -> None:
    routing = threshold_selection(torch.randn(4, 3), torch.tensor([True, True, False, True]))
    assert len(pytree.tree_leaves(routing)) == 4 + len(RouterScores._fields)
    doubled = pytree.tree_map(lambda tensor: tensor * 2, routing)
    assert isinstance(doubled, Routing)
    copy = pickle.loads(pickle.dumps(routing))
    assert isinstance(copy, Routing)
    assert isinstance(copy.scores, RouterScores)
    for ours, theirs in zip(pytree.tree_leaves(copy), pytree.tree_leaves(routing), strict=True):
        assert torch.equal(ours, theirs)


def test_keep_drops_pairs_and_counts_anew() -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    routing = Routing.from_gating(ops.top_p_gating(logits, 0.7), logits, torch.ones(9, dtype=torch.bool))
    mask = torch.rand(routing.expert_ids.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    kept = routing.keep(mask)
    used = mask & (routing.expert_ids < 4)
    assert 0 < used.sum() < (routing.expert_ids < 4).sum()
    assert torch.equal(kept.expert_ids, torch.where(used, routing.expert_ids, 4))
    assert torch.equal(kept.expert_weights, routing.expert_weights * used)
    assert kept.tokens_per_expert.tolist() == [((routing.expert_ids == e) & mask).sum() for e in range(4)]
    assert kept.scores is routing.scores
    assert kept.token_mask is routing.token_mask
    assert kept.dropped_tokens == (~used.any(1)).sum()
    kept.expert_weights.sum().backward()
    assert logits.grad is not None
    for wrong in (mask[:, :1], mask.float(), mask.tolist()):
        with pytest.raises(ValueError, match="mask_TK must be a"):
            routing.keep(wrong)


def test_local_parts_hold_every_row_once() -> None:
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(5))
    routing = Routing.from_gating(ops.top_k_gating(logits, 3), logits)
    parts = [(0, 2), (2, 0), (2, 4), (6, 1)]
    weights = torch.zeros(11, 7)
    for first, count in parts:
        part = routing.local(first, count)
        assert part.num_experts == count
        assert part.scores is None
        assert torch.equal(part.tokens_per_expert, routing.tokens_per_expert[first : first + count])
        assert part.expert_ids.dtype == torch.int32
        one_hot = torch.nn.functional.one_hot(part.expert_ids.long(), count + 1)[..., :count]
        weights[:, first : first + count] += (one_hot * part.expert_weights[..., None]).sum(1)
    whole = torch.zeros(11, 7).scatter(1, routing.expert_ids.long(), routing.expert_weights)
    assert torch.equal(weights, whole)
    for first, count, message in (
        (-1, 2, r"first must be an integer in \[0, 7\] with 7 experts, got -1"),
        (0, 8, r"count must be an integer in \[0, 7\] with 7 experts, got 8"),
        (4, 4, r"first \+ count must be at most 7, the number of experts, got 4 \+ 4"),
        (1.0, 2, "first must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            routing.local(first, count)


def test_a_routing_without_scores_invents_none() -> None:
    ids, weights = torch.tensor([[2, 0], [1, 9]]), torch.tensor([[0.5, 0.25], [1.0, 3.0]], requires_grad=True)
    routing = Routing.from_selection(None, ids, weights, num_experts=3)
    assert routing.expert_ids.tolist() == [[2, 0], [1, 3]]
    assert routing.tokens_per_expert.tolist() == [1, 1, 1]
    assert routing.expert_weights.requires_grad
    assert routing.statistics().mean_entropy is None
    assert routing.statistics().mean_experts_per_token == 1.5
    for reader in (*RouterScores._fields, "mean_entropy"):
        with pytest.raises(
            ValueError, match=f"^{reader} reads the scores of a router with a softmax, but this routing"
        ):
            getattr(routing, reader)
    for loss in (losses.load_balancing, losses.dynamic, losses.router_z):
        with pytest.raises(ValueError, match=f"^losses.{loss.__name__} reads the scores of a router with a softmax"):
            loss(routing)


IDS = torch.zeros(3, 2, dtype=torch.int64)
WEIGHTS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (torch.zeros(3), IDS, WEIGHTS),
            {},
            r"logits_TE must be a floating-point \[T, E\] tensor, got torch.float32 \[3\]",
        ),
        ((torch.zeros(3, 4, dtype=torch.int32), IDS, WEIGHTS), {}, "logits_TE must be a floating-point"),
        (([[0.0]], IDS, WEIGHTS), {}, "logits_TE must be a Tensor, got list"),
        ((None, IDS, WEIGHTS), {}, "num_experts must be given where logits_TE is None, got None"),
        ((None, IDS, WEIGHTS), {"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        (
            (torch.zeros(3, 4), IDS, WEIGHTS),
            {"num_experts": 4},
            "num_experts must be None where logits_TE is given, got 4",
        ),
        ((torch.zeros(3, 4), IDS.to_sparse(), WEIGHTS), {}, "expert_ids_TK must be a dense tensor"),
        ((torch.zeros(3, 4), IDS, None), {}, "expert_weights_TK must be a Tensor, got NoneType"),
        ((torch.zeros(3, 4), IDS, WEIGHTS), {"probabilities_TE": [1.0]}, "probabilities_TE must be a Tensor, got list"),
        ((torch.zeros(3, 4), IDS, WEIGHTS), {"token_mask_T": [True]}, "token_mask_T must be a Tensor, got list"),
        ((torch.zeros(4, 4), IDS, WEIGHTS), {}, r"expert_ids_TK must be an int32 or int64 \[4, K\] tensor.*\[3, 2\]"),
        ((torch.zeros(3, 4), IDS.float(), WEIGHTS), {}, "expert_ids_TK must be an int32 or int64 .* got torch.float32"),
        (
            (torch.zeros(3, 4), IDS, WEIGHTS[:, :1]),
            {},
            r"expert_weights_TK must be a floating-point \[3, 2\].*\[3, 1\]",
        ),
        ((torch.zeros(3, 4), IDS, IDS), {}, "expert_weights_TK must be a floating-point .* got torch.int64"),
        (
            (torch.zeros(3, 4), IDS, WEIGHTS),
            {"probabilities_TE": torch.zeros(3, 5)},
            r"probabilities_TE must have the shape of logits_TE, \[3, 4\], got \[3, 5\]",
        ),
        (
            (torch.zeros(3, 4), IDS, WEIGHTS),
            {"token_mask_T": torch.ones(3)},
            r"token_mask_T must be a bool \[3\] tensor, got torch.float32 \[3\]",
        ),
    ],
)
def test_from_selection_names_the_wrong_argument(
    arguments: tuple[Tensor, ...], options: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Routing.from_selection(*arguments, **options)
