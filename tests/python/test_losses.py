# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: worked numbers of Huang et al. 2024, options, reductions, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic_moe import Routing, losses, ops

# Four tokens, four experts. At p = 0.4: k = 1, 2, 1, 2; f = .75 .5 .25 0; Q = .385058 .276478 .187343 .151121.
LOGITS = torch.tensor(
    [[2.0, 0.0, -1.0, 0.5], [0.2, 0.1, 0.0, -0.1], [1.0, 0.8, 0.0, -2.0], [-0.5, 0.9, 0.7, 0.3]], dtype=torch.float64
)
LOAD_BALANCING = 1.895473
LOAD_BALANCING_OF_ROWS = 1.263648
ENTROPIES = [0.878281, 1.380071, 1.109368, 1.281602]
DYNAMIC = 1.162331


def top_p(logits: Tensor, p: float = 0.4, token_mask: Tensor | None = None) -> Routing:
    return Routing.from_gating(ops.top_p_gating(logits, p, token_mask=token_mask), logits, token_mask)


def close(value: Tensor, expected: float) -> None:
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_numbers_of_the_paper(dtype: torch.dtype) -> None:
    routing = top_p(LOGITS.to(dtype))
    close(losses.load_balancing(routing), LOAD_BALANCING)
    close(losses.load_balancing(routing, fraction="rows"), LOAD_BALANCING_OF_ROWS)
    close(losses.dynamic(routing), DYNAMIC)
    close(losses.dynamic(routing, tokens="sum"), sum(ENTROPIES))
    total = 1e-2 * losses.load_balancing(routing) + 1e-4 * losses.dynamic(routing)
    assert total.dtype == dtype
    close(total, 0.0190710)


def test_router_z_is_the_mean_square_of_the_logsumexp() -> None:
    routing = top_p(LOGITS)
    by_hand = [math.log(sum(map(math.exp, row))) ** 2 for row in LOGITS.tolist()]
    close(losses.router_z(routing), sum(by_hand) / 4)
    close(losses.router_z(routing, tokens="sum"), sum(by_hand))


def test_perfect_balance_gives_the_mean_number_of_experts_or_one() -> None:
    routing = top_p(torch.eye(8, dtype=torch.float64), p=1.0)
    close(losses.load_balancing(routing), 8.0)
    close(losses.load_balancing(routing, fraction="rows"), 1.0)


def test_dynamic_in_other_bases() -> None:
    uniform = top_p(torch.zeros(3, 16))
    close(losses.dynamic(uniform), math.log(16))
    close(losses.dynamic(uniform, base=2.0), 4.0)
    close(losses.dynamic(uniform, base=16), 1.0)


@pytest.mark.parametrize("loss", [losses.load_balancing, losses.dynamic, losses.router_z])
def test_layers_are_averaged_or_summed(loss: Any) -> None:
    layers = [top_p(LOGITS), top_p(LOGITS[:3] * 2.0), top_p(LOGITS[:, :3])]
    single = [loss(layer).item() for layer in layers]
    close(loss(layers), sum(single) / 3)
    close(loss(tuple(layers), layers="sum"), sum(single))
    close(loss(layers[:1]), single[0])


@pytest.mark.parametrize("loss", [losses.load_balancing, losses.dynamic, losses.router_z])
@pytest.mark.parametrize("tokens", ["mean", "sum"])
def test_masked_tokens_do_not_count(loss: Any, tokens: str) -> None:
    options = {} if loss is losses.load_balancing else {"tokens": tokens}
    mask = torch.tensor([True, False, True, True])
    masked = loss(top_p(LOGITS, token_mask=mask), **options)
    close(masked, loss(top_p(LOGITS[mask]), **options).item())
    assert masked.item() != pytest.approx(loss(top_p(LOGITS), **options).item())


@pytest.mark.parametrize("loss", [losses.load_balancing, losses.dynamic, losses.router_z])
def test_no_tokens_give_zero(loss: Any) -> None:
    logits = torch.empty(0, 4, requires_grad=True)
    value = loss(top_p(logits))
    assert value.item() == 0.0
    value.backward()
    all_masked = loss(top_p(LOGITS, token_mask=torch.zeros(4, dtype=torch.bool)))
    assert all_masked.item() == 0.0


def test_load_balancing_has_a_gradient_through_the_probabilities_alone() -> None:
    logits = LOGITS.clone().requires_grad_()
    losses.load_balancing(top_p(logits)).backward()
    expected = LOGITS.clone().requires_grad_()
    fractions = torch.tensor([0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    (4 * fractions * expected.softmax(-1).mean(0)).sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad)


@pytest.mark.parametrize(
    "loss",
    [
        losses.load_balancing,
        lambda routing: losses.load_balancing(routing, fraction="rows"),
        losses.dynamic,
        losses.router_z,
        lambda routing: losses.dynamic([routing, routing], tokens="sum", layers="sum", base=2.0),
    ],
)
def test_gradients_match_finite_differences(loss: Any) -> None:
    assert torch.autograd.gradcheck(lambda logits: loss(top_p(logits)), LOGITS.clone().requires_grad_())


def test_minimizing_dynamic_sharpens_the_router() -> None:
    logits = torch.zeros(16, 8).add_(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    before = top_p(logits).mean_experts_per_token
    for _ in range(20):
        logits = logits.detach().requires_grad_()
        losses.dynamic(top_p(logits), tokens="sum").backward()
        assert logits.grad is not None
        logits = logits - logits.grad
    assert top_p(logits).mean_experts_per_token < before - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda routing: losses.load_balancing([]), "routing must hold the routing of at least one layer"),
        (
            lambda routing: losses.load_balancing(routing, layers="max"),
            "layers must be one of 'mean', 'sum', got 'max'",
        ),
        (
            lambda routing: losses.load_balancing(routing, fraction="k"),
            "fraction must be one of 'tokens', 'rows', got 'k'",
        ),
        (lambda routing: losses.dynamic(routing, tokens="none"), "tokens must be one of 'mean', 'sum', got 'none'"),
        (lambda routing: losses.dynamic(routing, base=1), "base must be above 1, got 1"),
        (lambda routing: losses.router_z(routing.probabilities), "routing must be a Routing .*, got one of Tensor"),
        (lambda routing: losses.dynamic(None), "routing must be a Routing or a sequence of them, got NoneType"),
        (lambda routing: losses.router_z(routing, tokens=""), "tokens must be one of 'mean', 'sum', got ''"),
    ],
)
def test_wrong_options_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(top_p(LOGITS))
