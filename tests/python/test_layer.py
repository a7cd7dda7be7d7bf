# SPDX-License-Identifier: Apache-2.0
"""DynamicMoE: the whole layer against an oracle, and everything that a module has to bear."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamic_moe import DynamicMoE, Router, Routing, SwiGLUExperts, TopKRouter, TopPRouter, losses, ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32, **options: Any) -> DynamicMoE:
    torch.manual_seed(0)
    return DynamicMoE(24, 40, 6, init_std=0.2, dtype=dtype, **options)


def oracle(layer: DynamicMoE, x_TH: Tensor, routing: Routing) -> Tensor:
    """The experts that ``routing`` names, one token and one expert at a time, in float64."""
    gate_up, down = layer.experts.gate_up_proj.double(), layer.experts.down_proj.double()
    rows = []
    for x, ids, weights in zip(
        x_TH.double(), routing.expert_ids.tolist(), routing.expert_weights.double(), strict=True
    ):
        y = torch.zeros_like(x)
        for expert, weight in zip(ids, weights, strict=True):
            if expert < layer.num_experts:
                gate, up = (gate_up[expert] @ x).chunk(2)
                y = y + weight * (down[expert] @ (functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows) if rows else x_TH.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_the_weighted_sum_of_the_selected_experts(dtype: torch.dtype) -> None:
    layer = make(dtype)
    x = torch.randn(4, 5, 24).to(dtype)
    y, routing = layer(x, return_routing=True)
    assert y.shape == x.shape
    assert y.dtype == dtype
    expected = oracle(layer, x.reshape(20, 24), routing).reshape(x.shape)
    error = (y.double() - expected).abs()
    roundings = 8 if dtype in (torch.bfloat16, torch.float16) else 100
    assert (error <= roundings * torch.finfo(dtype).eps * (expected.abs() + expected.abs().mean())).all()
    assert torch.equal(layer(x), y)


def test_worked_outputs_of_the_paper() -> None:
    # Token t is the unit vector t and a constant; expert e answers 10 (e + 1) to everything.
    logits = [[2.0, 0.0, -1.0, 0.5], [0.2, 0.1, 0.0, -0.1], [1.0, 0.8, 0.0, -2.0], [-0.5, 0.9, 0.7, 0.3]]
    layer = DynamicMoE(hidden_size=5, intermediate_size=1, num_experts=4, top_p=0.4, init_std=0.0, dtype=torch.float64)
    with torch.no_grad():
        layer.router.get_parameter("weight")[:, :4] = torch.tensor(logits, dtype=torch.float64).T
        layer.experts.gate_up_proj[:, 0, 4] = 40.0  # silu(40) = 40 to the last bit
        layer.experts.gate_up_proj[:, 1, 4] = 1 / 40.0
        layer.experts.down_proj[:, :, 0] = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    x = torch.cat([torch.eye(4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)], -1)
    y, routing = layer(x, return_routing=True)
    assert routing.experts_per_token.tolist() == [1, 2, 1, 2]
    assert y[:, 0].tolist() == pytest.approx([7.100999, 8.110166, 4.471477, 17.046499], abs=6e-7)
    loss = 1e-2 * losses.load_balancing(routing) + 1e-4 * losses.dynamic(routing)
    assert loss.item() == pytest.approx(0.0190710, abs=6e-8)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    layer = DynamicMoE(
        3, 2, 3, top_p=0.6, shared_intermediate_size=2, shared_gated=True, init_std=0.7, dtype=torch.float64
    )
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), x, {"return_routing": True}
        )
        return y, losses.load_balancing(routing) + losses.dynamic(routing) + losses.router_z(routing)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_match_float64(dtype: torch.dtype) -> None:
    layer = make(dtype, router=TopKRouter(24, 6, k=2, init_std=0.5, dtype=dtype), shared_intermediate_size=16)
    wide = copy.deepcopy(layer).double()
    x = torch.randn(30, 24).to(dtype)
    d_y = torch.randn(30, 24).to(dtype)
    for module, dtype_of_run in ((layer, dtype), (wide, torch.float64)):
        y, routing = module(x.to(dtype_of_run), return_routing=True)
        torch.autograd.backward([y, losses.load_balancing(routing)], [d_y.to(dtype_of_run), None])
    for (name, ours), theirs in zip(layer.named_parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_functional_gradient_equals_backward(dtype: torch.dtype) -> None:
    layer, x = make(dtype), torch.randn(9, 24).to(dtype)
    _, loss, _ = train_step(layer, x)
    loss.backward()

    def run(parameters: dict[str, Tensor]) -> Tensor:
        y, routing = torch.func.functional_call(layer, parameters, x, {"return_routing": True})
        balance = losses.load_balancing(routing) + losses.dynamic(routing) + losses.router_z(routing)
        return y.square().mean() + balance

    gradients = torch.func.grad(run)({name: parameter.detach() for name, parameter in layer.named_parameters()})
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("gated", [False, True])
def test_the_shared_expert_is_added(gated: bool) -> None:
    layer = make(shared_intermediate_size=16, shared_gated=gated)
    x = torch.randn(7, 24)
    y = layer(x)
    assert layer.shared_expert is not None
    shared = layer.shared_expert(x)
    layer.shared_expert = None
    torch.testing.assert_close(y, layer(x) + shared)


def test_masked_tokens_are_not_routed() -> None:
    layer = make()
    x = torch.randn(2, 4, 24)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    y, routing = layer(x, token_mask=mask, return_routing=True)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[mask], layer(x[mask]))
    assert routing.num_tokens.item() == 5
    assert routing.dropped_tokens.item() == 0


def test_any_module_can_route() -> None:
    class ByPosition(nn.Module):
        """Token t goes to expert t mod 3: no weight, no base class."""

        def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
            ids = (torch.arange(x.shape[0]) % 3)[:, None]
            return Routing.from_selection(
                x.new_zeros(x.shape[0], 6), ids, x.new_ones(x.shape[0], 1), token_mask_T=token_mask
            )

    layer = make(router=ByPosition())
    y, routing = layer(torch.randn(7, 24), return_routing=True)
    assert routing.tokens_per_expert.tolist() == [3, 2, 2, 0, 0, 0]
    assert y.isfinite().all()
    layer.reset_parameters()


class ScaledExperts(nn.Module):
    """Expert e multiplies by a number of its own; without sizes, so that none can be compared."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, num_experts + 1))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        scale = functional.pad(self.scale, (0, 1))[expert_ids.long()]
        return x * (scale * expert_weights).sum(-1, keepdim=True)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.level_independent)])
def test_any_module_can_be_the_experts(compiled: bool) -> None:
    torch.manual_seed(0)
    layer = DynamicMoE(24, None, 6, experts=ScaledExperts(6), shared_intermediate_size=8)
    assert layer.intermediate_size is None
    x = torch.randn(5, 7, 24)
    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y, routing = function(x, return_routing=True)
    dense = torch.zeros(35, 7).scatter(1, routing.expert_ids.long(), routing.expert_weights)[:, :6]
    expected = x * (dense @ layer.experts.scale).reshape(5, 7, 1) + layer.shared_expert(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.experts.scale.grad.abs().min() > 0
    assert layer.router.weight.grad.abs().max() > 0
    assert set(layer.state_dict()) >= {"router.weight", "experts.scale"}


def test_the_rule_in_the_documentation_works() -> None:
    namespace: dict[str, Any] = {"Router": Router, "Routing": Routing}
    documentation = Router.__doc__
    assert documentation is not None
    lines = documentation.split("::\n", 1)[1].split("\n\n    :class:", 1)[0].splitlines()
    source = "\n".join(line[8:] for line in lines)
    assert len(source.strip().splitlines()) <= 10
    exec(source, namespace)
    layer = make(router=namespace["ThresholdRouter"](24, 6))
    y, routing = layer(torch.randn(9, 24), return_routing=True)
    (y.square().mean() + losses.load_balancing(routing)).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (24,), (1, 24)])
@pytest.mark.parametrize("shared", [None, 8])
def test_empty_and_single_token_inputs(shape: tuple[int, ...], shared: int | None) -> None:
    layer = make(shared_intermediate_size=shared)
    y, routing = layer(torch.randn(shape), return_routing=True)
    assert y.shape == shape
    (y.sum() + losses.load_balancing(routing) + losses.dynamic(routing) + losses.router_z(routing)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert y.numel() > 0 or (parameter.grad == 0).all(), name


def test_non_contiguous_input_and_gradient() -> None:
    layer = make()
    x = torch.randn(24, 9).T.requires_grad_()
    same = x.detach().contiguous().requires_grad_()
    layer(x).sum().backward()  # an expanded gradient
    gradient = layer.experts.gate_up_proj.grad
    layer.zero_grad()
    (layer(same) * torch.ones(9, 24)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, same.grad)
    assert gradient is not None
    torch.testing.assert_close(gradient, layer.experts.gate_up_proj.grad)


def test_a_nan_token_does_not_touch_the_others() -> None:
    layer = make()
    x = torch.randn(6, 24)
    clean = layer(x)
    x[2, 3] = float("nan")
    y = layer(x)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


def test_runs_twice_to_the_bit() -> None:
    layer, x = make(), torch.randn(50, 24)
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        y, routing = layer(x, return_routing=True)
        (y.square().sum() + losses.load_balancing(routing)).backward()
        gradients.append([y, *(parameter.grad for parameter in layer.parameters())])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_keeps_the_input_and_the_pre_activation_only() -> None:
    tokens, hidden, intermediate, experts = 512, 64, 96, 4
    layer = DynamicMoE(hidden, intermediate, experts, dtype=torch.bfloat16)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, routing = layer(x, return_routing=True)
    rows = int(routing.tokens_per_expert.sum())
    gating = tokens * (4 * experts * 3 + 4) + rows * 8  # probabilities, ids, weights, entropy; row_token, row_slot
    assert sum(kept.values()) <= 2 * tokens * hidden + 4 * rows * intermediate + gating + 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = make(shared_intermediate_size=16)
    x = torch.randn(11, 24)
    _, exact = layer(x, return_routing=True)
    with torch.autocast("cpu", dtype=dtype):
        y, routing = layer(x, return_routing=True)
    assert y.dtype == dtype
    assert torch.equal(routing.logits, exact.logits)
    assert torch.equal(routing.expert_ids, exact.expert_ids)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def train_step(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
    y, routing = layer(x, return_routing=True)
    loss = y.square().mean() + losses.load_balancing(routing) + losses.dynamic(routing) + losses.router_z(routing)
    return y, loss, routing


@pytest.mark.level_independent
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "aot_eager"), (torch.bfloat16, "aot_eager"), (torch.float32, "inductor")]
)
def test_compiles_into_one_graph_for_any_number_of_tokens(dtype: torch.dtype, backend: str) -> None:
    layer = make(dtype, shared_intermediate_size=16, shared_gated=True)
    compiled_layer = copy.deepcopy(layer)
    step = torch.compile(train_step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (13, 29):
        x = torch.randn(tokens, 24).to(dtype)
        y, loss, routing = train_step(layer, x)
        compiled_y, compiled_loss, compiled_routing = step(compiled_layer, x)
        assert torch.equal(routing.expert_ids, compiled_routing.expert_ids)
        torch.testing.assert_close(compiled_y, y)
        torch.testing.assert_close(compiled_loss, loss)
        loss.backward()
        compiled_loss.backward()
    for (name, ours), theirs in zip(compiled_layer.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.level_independent
def test_autocast_compiles_into_one_graph() -> None:
    layer = make(shared_intermediate_size=16, shared_gated=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = compiled(x, return_routing=True)
        expected, _ = layer(x, return_routing=True)
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(y, expected)


@pytest.mark.level_independent
def test_p_may_change_between_compiled_steps() -> None:
    layer = make()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(9, 24)
    assert isinstance(layer.router, TopPRouter)
    for p in (0.3, 0.5, 0.7, 0.9):
        layer.router.p = p
        _, routing = compiled(x, return_routing=True)
        _, expected = layer(x, return_routing=True)
        assert torch.equal(routing.expert_ids, expected.expert_ids)


@pytest.mark.level_independent
def test_exports_with_a_dynamic_number_of_tokens() -> None:
    layer = make(shared_intermediate_size=16).eval()
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(layer, (torch.randn(8, 24),), dynamic_shapes={"x": {0: tokens}})
    x = torch.randn(21, 24)
    torch.testing.assert_close(program.module()(x), layer(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), layer(x))


def test_checkpointing_gives_the_same_gradients() -> None:
    layer, x = make(), torch.randn(12, 24)
    again = copy.deepcopy(layer)
    _, loss, _ = train_step(layer, x)
    loss.backward()

    def step(x: Tensor) -> Tensor:
        return train_step(again, x)[1]

    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).backward()
    for ours, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_state_dict_has_stable_keys_and_loads() -> None:
    layer = make(shared_intermediate_size=16, shared_gated=True)
    assert {name: list(value.shape) for name, value in layer.state_dict().items()} == {
        "router.weight": [6, 24],
        "experts.gate_up_proj": [6, 80, 24],
        "experts.down_proj": [6, 24, 40],
        "shared_expert.gate_up_proj": [32, 24],
        "shared_expert.down_proj": [24, 16],
        "shared_expert.gate": [1, 24],
    }
    torch.manual_seed(99)
    other = DynamicMoE(24, 40, 6, shared_intermediate_size=16, shared_gated=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_deepcopy_and_pickle_give_an_independent_equal(duplicate: Any) -> None:
    layer, x = make(shared_intermediate_size=16), torch.randn(5, 24)
    layer(x).sum().backward()  # a layer that has run carries nothing that cannot be copied
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.experts.down_proj.zero_()
    assert layer.experts.down_proj.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_converts_everything(dtype: torch.dtype) -> None:
    layer = make(shared_intermediate_size=16).to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.randn(3, 24, dtype=dtype)).dtype == dtype


def test_construction_on_the_meta_device() -> None:
    layer = make(device="meta", shared_intermediate_size=16)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    torch.manual_seed(7)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert 0.1 < parameter.std() < 0.3, name
    torch.manual_seed(7)
    again = make(shared_intermediate_size=16)
    torch.manual_seed(7)
    again.reset_parameters()
    x = torch.randn(4, 24)
    assert torch.equal(layer(x), again(x))


def test_the_meta_device_has_shapes_where_rows_are_static() -> None:
    layer, x = make(device="meta", static_rows=True, shared_intermediate_size=16), torch.randn(2, 5, 24, device="meta")
    y, routing = layer(x, return_routing=True)
    (y.sum() + losses.load_balancing(routing)).backward()
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with pytest.raises(ValueError, match="row_capacity must be given, got None: on the meta device"):
        make(device="meta")(x)


@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_need_static_rows(static_rows: bool) -> None:
    layer, samples = make(torch.float64, top_p=0.6, static_rows=static_rows), torch.randn(5, 3, 24).double()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, routing = torch.func.functional_call(layer, parameters, x, {"return_routing": True})
        return y.square().sum() + losses.load_balancing(routing)

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    assert len({int(layer(x, return_routing=True)[1].tokens_per_expert.sum()) for x in samples}) > 1
    if static_rows:
        gradients = of_each(parameters, samples)
        for index, x in enumerate(samples):
            for name, expected in torch.func.grad(loss)(parameters, x).items():
                torch.testing.assert_close(gradients[name][index], expected)
    else:
        with pytest.raises(ValueError, match=r"row_capacity must be given, got None: under torch.func.vmap"):
            of_each(parameters, samples)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.level_independent)])
def test_a_row_capacity_drops_the_last_experts(compiled: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(20, 24)
    full = make(router=TopKRouter(24, 6, 3))
    layer = make(router=TopKRouter(24, 6, 3), row_capacity=40)
    layer.load_state_dict(full.state_dict())
    y, routing = full(x, return_routing=True)
    keep = torch.tensor([True, True, False]).expand(20, 3)
    kept = routing.keep(keep)
    expected = full.experts(x, kept.expert_ids, kept.expert_weights)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True) if compiled else layer
    assert torch.equal(run(x), expected)
    assert not torch.equal(expected, y)
    assert torch.equal(run(x[:13]), full(x[:13]))  # 39 rows fit
    with torch.no_grad():
        torch.testing.assert_close(layer.prepack()(x), expected)


@pytest.mark.filterwarnings("ignore")  # every size that is compared is a constant of the trace
def test_a_layer_is_traced() -> None:
    layer = DynamicMoE(hidden_size=24, intermediate_size=16, num_experts=6, shared_intermediate_size=8)
    x = torch.randn(5, 24)
    traced = torch.jit.trace(layer, x, check_trace=False)
    x = torch.randn(5, 24)
    assert torch.equal(traced(x), layer(x))


def test_sizes_may_be_numpy_integers() -> None:
    numpy = pytest.importorskip("numpy")
    size = numpy.int64
    routers = [
        TopPRouter(size(24), size(6), max_experts=size(3), temperature=numpy.float32(2.0)),
        TopKRouter(size(24), size(6), size(3), init_std=numpy.float32(0.1)),
    ]
    for router in routers:
        layer = DynamicMoE(size(24), size(40), size(6), router=router, shared_intermediate_size=size(16))
        assert layer(torch.randn(3, 24)).shape == (3, 24)
        attributes = [value for module in layer.modules() for value in vars(module).values()]
        assert not [value for value in attributes if isinstance(value, numpy.generic)]
    ids = torch.zeros(3, 2, dtype=torch.int32)
    assert torch.equal(ops.permute(ids, size(6)).row_slot, ops.permute(ids, 6).row_slot)
    for wrong in (True, numpy.True_, 6.0, numpy.float64(6.0), torch.tensor(6), "6"):
        with pytest.raises(ValueError, match="num_experts must be an integer"):
            ops.permute(ids, wrong)
        with pytest.raises(ValueError, match="hidden_size must be an integer"):
            make(router=TopPRouter(wrong, 6))


def test_parameters_start_at_the_given_standard_deviation() -> None:
    torch.manual_seed(0)
    for std in (0.02, 0.006):
        layer = DynamicMoE(128, 128, 8, init_std=std)
        for name, parameter in layer.named_parameters():
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(parameter.mean().item()) < std / 10, name


def test_no_buffers() -> None:
    assert list(make(shared_intermediate_size=16).buffers()) == []


def test_defaults() -> None:
    layer = DynamicMoE(24, 40, 6)
    assert isinstance(layer.router, TopPRouter)
    assert layer.router.p == 0.4
    assert layer.shared_expert is None
    assert repr(layer).startswith("DynamicMoE(\n  hidden_size=24, intermediate_size=40, num_experts=6\n")


class Doubled(ScaledExperts):
    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1)


class Constant(nn.Module):
    """A router that always returns the same."""

    def __init__(self, routing: Any) -> None:
        super().__init__()
        self.routing = routing

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Any:
        return self.routing


X = torch.zeros(3, 24)
STRANGE: dict[str, tuple[Any, str]] = {
    "list": (X.tolist(), "must be a Tensor, got list"),
    "none": (None, "must be a Tensor, got NoneType"),
    "sparse": (X.to_sparse(), r"must be a dense tensor, got one of layout torch.sparse_coo: call to_dense\(\)"),
    "csr": (X.to_sparse_csr(), "must be a dense tensor, got one of layout torch.sparse_csr"),
    "nested": (torch.nested.nested_tensor([X, X[:1]]), "must be a dense tensor, got a nested one"),
    "jagged": (
        torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged),
        r"must be a dense tensor, got a nested one: pass the values\(\)",
    ),
    "float8": (X.to(torch.float8_e4m3fn), "must be float32, bfloat16, float16 or float64, got torch.float8_e4m3fn"),
    "complex": (X.to(torch.complex64), "must be a floating-point tensor, got torch.complex64"),
    "quantized": (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "must be a floating-point .*, got torch.quint8"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore")  # of torch: sparse and nested tensors are in beta
def test_what_is_no_dense_float_tensor_is_named(kind: str) -> None:
    strange, message = STRANGE[kind]
    layer = make(shared_intermediate_size=16)
    for module in (layer, layer.router, layer.shared_expert):
        with pytest.raises(ValueError, match=f"^x {message}"):
            module(strange)
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=f"^x {message}"):
        layer.experts(strange, ids, weights)
    with pytest.raises(ValueError, match=r"^expert_ids must be"):
        layer.experts(X, strange, weights)
    with pytest.raises(ValueError, match=r"^expert_weights must (be|have)"):
        layer.experts(X, ids, strange)
    if strange is not None:
        with pytest.raises(ValueError, match=r"^token_mask must be"):
            layer(X, token_mask=strange)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DynamicMoE(0, 4, 4), "hidden_size must be an integer of at least 1, got 0"),
        (lambda: DynamicMoE(4, 0, 4), "intermediate_size must be an integer of at least 1, got 0"),
        (lambda: DynamicMoE(4, 4, 0), "num_experts must be an integer of at least 1, got 0"),
        (lambda: DynamicMoE(4, 4, 4, top_p=1.5), r"p must be in \(0, 1\], got 1.5"),
        (
            lambda: DynamicMoE(4, 4, 4, top_p=0.4, router=TopPRouter(4, 4)),
            "top_p must be None where a router is given, got 0.4",
        ),
        (
            lambda: DynamicMoE(4, 4, 4, router=TopPRouter(4, 8)),
            "router was built with num_experts=8, but the layer has num_experts=4",
        ),
        (
            lambda: DynamicMoE(4, 4, 4, router=TopPRouter(5, 4)),
            "router was built with hidden_size=5, but the layer has hidden_size=4",
        ),
        (lambda: make(router=TopPRouter), r"router must be a module, got the class TopPRouter: pass .*TopPRouter\("),
        (lambda: make(router=lambda x, mask: x), "router must be a torch.nn.Module that .*, got function"),
        (
            lambda: make(router=nn.Linear(24, 6)),
            r"router must take \(x, token_mask\) .* got Linear with forward\(input",
        ),
        (lambda: make(router=Constant(X))(X), "router must return a dynamic_moe.Routing, got Tensor"),
        (lambda: DynamicMoE(4, None, 2), "intermediate_size must be an integer of at least 1, got None"),
        (lambda: make(experts=ScaledExperts(6)), "intermediate_size must be None where experts are given, got 40"),
        (
            lambda: DynamicMoE(4, None, 2, experts=ScaledExperts(2), static_rows=True),
            "static_rows must be False where experts are given, got True",
        ),
        (
            lambda: DynamicMoE(4, None, 2, experts=SwiGLUExperts(3, 4, 5)),
            "experts were built with num_experts=3, but the layer has num_experts=2",
        ),
        (
            lambda: DynamicMoE(4, None, 2, experts=nn.Linear(4, 4)),
            r"experts must take \(x, expert_ids, expert_weights\) and return a Tensor, got Linear with forward\(input",
        ),
        (
            lambda: DynamicMoE(4, None, 2, experts=ScaledExperts),
            "experts must be a module, got the class ScaledExperts",
        ),
        (
            lambda: DynamicMoE(4, None, 2, experts=Doubled(2))(torch.ones(3, 4)),
            r"experts must return a Tensor of the shape of x, \[3, 4\], got \[3, 8\]",
        ),
        (
            lambda: DynamicMoE(4, None, 2, experts=ScaledExperts(2)).prepack(),
            r"experts must have a method prepack\(\) to be packed, got ScaledExperts",
        ),
        (
            lambda: make(router=Constant(TopKRouter(24, 8)(X)))(X),
            "router must return a Routing over num_experts=6, got one over 8 experts",
        ),
        (lambda: make(torch.int32), "dtype must be float32, bfloat16, float16 or float64, got torch.int32"),
        (lambda: DynamicMoE(4, 4, 4, shared_intermediate_size=0), "shared_intermediate_size must be an integer"),
        (lambda: DynamicMoE(4, 4, 4, shared_gated=True), "shared_gated must be False where"),
        (lambda: make()(torch.zeros(3, 17)), "x has width 17, but the module was built with hidden_size=24"),
        (lambda: make()(torch.zeros(3, 24).double()), "x must have the dtype of the weights, torch.float32"),
        (lambda: make()(torch.zeros(3, 24).long()), "x must be a floating-point tensor, got torch.int64"),
        (lambda: make()(torch.zeros(3, 24), token_mask=torch.ones(3)), "token_mask must be a bool tensor"),
        (
            lambda: make()(torch.zeros(2, 3, 24), token_mask=torch.ones(6, dtype=torch.bool)),
            r"token_mask must have the leading shape of x, \[2, 3\], got \[6\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
