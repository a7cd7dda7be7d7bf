# SPDX-License-Identifier: Apache-2.0
"""collect_routing: one record per layer and forward pass, in eager mode, compiled, and under checkpointing."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dynamic_moe import DynamicMoE, Routing, collect_routing, losses

LAYERS = 3

pytestmark = pytest.mark.level_independent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Residual MoE layers, each optionally checkpointed."""

    def __init__(self, checkpointed: bool = False, compiled_layers: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(DynamicMoE(8, 12, 4, init_std=0.5) for _ in range(LAYERS))
        self.calls: list[Any] = list(self.layers)
        if compiled_layers:
            self.calls = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.calls:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def make(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def by_hand(model: Model, x: Tensor) -> list[Routing]:
    routings = []
    for layer in model.layers:
        y, routing = layer(x, return_routing=True)
        routings.append(routing)
        x = x + y
    return routings


def auxiliary(routings: Any) -> Tensor:
    return losses.load_balancing(routings) + losses.dynamic(routings) + losses.router_z(routings)


def assert_same(ours: Any, theirs: list[Routing]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.expert_ids, other.expert_ids)
        torch.testing.assert_close(one.probabilities, other.probabilities)


def gradients(model: Model) -> list[Tensor]:
    result = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        result.append(parameter.grad)
        parameter.grad = None
    return result


def expected_gradients(model: Model, xs: list[Tensor]) -> list[Tensor]:
    """Of the task and the auxiliary losses, without any of the machinery under test."""
    for x in xs:
        routings, y = [], x
        for layer in model.layers:
            out, routing = layer(y, return_routing=True)
            routings.append(routing)
            y = y + out
        (y.square().mean() + auxiliary(routings)).backward()
    return gradients(model)


def assert_gradients(model: Model, expected: list[Tensor]) -> None:
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_collects_every_layer_in_order() -> None:
    model, x = make(), torch.randn(2, 5, 8)
    with collect_routing(model) as routings:
        model(x)
    assert_same(routings, by_hand(model, x))
    assert_same(routings[1:], by_hand(model, x)[1:])
    assert torch.equal(routings[-1].logits, by_hand(model, x)[-1].logits)
    assert list(routings.by_layer()) == ["layers.0", "layers.1", "layers.2"]


def test_nothing_is_collected_outside_the_block() -> None:
    model, x = make(), torch.randn(5, 8)
    model(x)
    with collect_routing(model) as routings:
        pass
    model(x)
    assert len(routings) == 0
    assert routings.by_layer() == {}


def test_each_forward_pass_has_its_own_records() -> None:
    model = make()
    xs = [torch.randn(tokens, 8) for tokens in (5, 9, 2)]
    expected = expected_gradients(model, xs)
    for x in xs:  # gradient accumulation
        with collect_routing(model) as routings:
            y = model(x)
        assert_same(routings, by_hand(model, x))
        (y.square().mean() + auxiliary(routings)).backward()
    assert_gradients(model, expected)


def test_several_passes_in_one_block_follow_one_another() -> None:
    model, first, second = make(), torch.randn(5, 8), torch.randn(3, 8)
    with collect_routing(model) as routings:
        model(first)
        model(second)
    assert_same(routings, by_hand(model, first) + by_hand(model, second))
    assert [len(records) for records in routings.by_layer().values()] == [2, 2, 2]


def test_nested_blocks_each_get_what_runs_inside_them() -> None:
    model, x = make(), torch.randn(5, 8)
    with collect_routing(model) as outer:
        model(x)
        with collect_routing(model) as inner:
            model(x)
    assert (len(outer), len(inner)) == (2 * LAYERS, LAYERS)


def test_a_block_can_be_limited_to_one_model() -> None:
    student, teacher, x = make(), make(), torch.randn(5, 8)
    with collect_routing(student) as routings, collect_routing() as everything:
        student(x)
        teacher(x)
    assert (len(routings), len(everything)) == (LAYERS, 2 * LAYERS)
    with pytest.raises(ValueError, match="model must be given to collect_routing"):
        everything.by_layer()


def test_an_error_closes_the_block() -> None:
    model, x = make(), torch.randn(5, 8)
    collecting = collect_routing(model)
    with pytest.raises(ValueError, match="x has width 3"), collecting as routings:
        model(torch.randn(5, 3))
    model(x)
    assert len(routings) == 0
    with collecting as routings:  # and can be opened again, for new records
        model(x)
    assert len(routings) == LAYERS


def test_a_block_sees_its_own_thread() -> None:
    model, x = make(), torch.randn(5, 8)
    with collect_routing(model) as routings:
        other = threading.Thread(target=model, args=(x,))
        other.start()
        other.join()
        assert len(routings) == 0
        model(x)
    assert len(routings) == LAYERS


@pytest.mark.parametrize("backward_inside", [False, True])
def test_eager_checkpointing_does_not_count_twice(backward_inside: bool) -> None:
    model, x = make(checkpointed=True), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])
    with collect_routing(model) as routings:
        loss = model(x).square().mean() + auxiliary(routings)
        if backward_inside:
            loss.backward()
    assert len(routings) == LAYERS
    if not backward_inside:
        loss.backward()
    assert_same(routings, by_hand(model, x))
    assert_gradients(model, expected)


def test_compiled_model_collects_without_recompiling() -> None:
    model = make()
    xs = [torch.randn(5, 8) for _ in range(4)]
    expected = expected_gradients(model, xs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for x in xs:
        with collect_routing(compiled) as routings:
            y = compiled(x)
        assert_same(routings, by_hand(model, x))
        assert list(routings.by_layer()) == ["layers.0", "layers.1", "layers.2"]
        (y.square().mean() + auxiliary(routings)).backward()
    assert counter.frame_count == 1
    assert_gradients(model, expected)

    with collect_routing(model) as routings:
        for x in xs:
            compiled(x)
    assert_same(routings, [routing for x in xs for routing in by_hand(model, x)])
    assert counter.frame_count == 1

    compiled(xs[0])  # without a block: a second graph, that records nothing
    compiled(xs[1])
    assert counter.frame_count == 2


def test_block_inside_the_compiled_step() -> None:
    model = make()
    xs = [torch.randn(5, 8) for _ in range(3)]
    expected = expected_gradients(model, xs)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: Tensor) -> tuple[Tensor, list[Routing]]:
        with collect_routing(model) as routings:
            y = model(x)
        return y.square().mean() + auxiliary(routings), list(routings)

    for x in xs:
        loss, routings = step(x)
        assert_same(routings, by_hand(model, x))
        loss.backward()
    assert counter.frame_count == 1
    assert_gradients(model, expected)


def test_compiled_model_with_checkpointing_inside() -> None:
    model, x = make(checkpointed=True), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with collect_routing(compiled) as routings:
        y = compiled(x)
    assert not torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint
    (y.square().mean() + auxiliary(routings)).backward()
    assert_same(routings, by_hand(model, x))
    assert_gradients(model, expected)


def test_block_and_checkpointing_inside_the_compiled_step() -> None:
    model, x = make(checkpointed=True), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        with collect_routing(model) as routings:
            y = model(x)
        return y.square().mean() + auxiliary(routings)

    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        step(x).backward()
    assert_gradients(model, expected)


def test_compiled_layers_inside_eager_checkpointing() -> None:
    model, x = make(checkpointed=True, compiled_layers=True), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])
    with collect_routing(model) as routings:
        y = model(x)
    (y.square().mean() + auxiliary(routings)).backward()
    assert_same(routings, by_hand(model, x))
    assert_gradients(model, expected)


def test_returned_routings_under_compiled_checkpointing() -> None:
    """The way without side effects: the checkpointed function returns the routing."""
    model, x = make(), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        routings = []
        for layer in model.layers:
            y, routing = checkpoint(layer, x, return_routing=True, use_reentrant=False)
            routings.append(routing)
            x = x + y
        return x.square().mean() + auxiliary(routings)

    step(x).backward()
    assert_gradients(model, expected)
