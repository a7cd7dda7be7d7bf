# SPDX-License-Identifier: Apache-2.0
"""Inference on packed weights: results, when the packed copy is used, when it is dropped, and errors."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import Tensor, nn
from torch.testing import assert_close

from dynamic_moe import _C, DynamicMoE, SharedExpert, SwiGLUExperts, ops, reference
from dynamic_moe.experts.prepack import Prepackable

raw = torch.ops.dynamic_moe
E, H, I = 4, 34, 51  # noqa: E741
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_experts(dtype: torch.dtype = torch.float32) -> SwiGLUExperts:
    return SwiGLUExperts(E, H, I, init_std=0.3, dtype=dtype).eval()


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, E).argsort(-1)[:, :2]
    return torch.randn(tokens, H, dtype=dtype), ids, torch.rand(tokens, 2)


class Calls:
    """Counts the calls of the operators on packed weights and on plain ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed = self.plain = 0
        packed, plain = ops.expert_mlp_prepacked, ops.expert_mlp

        def count_packed(*args: Any) -> Tensor:
            self.packed += 1
            return packed(*args)

        def count_plain(*args: Any, **options: Any) -> Tensor:
            self.plain += 1
            return plain(*args, **options)

        monkeypatch.setattr(ops, "expert_mlp_prepacked", count_packed)
        monkeypatch.setattr(ops, "expert_mlp", count_plain)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


# ---- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 150])
def test_operator_matches_the_reference(dtype: torch.dtype, tokens: int) -> None:
    problem = make_problem(tokens=tokens, hidden=H, intermediate=I, dtype=torch.float64)
    x, gate_up, down = (tensor.to(dtype) for tensor in problem.floats[:3])
    exact = reference.expert_mlp(x.double(), gate_up.double(), down.double(), problem.expert_ids, problem.floats[3])
    packed = ops.prepack_experts(gate_up, down)
    y = ops.expert_mlp_prepacked(x, packed, problem.expert_ids, problem.expert_weights)
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_many_tokens_give_the_same_bits(dtype: torch.dtype) -> None:
    experts = make_experts(dtype)
    x, ids, weights = routed(300, dtype)
    with torch.no_grad():
        expected = experts(x, ids, weights)
        assert_close(experts.prepack()(x, ids, weights), expected, rtol=0, atol=0)


def test_layer_with_a_shared_expert(calls: Calls) -> None:
    layer = DynamicMoE(H, I, E, shared_intermediate_size=20, shared_gated=True, init_std=0.3).eval()
    x = torch.randn(3, 50, H)
    with torch.no_grad():
        expected = layer(x)
        assert (calls.packed, calls.plain) == (0, 2)
        assert layer.prepack() is layer
        assert_close(layer(x), expected)
    assert (calls.packed, calls.plain) == (2, 2)
    assert isinstance(layer.shared_expert, SharedExpert)
    assert layer.experts.is_prepacked
    assert layer.shared_expert.is_prepacked


# ---- when it is used ----------------------------------------------------------------------------------------------


def test_a_gradient_comes_from_the_weights_themselves(calls: Calls) -> None:
    experts = make_experts().prepack()
    x, ids, weights = routed(20)
    y = experts(x, ids, weights)
    assert (calls.packed, calls.plain) == (0, 1)
    y.sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert experts.gate_up_proj.grad.abs().sum() > 0
    experts.requires_grad_(False)
    experts(x, ids, weights)
    assert (calls.packed, calls.plain) == (1, 1)
    leaf = x.requires_grad_()
    experts(leaf, ids, weights).sum().backward()
    assert leaf.grad is not None
    assert (calls.packed, calls.plain) == (1, 2)


def test_autocast_uses_the_copy_where_it_has_that_dtype(calls: Calls) -> None:
    x, ids, weights = routed(20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert make_experts(torch.bfloat16).prepack()(x, ids, weights).dtype == torch.bfloat16
        assert (calls.packed, calls.plain) == (1, 0)
        assert make_experts().prepack()(x, ids, weights).dtype == torch.bfloat16
        assert (calls.packed, calls.plain) == (1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        packed = ops.prepack_experts(*make_experts()._stacked_weights())
        assert ops.expert_mlp_prepacked(x.bfloat16(), packed, ids, weights).dtype == torch.float32


def test_inference_mode(calls: Calls) -> None:
    with torch.inference_mode():
        experts = make_experts().prepack()
        experts(*routed(3))
    assert calls.packed == 1


# ---- when it is dropped -------------------------------------------------------------------------------------------


def in_place(experts: SwiGLUExperts) -> None:
    with torch.no_grad():
        experts.down_proj.mul_(2)


def optimizer_step(experts: SwiGLUExperts) -> None:
    for parameter in experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(experts.parameters(), lr=0.1).step()


def replaced(experts: SwiGLUExperts) -> None:
    experts.gate_up_proj = nn.Parameter(0.3 * torch.randn_like(experts.gate_up_proj))


def data_replaced_twice(experts: SwiGLUExperts) -> None:  # the second may get the address that the first had
    for _ in range(2):
        experts.gate_up_proj.data = 0.3 * torch.randn_like(experts.gate_up_proj)


def loaded(experts: SwiGLUExperts) -> None:
    experts.load_state_dict(make_experts().state_dict())


def loaded_by_assignment(experts: SwiGLUExperts) -> None:
    experts.load_state_dict(make_experts().state_dict(), assign=True)


def reset(experts: SwiGLUExperts) -> None:
    experts.reset_parameters()


@pytest.mark.parametrize(
    "change", [in_place, optimizer_step, replaced, data_replaced_twice, loaded, loaded_by_assignment, reset]
)
def test_changed_weights_are_noticed(change: Callable[[SwiGLUExperts], None], calls: Calls) -> None:
    experts = make_experts().prepack()
    x, ids, weights = routed(20)
    with torch.no_grad():
        before = experts(x, ids, weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            change(experts)
            after = experts(x, ids, weights)
        assert [warning.category for warning in caught] == [UserWarning]
        assert "call prepack() again" in str(caught[0].message)
        assert (calls.packed, calls.plain) == (1, 1)
        assert not experts.is_prepacked
        assert not torch.allclose(before, after)
        assert_close(experts.prepack()(x, ids, weights), after)
        assert calls.packed == 2


def test_conversion_drops_the_copy_and_a_move_to_where_it_is_does_not() -> None:
    experts = make_experts().prepack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert experts.to("cpu").float().is_prepacked
    with pytest.warns(UserWarning, match="moved or converted"):
        experts.bfloat16()
    assert not experts.is_prepacked
    with torch.no_grad():
        assert experts(*routed(3, torch.bfloat16)).dtype == torch.bfloat16


def test_training_drops_the_copy() -> None:
    layer = DynamicMoE(H, I, E, shared_intermediate_size=20).eval().prepack()
    layer.eval()
    assert layer.experts.is_prepacked
    layer.train()
    assert layer.shared_expert is not None
    assert not layer.experts.is_prepacked
    assert not layer.shared_expert.is_prepacked


def test_state_dict_and_parameters_stay_as_they_are() -> None:
    experts = make_experts()
    state, names = experts.state_dict(), [name for name, _ in experts.named_parameters()]
    experts.prepack()
    assert list(experts.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in experts.state_dict().items())
    assert [name for name, _ in experts.named_parameters()] == names
    assert not list(experts.buffers())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.filterwarnings("error")
def test_copies_are_not_packed_and_give_the_same(duplicate: Callable[[Prepackable], Any]) -> None:
    experts = make_experts().prepack()
    other = duplicate(experts)
    assert experts.is_prepacked
    assert not other.is_prepacked
    x, ids, weights = routed(300)
    with torch.no_grad():
        assert_close(other(x, ids, weights), experts(x, ids, weights), rtol=0, atol=0)


# ---- torch.compile and torch.export -------------------------------------------------------------------------------


@pytest.mark.level_independent
def test_compiles_to_one_graph(calls: Calls) -> None:
    torch._dynamo.reset()
    layer = DynamicMoE(H, I, E, init_std=0.3).eval().prepack()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (7, 33):
            x = torch.randn(tokens, H)
            assert_close(compiled(x), layer(x))
    assert calls.packed > 0
    assert calls.plain == 0


@pytest.mark.level_independent
def test_a_compiled_layer_follows_when_other_weights_are_loaded() -> None:
    torch._dynamo.reset()
    layer = DynamicMoE(H, I, E, init_std=0.3).eval().prepack()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    other = DynamicMoE(H, I, E, init_std=0.3).eval()
    x = torch.randn(20, H)
    with torch.no_grad():
        compiled(x)
        with pytest.warns(UserWarning, match="were loaded"):
            layer.load_state_dict(other.state_dict())
        assert_close(compiled(x), other(x))


@pytest.mark.level_independent
def test_exports() -> None:
    layer = DynamicMoE(H, I, E, init_std=0.3).eval().prepack()
    x = torch.randn(20, H)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        targets = [node.target for node in program.graph.nodes]
        assert raw.expert_mlp_prepacked.default in targets
        other = torch.randn(33, H)
        assert_close(program.module()(other), layer(other))


# ---- errors -------------------------------------------------------------------------------------------------------


def test_another_cpu_level_is_an_error() -> None:
    level = _C.cpu_isa()
    others = [name for name in _C.supported_cpu_isas() if name != level]
    if not others:
        pytest.skip("this machine has one level only")
    experts = make_experts().prepack()
    try:
        for other in others:
            _C.set_cpu_isa(other)
            with torch.no_grad(), pytest.raises(ValueError, match=f"level {level}, but the level in use is {other}"):
                experts(*routed(3))
    finally:
        _C.set_cpu_isa(None)


def test_float64_is_an_error() -> None:
    with pytest.raises(ValueError, match="gate_up_proj must have dtype float32 or bfloat16 or float16, got float64"):
        make_experts(torch.float64).prepack()
    with pytest.raises(ValueError, match="float64"):
        raw.prepack_experts(torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64))


def test_wrong_arguments_are_errors() -> None:
    gate_up, down = make_experts()._stacked_weights()
    with pytest.raises(ValueError, match=r"down_proj must have shape \[E=4, H=34, I\]"):
        ops.prepack_experts(gate_up, down[:, 1:])
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[E=4, 2I=100, H=34\]"):
        ops.prepack_experts(gate_up, down[:, :, 1:])
    with pytest.raises(ValueError, match="must be on the CPU"):
        ops.prepack_experts(gate_up.to("meta"), down.to("meta"))
    packed = ops.prepack_experts(gate_up, down)
    x, ids, weights = routed(5)
    with pytest.raises(ValueError, match="x must have dtype float32, got bfloat16"):
        ops.expert_mlp_prepacked(x.bfloat16(), packed, ids, weights)
    with pytest.raises(ValueError, match="H=34"):
        ops.expert_mlp_prepacked(x[:, 1:], packed, ids, weights)
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.expert_mlp_prepacked(x.requires_grad_(), packed, ids, weights)


def test_wrong_arguments_of_the_raw_operator_are_errors() -> None:
    packed = ops.prepack_experts(*make_experts()._stacked_weights())
    x, ids, weights = routed(5)
    p = ops.permute(ids, E)
    index = (p.expert_offsets, p.row_token, p.row_slot)
    for intermediate, data, match in (
        (I + 1, packed.data, "I=51"),
        (I, packed.data[:-64], "packed was made for"),
        (I, torch.zeros(4096, dtype=torch.uint8), "prepack_experts made"),
        (I, packed.data[:10], "prepack_experts made"),
    ):
        with pytest.raises(ValueError, match=match):
            raw.expert_mlp_prepacked(x, data, intermediate, weights, *index)
    y = raw.expert_mlp_prepacked(x.requires_grad_(), packed.data, I, weights, *index)
    with pytest.raises(RuntimeError, match="has no gradient"):
        y.sum().backward()
