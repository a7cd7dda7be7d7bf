# SPDX-License-Identifier: Apache-2.0
"""Results are the same bit for bit: in every run, and whatever the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from strategies import DTYPES, RaggedProblem
from torch import Tensor

from dynamic_moe import DynamicMoE, losses, ops

RUNS = [2, 3, 2]  # threads of the runs that are compared with the one of a single thread


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_with_any_threads(run: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(1)
    expected = run()
    for threads in [1, *RUNS]:
        torch.set_num_threads(threads)
        for index, (actual, exact) in enumerate(zip(run(), expected, strict=True)):
            assert same_bits(actual, exact), f"output {index} with {threads} threads"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same bits: NaN equals itself, and 0 is not -0."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def test_same_bits_can_tell() -> None:
    nan = torch.tensor([torch.nan, 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([torch.nan, -0.0]))


@pytest.mark.parametrize("load", ["top", "any", "one expert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_mlp(dtype: torch.dtype, load: str) -> None:
    problem = RaggedProblem(1, 130, 7, 3, 130, 77, dtype, load, "contiguous")
    leaves = problem.leaves()
    dy = problem.random(130, 130)

    def run() -> list[Tensor]:
        y = ops.expert_mlp(*leaves[:3], problem.expert_ids, leaves[3])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_same_with_any_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul_and_combine(dtype: torch.dtype) -> None:
    problem = RaggedProblem(2, 150, 5, 4, 65, 33, dtype, "any", "contiguous")
    x, weight, _, weights = problem.leaves()
    permutation = ops.permute(problem.expert_ids, 5)
    dy = problem.random(150, 66)

    def run() -> list[Tensor]:
        rows = ops.grouped_matmul(x, weight, permutation.expert_offsets, permutation.row_token)
        y = ops.combine(rows, weights, permutation.slot_row)
        return [rows.detach(), y.detach(), *torch.autograd.grad(y, (x, weight, weights), dy)]

    assert_same_with_any_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts"), [(3001, 16), (700, 130)])
def test_gating_and_permute(tokens: int, experts: int, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(tokens, experts)).to(dtype).requires_grad_()
    mask = torch.rand(tokens) < 0.9

    def run() -> list[Tensor]:
        outputs: list[Tensor] = []
        for gating in (
            ops.top_p_gating(logits, 0.7, renormalize=True, token_mask=mask),
            ops.top_k_gating(logits, 3),
        ):
            loss = gating.expert_weights.square().sum() + gating.entropy.sum() + gating.logsumexp.sum()
            loss = loss + gating.probability_sum.square().sum() + gating.probabilities.square().sum()
            outputs += [*gating, *ops.permute(gating.expert_ids, experts)[:-1], *torch.autograd.grad(loss, logits)]
        return [output.detach() for output in outputs]

    assert_same_with_any_threads(run)


def test_training_the_layer_twice() -> None:
    """With the same number of threads: torch's own matrix products, the router's, depend on it."""

    def train() -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(4, 33, 48)
        layer = DynamicMoE(hidden_size=48, intermediate_size=40, num_experts=6, top_p=0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
        for _ in range(3):
            y, routing = layer(x, return_routing=True)
            loss = (y - x).square().mean() + 1e-2 * losses.load_balancing(routing) + 1e-3 * losses.dynamic(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [loss.detach(), *(parameter.detach() for parameter in layer.parameters())]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(same_bits(a, b) for a, b in zip(train(), train(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
