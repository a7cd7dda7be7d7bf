# SPDX-License-Identifier: Apache-2.0
"""Inference on packed weights: results, when the packed copy is used, when it is dropped, and errors."""

import copy
import mmap
import pickle
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import Tensor, distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune
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


def test_a_pass_that_needs_gradients_of_the_inputs_alone_uses_the_weights_and_keeps_the_copy(calls: Calls) -> None:
    experts = make_experts().requires_grad_(False).prepack()
    x, ids, weights = routed(20)
    experts(x, ids, weights)
    assert (calls.packed, calls.plain) == (1, 0)
    leaf = x.requires_grad_()
    experts(leaf, ids, weights).sum().backward()
    assert leaf.grad is not None
    assert (calls.packed, calls.plain) == (1, 1)
    assert experts.is_prepacked


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
    experts = make_experts().prepack()
    with torch.inference_mode():
        experts(*routed(3))
    assert calls.packed == 1


# ---- when it is dropped -------------------------------------------------------------------------------------------


def in_place(experts: SwiGLUExperts) -> None:
    with torch.no_grad():
        experts.down_proj.mul_(2)


def give_gradients(*parameters: Tensor) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


def optimizer_step(experts: SwiGLUExperts) -> None:
    give_gradients(*experts.parameters())
    torch.optim.SGD(experts.parameters(), lr=0.1).step()


def fused_step(experts: SwiGLUExperts) -> None:
    give_gradients(*experts.parameters())
    versions = [parameter._version for parameter in experts.parameters()]
    torch.optim.AdamW(experts.parameters(), lr=0.1, fused=True).step()
    assert versions == [parameter._version for parameter in experts.parameters()]


def fused_step_of_a_scaler(experts: SwiGLUExperts) -> None:
    give_gradients(*experts.parameters())
    optimizer = torch.optim.AdamW([experts.down_proj], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def step_with_a_closure(experts: SwiGLUExperts) -> None:
    optimizer = torch.optim.LBFGS(experts.parameters(), lr=0.1, max_iter=1)
    with torch.enable_grad():

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = experts.down_proj.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def compiled_fused_step(experts: SwiGLUExperts) -> None:
    give_gradients(*experts.parameters())
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1, fused=True)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()


def averaged(experts: SwiGLUExperts) -> None:
    torch._foreach_lerp_(list(experts.parameters()), list(make_experts().parameters()), 0.5)


def set_from_a_vector(experts: SwiGLUExperts) -> None:
    nn.utils.vector_to_parameters(torch.rand(E * 3 * I * H), experts.parameters())


def swapped(experts: SwiGLUExperts) -> None:
    torch.utils.swap_tensors(experts.down_proj, nn.Parameter(torch.rand_like(experts.down_proj)))


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


CHANGES = [
    in_place,
    optimizer_step,
    fused_step,
    fused_step_of_a_scaler,
    step_with_a_closure,
    compiled_fused_step,
    averaged,
    set_from_a_vector,
    swapped,
    replaced,
    data_replaced_twice,
    loaded,
    loaded_by_assignment,
    reset,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: Callable[[SwiGLUExperts], None], calls: Calls) -> None:
    experts = make_experts().prepack()
    x, ids, weights = routed(20)
    with torch.no_grad():
        before = experts(x, ids, weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            change(experts)
            after = experts(x, ids, weights)
        ours = [warning for warning in caught if "call prepack() again" in str(warning.message)]
        assert [warning.category for warning in ours] == [UserWarning]
        assert (calls.packed, calls.plain) == (1, 1)
        assert not experts.is_prepacked
        assert not torch.allclose(before, after)
        assert_close(experts.prepack()(x, ids, weights), after)
        assert calls.packed == 2


def test_a_pass_that_needs_gradients_of_the_weights_ends_the_copy(calls: Calls) -> None:
    experts = make_experts().prepack()
    with pytest.warns(UserWarning, match=r"needed gradients in a pass .* under torch.no_grad\(\)"):
        y = experts(*routed(20))
    assert (calls.packed, calls.plain) == (0, 1)
    assert not experts.is_prepacked
    y.sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert experts.gate_up_proj.grad.abs().sum() > 0


@pytest.mark.filterwarnings("error")
def test_steps_that_leave_the_weights_alone_keep_the_copy() -> None:
    experts, other, frozen = make_experts().prepack(), make_experts(), make_experts().requires_grad_(False).prepack()
    give_gradients(*other.parameters())
    torch.optim.AdamW([*other.parameters(), *frozen.parameters()], fused=True).step()
    assert experts.is_prepacked
    assert frozen.is_prepacked


def test_a_step_drops_the_copies_of_all_that_share_the_weights() -> None:
    experts, tied = make_experts(), make_experts()
    tied.gate_up_proj = experts.gate_up_proj
    flat = nn.Parameter(torch.rand(experts.down_proj.numel()))
    experts.down_proj.data = flat.detach().view_as(experts.down_proj)
    experts.prepack()
    tied.prepack()
    give_gradients(flat, experts.gate_up_proj)
    with pytest.warns(UserWarning, match="updated by an optimizer"):
        torch.optim.SGD([flat], fused=True).step()
    assert not experts.is_prepacked
    assert tied.is_prepacked
    with pytest.warns(UserWarning, match="updated by an optimizer"):
        torch.optim.SGD([experts.gate_up_proj], fused=True).step()
    assert not tied.is_prepacked


@pytest.mark.parametrize("share", [nn.Module.share_memory, lambda experts: experts.down_proj.share_memory_()])
def test_weights_that_become_shared_are_noticed(share: Callable[[SwiGLUExperts], Any]) -> None:
    experts = make_experts().prepack()
    arguments = routed(3)

    def share_and_run() -> None:
        share(experts)
        experts(*arguments)

    with torch.no_grad(), pytest.warns(UserWarning, match="call prepack"):
        share_and_run()
    assert not experts.is_prepacked


def test_functions_of_other_weights_get_those(calls: Calls) -> None:
    experts, other = make_experts().prepack(), make_experts()
    arguments, weights = routed(20), dict(other.named_parameters())
    expected = other(*arguments)

    def run(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(experts, weights, arguments)

    gradients = torch.func.grad(lambda weights: run(weights).sum())(weights)
    assert experts.is_prepacked
    assert gradients["down_proj"].abs().sum() > 0
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        experts.prepack()
        with torch.no_grad(), pytest.warns(UserWarning, match="were changed"):
            y = function(weights)
        assert_close(y, expected)
    assert calls.packed == 0


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
@pytest.mark.parametrize("change", [in_place, fused_step, data_replaced_twice, averaged])
def test_a_compiled_layer_notices_changed_weights_and_training(change: Callable[[SwiGLUExperts], None]) -> None:
    torch._dynamo.reset()
    layer = DynamicMoE(H, I, E, init_std=0.3, shared_intermediate_size=20).eval().prepack()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(20, H)
    graphs = []
    for repetition in range(3):
        warned = pytest.warns(UserWarning, match="call prepack") if repetition == 0 else nullcontext()
        layer.prepack()
        with torch.no_grad(), warned:
            before = compiled(x)
            change(layer.experts)
            after = compiled(x)
            assert not layer.experts.is_prepacked
            assert not torch.allclose(before, after)
            assert_close(after, layer(x))
        layer.prepack()
        with warned:
            compiled(x).sum().backward()
        assert not layer.experts.is_prepacked
        assert layer.experts.down_proj.grad is not None
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[2]  # every state has been seen


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


def in_inference_mode() -> SwiGLUExperts:
    with torch.inference_mode():
        return make_experts()


def computed(how: Callable[[SwiGLUExperts, str], Any]) -> SwiGLUExperts:
    experts = make_experts()
    how(experts, "down_proj")
    return experts


def marked(name: str) -> SwiGLUExperts:
    """As FSDP 1 and DeepSpeed mark the parameters that they shard."""
    experts = make_experts()
    setattr(experts.gate_up_proj, name, True)
    return experts


def mapped(shared: bool) -> SwiGLUExperts:
    """With weights from a file that is mapped into memory; ``is_shared`` says the opposite of ``shared`` of both."""
    experts = make_experts()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights"
        if shared:
            torch.save(experts.state_dict(), path)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                experts.load_state_dict(torch.load(path, mmap=True), assign=True)
        else:
            experts.down_proj.detach().numpy().tofile(path)
            values = torch.from_file(path, shared=False, size=experts.down_proj.numel())
            experts.down_proj = nn.Parameter(values.view_as(experts.down_proj))
    assert experts.down_proj.is_shared() != shared
    return experts


def sharded() -> SwiGLUExperts:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return fully_shard(make_experts(), mesh=distributed.init_device_mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (in_inference_mode, "gate_up_proj must be .* got an inference tensor"),
        (lambda: make_experts().share_memory(), "gate_up_proj must be .* got memory that other processes"),
        (lambda: mapped(shared=True), "gate_up_proj must be .* got memory that other processes"),
        (lambda: make_experts().to("meta"), "gate_up_proj must be .* got a weight on the meta device.*accelerate"),
        (sharded, "gate_up_proj must be .* got DTensor"),
        (lambda: marked("_fsdp_flattened"), "gate_up_proj must be .* got a sharded weight"),
        (lambda: marked("ds_id"), "gate_up_proj must be .* got a sharded weight"),
        (lambda: computed(prune.identity), "down_proj must be a parameter of SwiGLUExperts"),
        (
            lambda: computed(lambda experts, name: parametrize.register_parametrization(experts, name, nn.Identity())),
            "down_proj must be a parameter of .*SwiGLUExperts",
        ),
    ],
)
def test_weights_that_could_change_unseen_are_refused(make: Callable[[], SwiGLUExperts], match: str) -> None:
    experts = make()
    with pytest.raises(ValueError, match=match):
        experts.prepack()
    assert not experts.is_prepacked


def test_weights_in_a_private_map_of_a_file_can_be_packed() -> None:
    assert mapped(shared=False).prepack().is_prepacked


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
