# SPDX-License-Identifier: Apache-2.0
"""Top-p routing worked by hand: four tokens, four experts (computed apart with numpy, and with the authors' code)."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynamic_moe import Routing, losses, ops, reference

LOGITS = [[2.0, 0.0, -1.0, 0.5], [0.2, 0.1, 0.0, -0.1], [1.0, 0.8, 0.0, -2.0], [-0.5, 0.9, 0.7, 0.3]]
PROBABILITIES = [
    [0.710100, 0.096102, 0.035354, 0.158445],
    [0.288651, 0.261183, 0.236328, 0.213838],
    [0.447148, 0.366094, 0.164496, 0.022262],
    [0.094332, 0.382535, 0.313193, 0.209940],
]
# p: the experts of each token in order of probability, and the mass selected
SELECTED = {
    0.4: ([[0], [0, 1], [0], [1, 2]], [0.710100, 0.549834, 0.447148, 0.695728]),
    0.6: ([[0], [0, 1, 2], [0, 1], [1, 2]], [0.710100, 0.786162, 0.813241, 0.695728]),
    0.9: ([[0, 3, 1], [0, 1, 2, 3], [0, 1, 2], [1, 2, 3]], [0.964646, 1.0, 0.977738, 0.905668]),
}
MODULES = [pytest.param(ops, id="ops"), pytest.param(reference, id="reference")]


def close(actual: Tensor, expected: object, atol: float = 1.5e-6) -> None:
    assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("p", SELECTED)
def test_selection_and_probabilities(p: float, module: object, dtype: torch.dtype) -> None:
    experts, mass = SELECTED[p]
    gating = module.top_p_gating(torch.tensor(LOGITS, dtype=dtype), p)  # type: ignore[attr-defined]
    assert [[e for e in row if e < 4] for row in gating.expert_ids.tolist()] == experts
    close(gating.probabilities, PROBABILITIES)
    close(gating.expert_weights.sum(1), mass)
    close(gating.probability_sum / 4, [0.385058, 0.276478, 0.187343, 0.151121])
    close(gating.entropy, [0.878281, 1.380071, 1.109368, 1.281602])


@pytest.mark.parametrize("module", MODULES)
def test_output_of_constant_experts(module: object) -> None:
    """Expert j answers 10 (j + 1) whatever it is asked; the weights are not renormalized."""
    gating = module.top_p_gating(torch.tensor(LOGITS), 0.4)  # type: ignore[attr-defined]
    permutation = module.permute(gating.expert_ids, 4)  # type: ignore[attr-defined]
    assert permutation.tokens_per_expert.tolist() == [3, 2, 1, 0]
    expert = torch.repeat_interleave(permutation.tokens_per_expert.long())
    rows = 10.0 * (expert[:, None] + 1)
    y = module.combine(rows, gating.expert_weights, permutation.slot_row)  # type: ignore[attr-defined]
    close(y[:, 0], [7.100999, 8.110166, 4.471477, 17.046499], atol=5e-6)


@pytest.mark.parametrize("module", MODULES)
def test_output_of_swiglu_experts(module: object) -> None:
    """One hidden and one intermediate channel, x = 1: expert j answers silu(1) * 10 (j + 1) / silu(1)."""
    gating = module.top_p_gating(torch.tensor(LOGITS), 0.4)  # type: ignore[attr-defined]
    silu = torch.nn.functional.silu(torch.ones(()))
    down_proj = (10.0 * torch.arange(1, 5) / silu).view(4, 1, 1)
    y = module.expert_mlp(  # type: ignore[attr-defined]
        torch.ones(4, 1), torch.ones(4, 2, 1), down_proj, gating.expert_ids, gating.expert_weights
    )
    close(y[:, 0], [7.100999, 8.110166, 4.471477, 17.046499], atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses(dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype)
    routing = Routing.from_gating(ops.top_p_gating(logits, 0.4), logits)
    balance, entropy = losses.load_balancing(routing), losses.dynamic(routing)
    close(routing.tokens_per_expert / 4, [0.75, 0.5, 0.25, 0.0])
    close(balance, 1.895473)
    close(losses.load_balancing(routing, fraction="rows"), 1.263648)
    close(entropy, 1.162331)
    assert float(1e-2 * balance + 1e-4 * entropy) == pytest.approx(0.0190710, abs=5e-8)


def count(logits: Tensor, p: float, rule: str) -> list[int]:
    gating = ops.top_p_gating(logits, p, threshold_rule=rule)  # type: ignore[arg-type]
    return (gating.expert_ids < logits.shape[1]).sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_rules_differ_where_the_mass_is_exactly_p(dtype: torch.dtype) -> None:
    uniform = torch.zeros(2, 16, dtype=dtype)
    assert count(uniform, 0.5, "paper") == [8, 8]
    assert count(uniform, 0.5, "released") == [9, 9]
    assert count(uniform, 0.4, "paper") == count(uniform, 0.4, "released") == [7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_around_a_boundary(dtype: torch.dtype) -> None:
    """[1/2, 1/4, 1/8, 1/8]: p = 1/2 lies on the first expert's mass, which rounding may put on either side."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=dtype).log()
    for rule in ("paper", "released"):
        assert count(logits, 0.5 - 1e-6, rule) == [1]
        assert count(logits, 0.5 + 1e-6, rule) == [2]
        assert count(logits, 0.75 - 1e-6, rule) == [2]
        assert count(logits, 0.75 + 1e-6, rule) == [3]


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_the_ends(rule: str) -> None:
    logits = torch.tensor(LOGITS)
    assert count(logits, 1e-30, rule) == [1, 1, 1, 1]
    assert count(logits, 1.0, rule) == [4, 4, 4, 4]
    assert count(100 * logits, 1.0, rule) == [4, 4, 4, 4]
