# SPDX-License-Identifier: Apache-2.0
"""collect_routing: one record per layer and forward pass, in eager mode, compiled, and under checkpointing."""

import asyncio
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dynamic_moe import DynamicMoE, RouterScores, Routing, collect_routing, losses
from dynamic_moe.ops import _torch_private

LAYERS = 3

pytestmark = pytest.mark.level_independent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Residual MoE layers, each optionally checkpointed."""

    def __init__(self, checkpointed: bool = False, compiled_layers: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.reentrant = reentrant
        self.layers = nn.ModuleList(DynamicMoE(8, 12, 4, init_std=0.5) for _ in range(LAYERS))
        self.calls: list[Any] = list(self.layers)
        if compiled_layers:
            self.calls = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.calls:
            x = x + (checkpoint(layer, x, use_reentrant=self.reentrant) if self.checkpointed else layer(x))
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


def test_blocks_that_close_in_the_order_in_which_they_opened_take_their_own_passes() -> None:
    model, x = make(), torch.randn(5, 8)
    first, second = collect_routing(model), collect_routing(model)
    routings = [first.__enter__(), second.__enter__()]
    model(x)
    first.__exit__(None, None, None)
    model(x)
    second.__exit__(None, None, None)
    model(x)
    assert [len(records) for records in routings] == [LAYERS, 2 * LAYERS]
    assert not torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint


def test_one_object_may_be_open_several_times() -> None:
    model, x, collecting, lengths = make(), torch.randn(5, 8), collect_routing(), {}
    both_are_open = threading.Barrier(2, timeout=60)

    def run(passes: int) -> None:
        with collecting as outer:
            both_are_open.wait()
            with collecting as inner:
                for _ in range(passes):
                    model(x)
            model(x)
            both_are_open.wait()
        lengths[passes] = (len(outer), len(inner))

    threads = [threading.Thread(target=run, args=(passes,)) for passes in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {passes: (LAYERS * (passes + 1), LAYERS * passes) for passes in (1, 2)}


@pytest.mark.parametrize("compiled", [False, True])
def test_tasks_have_blocks_of_their_own(compiled: bool) -> None:
    model, x, counter = make(), torch.randn(5, 8), CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model

    async def collect(passes: int, all_are_open: asyncio.Barrier) -> int:
        with collect_routing(run) as routings:
            await all_are_open.wait()
            for _ in range(passes):
                run(x)
                await asyncio.sleep(0)
        return len(routings)

    async def main() -> tuple[list[int], int]:
        barrier = asyncio.Barrier(3)
        with collect_routing(model) as routings:  # sees the tasks that start while it is open
            lengths = await asyncio.gather(*(collect(passes, barrier) for passes in (1, 2, 3)))
        await asyncio.gather(*(collect(1, barrier) for _ in range(3)))
        return lengths, len(routings)

    assert asyncio.run(main()) == ([LAYERS, 2 * LAYERS, 3 * LAYERS], 6 * LAYERS)
    assert counter.frame_count <= 3  # one graph for each depth of blocks


def test_generators_may_be_closed_in_any_order() -> None:
    model, x = make(), torch.randn(5, 8)

    def steps() -> Iterator[Any]:
        with collect_routing(model) as routings:
            yield routings
            model(x)
            yield routings

    first, second = steps(), steps()
    routings = [next(first), next(second)]
    first.close()
    next(second)
    assert [len(records) for records in routings] == [0, LAYERS]
    second.close()
    model(x)
    assert len(routings[1]) == LAYERS


def test_a_block_that_is_closed_in_another_context_lets_go_of_its_records() -> None:
    model, x, elsewhere, collecting = make(), torch.randn(5, 8), copy_context(), collect_routing()
    routings = elsewhere.run(collecting.__enter__)
    elsewhere.run(model, x)
    collecting.__exit__(None, None, None)
    elsewhere.run(model, x)
    assert len(routings) == LAYERS
    reference = weakref.ref(routings)
    del routings
    gc.collect()
    assert reference() is None


def test_the_layers_of_a_model_are_those_that_it_has_when_the_routings_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, walks = make(), torch.randn(5, 8), []
    monkeypatch.setattr(model, "modules", lambda: walks.append(0) or nn.Module.modules(model))
    with collect_routing(model) as routings:
        model.layers.append(DynamicMoE(8, 12, 4))
        model.calls.append(model.layers[-1])
        model.calls.append(DynamicMoE(8, 12, 4))  # of somebody else
        model(x)
    assert walks == []
    assert len(routings) == len(list(routings)) == LAYERS + 1
    assert list(routings.by_layer()) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert len(walks) == 1


@pytest.mark.parametrize("head", ["DynamicMoEForCausalLM", "DynamicMoEForSequenceClassification"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_inside_a_language_model_is_not_averaged_into_its_losses(head: str, compiled: bool) -> None:
    models = pytest.importorskip("dynamic_moe.models", exc_type=ImportError)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_experts": 4}
    options = {"num_hidden_layers": 2, "expert_frequency": 1, "pad_token_id": 0, "initializer_range": 0.5}
    config = models.DynamicMoEConfig(**sizes, **options)
    student = getattr(models, head)(config).train()
    teacher, ids = DynamicMoE(8, 12, 4, init_std=0.5).eval(), torch.randint(1, 20, (2, 5))
    labels = ids if head.endswith("LM") else torch.tensor([0, 1])
    expected = student(input_ids=ids, labels=labels)
    student.teacher = teacher  # a part of the student, and not of its decoder

    def run_teacher(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            teacher(args[0])

    student.model.layers[0].register_forward_pre_hook(run_teacher)
    with collect_routing() as everything:
        run = torch.compile(student, backend="aot_eager", fullgraph=True) if compiled else student
        outputs = run(input_ids=ids, labels=labels)
    assert len(everything) == sum(isinstance(module, DynamicMoE) for module in student.modules())
    assert len(everything) > 1
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    torch.testing.assert_close(outputs.dynamic_loss, expected.dynamic_loss)


def test_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module or None, got list"):
        collect_routing([make()])  # type: ignore[arg-type]


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


@pytest.mark.skipif(
    "torch._dynamo.config" in _torch_private._missing,
    reason="without private names of torch the user sets the option of torch.compile that this needs",
)
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


@pytest.mark.parametrize("backward_inside", [False, True])
def test_compiled_layers_inside_eager_checkpointing(backward_inside: bool) -> None:
    model, x = make(checkpointed=True, compiled_layers=True), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])
    with collect_routing(model) as routings:
        loss = model(x).square().mean() + auxiliary(routings)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
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


# ---- routings that should carry a gradient and do not ---------------------------------------------------------------


def step(model: Model, x: Tensor) -> Tensor:
    with collect_routing(model) as routings:
        y = model(x)
    return y.square().mean() + auxiliary(routings)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_block_inside_a_checkpoint_records_the_recomputation(reentrant: bool) -> None:
    model, x = make(), torch.randn(5, 8, requires_grad=True)
    expected = expected_gradients(model, [x])
    checkpoint(step, model, x, use_reentrant=reentrant).backward()
    assert_gradients(model, expected)


def reentrant(model: Model, x: Tensor) -> None:
    model.checkpointed = model.reentrant = True
    step(model, x).backward()


def reentrant_in_part(model: Model, x: Tensor) -> None:
    model.calls[1] = lambda x: checkpoint(model.layers[1], x, use_reentrant=True)
    step(model, x).backward()


def reentrant_and_compiled(model: Model, x: Tensor) -> None:
    model.calls = [torch.compile(layer, backend="aot_eager") for layer in model.layers]
    reentrant(model, x)


def reentrant_with_a_loss_of_ones_own(model: Model, x: Tensor) -> None:
    model.checkpointed = model.reentrant = True
    with collect_routing(model) as routings:
        y = model(x)
    (y.sum() + sum(routing.probabilities.square().sum() for routing in routings)).backward()


def returned_inside_another_output(model: Model, x: Tensor) -> None:
    y, routing = checkpoint(lambda x: model.layers[0](x, return_routing=True), x, use_reentrant=True)
    (y.sum() + losses.load_balancing(routing)).backward()


def returned_by_a_compiled_layer(model: Model, x: Tensor) -> None:
    model.layers[0].compile(backend="aot_eager")
    returned_inside_another_output(model, x)


def cut_off_by_the_router(model: Model, x: Tensor) -> None:
    model.layers[2].router.register_forward_hook(lambda router, args, routing: routing.detach())
    step(model, x).backward()


@pytest.mark.parametrize(
    "train",
    [
        reentrant,
        reentrant_in_part,
        reentrant_and_compiled,
        reentrant_with_a_loss_of_ones_own,
        returned_inside_another_output,
        returned_by_a_compiled_layer,
        cut_off_by_the_router,
    ],
)
def test_training_without_a_gradient_of_the_router_is_warned_of(train: Callable[[Model, Tensor], None]) -> None:
    with pytest.warns(UserWarning, match="do(es)? not train the router.*use_reentrant=False"):
        train(make(), torch.randn(5, 8, requires_grad=True))


def evaluation(model: Model, x: Tensor) -> None:
    model.eval()
    with collect_routing(model) as routings, torch.no_grad():
        model(x)
    auxiliary(routings)


def evaluation_in_training_mode(model: Model, x: Tensor) -> None:
    with torch.no_grad():
        step(model, x)
        _, routing = model.layers[0](x, return_routing=True)
        auxiliary(routing)
    with collect_routing(model) as routings, torch.no_grad():
        model(x)
        [routing.statistics() for routing in routings]


def frozen_routers(model: Model, x: Tensor) -> None:
    for layer in model.layers:
        layer.router.requires_grad_(False)
    step(model, x.detach())
    _, routing = model.layers[0](x.detach(), return_routing=True)
    auxiliary(routing)


def frozen_in_part_and_reentrant(model: Model, x: Tensor) -> None:
    model.layers[1].requires_grad_(False)
    model.calls[1] = lambda x: checkpoint(model.layers[1], x, use_reentrant=True)
    step(model, x).backward()


def teacher_inside(model: Model, x: Tensor) -> None:
    teacher = make(checkpointed=True, reentrant=True)

    def run_teacher(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        teacher(args[0].detach().requires_grad_())

    model.layers[1].register_forward_pre_hook(run_teacher)
    step(model, x).backward()


def returned_out_of_the_checkpoint(model: Model, x: Tensor) -> None:
    def flat(x: Tensor) -> tuple[Tensor, ...]:
        y, routing = model.layers[0](x, return_routing=True)
        return y, *routing[:3], *routing.scores_for("this test")

    outputs = checkpoint(flat, x, use_reentrant=True)
    losses.load_balancing(Routing(*outputs[1:4], scores=RouterScores(*outputs[4:]))).backward()
    assert model.layers[0].router.weight.grad.abs().sum() > 0


def detached_on_purpose(model: Model, x: Tensor) -> None:
    with torch.no_grad():
        _, routing = model.layers[0](x, return_routing=True)
    auxiliary(routing.detach())


@pytest.mark.parametrize(
    "run",
    [
        evaluation,
        evaluation_in_training_mode,
        frozen_routers,
        frozen_in_part_and_reentrant,
        teacher_inside,
        detached_on_purpose,
        returned_out_of_the_checkpoint,
    ],
)
def test_nobody_is_warned_where_nothing_is_lost(run: Callable[[Model, Tensor], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(), torch.randn(5, 8, requires_grad=True))
