# SPDX-License-Identifier: Apache-2.0
"""CUDA where there is no device: fake tensors, traced graphs, what is registered, what is refused. See test_gpu.py."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_moe import _C, DynamicMoE, TopPRouter, _gpu_record, losses, ops

pytestmark = pytest.mark.level_independent
raw = torch.ops.dynamic_moe
T, E, H, I, K = 12, 4, 16, 24, 2  # noqa: E741
ON_CUDA = {
    "combine",
    "combine_backward",
    "expert_mlp",
    "expert_mlp_backward",
    "float32_linear",
    "float32_linear_dw",
    "float32_linear_dx",
    "gating_backward",
    "grouped_matmul",
    "grouped_matmul_dw",
    "grouped_matmul_dx",
    "permute",
    "top_k_gating",
    "top_p_gating",
    "top_p_gating.tensor",
}
ON_CPU_ALONE = {"expert_mlp_prepacked", "prepack_experts"}


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


class Recorder(TorchDispatchMode):
    """Notes the arguments of every operator of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dynamic_moe":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


@pytest.mark.parametrize("name", sorted(ON_CUDA | ON_CPU_ALONE))
def test_an_operator_has_a_cuda_kernel_where_the_build_has_cuda(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"dynamic_moe::{name}", "CUDA")
    assert registered == (name in ON_CUDA and _C.build_info()["cuda"] is not None)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dynamic_moe::{name}", "CPU")


def test_every_operator_is_listed_here() -> None:
    names = {
        name.removeprefix("dynamic_moe::") for name in torch._C._dispatch_get_all_op_names() if "dynamic_moe" in name
    }
    assert names == ON_CUDA | ON_CPU_ALONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static_rows", [True, False])
def test_fake_results_lie_on_the_device(fake: FakeTensorMode, dtype: torch.dtype, static_rows: bool) -> None:
    if not static_rows:
        fake.shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    gating = ops.top_p_gating(empty(T, E, dtype=dtype), 0.6, max_experts=K)
    assert [field.dtype for field in gating] == [torch.int32, torch.float32, torch.int32, *[torch.float32] * 4]
    p = ops.permute(gating.expert_ids, E, static_rows=static_rows)
    if static_rows:
        assert p.row_token.shape == (T * K,)
    rows = ops.grouped_matmul(empty(T, H, dtype=dtype), empty(E, I, H, dtype=dtype), p.expert_offsets, p.row_token)
    y = ops.combine(rows, gating.expert_weights, p.slot_row)
    assert (y.shape, y.dtype) == ((T, I), dtype)
    z = ops.expert_mlp(
        empty(T, H, dtype=dtype),
        empty(E, 2 * I, H, dtype=dtype),
        empty(E, H, I, dtype=dtype),
        gating.expert_ids,
        gating.expert_weights,
        p,
    )
    assert (z.shape, z.dtype) == ((T, H), dtype)
    for tensor in (*gating, *p[:-1], rows, y, z):
        assert tensor.device.type == "cuda"


def layer(static_rows: bool = True, **options: Any) -> DynamicMoE:
    router = TopPRouter(H, E, max_experts=K, device="cuda", dtype=torch.bfloat16)
    return DynamicMoE(H, I, E, router=router, static_rows=static_rows, device="cuda", dtype=torch.bfloat16, **options)


def traced(function: Any, *inputs: Tensor) -> torch.fx.Graph:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    # Nothing asks for a value of the device, and nothing leaves it.
    assert not [node for node in graph.nodes if "_local_scalar_dense" in str(node.target)]
    values = [node.meta["val"] for node in graph.nodes if node.op == "call_function" and "val" in node.meta]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"cuda"}
    return graph


def operators(graph: torch.fx.Graph) -> list[str]:
    return [node.target._opname for node in graph.nodes if getattr(node.target, "namespace", "") == "dynamic_moe"]


@torch.no_grad()
def test_a_forward_pass_of_the_layer_is_traced(fake: FakeTensorMode) -> None:
    module = layer(shared_intermediate_size=8, shared_gated=True)
    graph = traced(lambda x: module(x), empty(3, 4, H))
    routed, shared = ["float32_linear", "top_p_gating", "permute", "expert_mlp"], ["permute", "expert_mlp"]
    assert operators(graph) == [*routed, "float32_linear", *shared]


@torch.no_grad()
def test_the_backward_operators_are_traced(fake: FakeTensorMode) -> None:
    def backward(
        dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
    ) -> tuple[Tensor, ...]:
        p = ops.permute(ids, E, static_rows=True)
        index = (p.expert_offsets, p.row_token, p.row_slot)
        _, kept = raw.expert_mlp(x, gate_up, down, weights, *index, True)
        d_rows, d_weights = raw.combine_backward(dy, kept.narrow(1, 0, H), weights, p.slot_row, True, True)
        return (
            *raw.expert_mlp_backward(dy, x, gate_up, down, weights, *index, kept, True, True, True),
            raw.grouped_matmul_dx(kept, gate_up, p.expert_offsets, p.row_token, T),
            raw.grouped_matmul_dw(kept, x, p.expert_offsets, p.row_token),
            raw.gating_backward(
                empty(T, E, dtype=torch.float32),
                ids,
                empty(T, dtype=torch.float32),
                None,
                weights,
                None,
                None,
                None,
                None,
                False,
                1.0,
                torch.bfloat16,
            ),
            d_rows,
            d_weights,
            raw.float32_linear_dx(empty(T, E, dtype=torch.float32), empty(E, H), torch.bfloat16),
            raw.float32_linear_dw(empty(T, E, dtype=torch.float32), x, torch.bfloat16),
        )

    x = empty(T, H)
    gate_up, down = empty(E, 2 * I, H), empty(E, H, I)
    weights, ids = empty(T, K, dtype=torch.float32), empty(T, K, dtype=torch.int32)
    graph = traced(backward, x, x, gate_up, down, weights, ids)
    forward = {"combine", "float32_linear", "grouped_matmul", "top_k_gating", "top_p_gating", "top_p_gating.tensor"}
    assert set(operators(graph)) == ON_CUDA - forward
    shapes = [tuple(node.meta["val"].shape) for node in next(iter(reversed(graph.nodes))).args[0]]
    assert shapes == [
        (T, H),
        (E, 2 * I, H),
        (E, H, I),
        (T, K),
        (T, H),
        (E, 2 * I, H),
        (T, E),
        (T * K, H),
        (T, K),
        (T, H),
        (E, H),
    ]


@pytest.mark.gpu  # torch asks the device for a context before it goes backward, also with fake tensors
def test_a_training_step_of_the_layer_is_traced(fake: FakeTensorMode) -> None:
    module = layer(shared_intermediate_size=8, shared_gated=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def step(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        bound = dict(zip(names, parameters, strict=True))
        y, routing = torch.func.functional_call(module, bound, x, {"return_routing": True})
        loss = y.float().square().mean() + losses.load_balancing(routing) + losses.dynamic(routing)
        return (y, *torch.autograd.grad(loss, [x, *parameters]))

    found = operators(traced(step, empty(3, 4, H, grad=True), *parameters))
    assert found.count("expert_mlp") == found.count("expert_mlp_backward") == 2
    assert {"top_p_gating", "permute", "gating_backward"} <= set(found)


@torch.no_grad()
def test_compile_traces_the_layer_into_one_graph(fake: FakeTensorMode) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    y = torch.compile(layer(), backend=backend, fullgraph=True)(empty(5, H))
    assert (y.shape, y.device.type) == ((5, H), "cuda")
    (graph,) = graphs
    assert raw.expert_mlp.default in {node.target for node in graph.graph.nodes}


@pytest.fixture
def autocast_to_float16() -> Iterator[None]:
    """What ``torch.autocast("cuda")`` sets, which does nothing where there is no device."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@torch.no_grad()
def test_autocast_casts_the_products_and_leaves_the_gates(fake: FakeTensorMode, autocast_to_float16: None) -> None:
    module = DynamicMoE(H, I, E, device="cuda", static_rows=True)
    y, routing = module(empty(5, H, dtype=torch.float32), return_routing=True)
    assert y.dtype == torch.float16
    assert routing.expert_weights.dtype == routing.logits.dtype == torch.float32


@pytest.fixture
def precision() -> Iterator[Any]:
    """Torch's setting for float32 products on CUDA, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def tf32_of(recorder: Recorder) -> dict[str, bool]:
    """Whether each product was allowed to round to TF32."""
    allowed = {}
    for name, args in recorder.calls:
        arguments = [argument.name for argument in getattr(raw, name).default._schema.arguments]
        if "allow_tf32" in arguments:
            allowed[name] = bool(dict(zip(arguments, args, strict=False)).get("allow_tf32", False))
    return allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_tf32_is_what_torch_is_told(
    fake: FakeTensorMode, precision: Any, grad: bool, setting: str, dtype: torch.dtype
) -> None:
    shapes = {"x": (T, H), "weight": (E, I, H), "gate_up": (E, 2 * I, H), "down": (E, H, I)}
    x, weight, gate_up, down = leaves = [empty(*shape, dtype=dtype, grad=grad) for shape in shapes.values()]
    ids, weights = empty(T, K, dtype=torch.int32), empty(T, K, dtype=torch.float32)
    precision.fp32_precision = setting
    expected = {"grouped_matmul", "expert_mlp"}
    with Recorder() as recorder:
        y = ops.grouped_matmul(x, weight, empty(E + 1, dtype=torch.int32))
        z = ops.expert_mlp(x, gate_up, down, ids, weights, static_rows=True)
        if grad:
            precision.fp32_precision = "ieee"  # the backward pass does as the forward pass did
            torch.autograd.grad([y, z], leaves, [torch.ones_like(y), torch.ones_like(z)])
            expected |= {"grouped_matmul_dx", "grouped_matmul_dw", "expert_mlp_backward"}
    assert tf32_of(recorder) == dict.fromkeys(expected, setting == "tf32" and dtype == torch.float32)


@torch.no_grad()
def test_compiled_products_follow_the_setting(fake: FakeTensorMode, precision: Any) -> None:
    torch._dynamo.reset()
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(node.args[-1] for node in graph.graph.nodes if node.target is raw.grouped_matmul.default)
        return graph.forward

    call = torch.compile(ops.grouped_matmul, backend=backend, fullgraph=True)
    arguments = (empty(T, H, dtype=torch.float32), empty(E, I, H, dtype=torch.float32), empty(E + 1, dtype=torch.int32))
    for setting in ("ieee", "tf32"):
        precision.fp32_precision = setting
        call(*arguments)
    assert seen == [False, True]


def test_the_cpu_never_rounds_to_tf32(precision: Any) -> None:
    precision.fp32_precision = "tf32"
    assert not ops._common.allow_tf32(torch.zeros(1))


def test_float64_is_refused(fake: FakeTensorMode) -> None:
    x, ids = empty(T, H, dtype=torch.float64), empty(T, K, dtype=torch.int32)
    weights = empty(T, K, dtype=torch.float64)
    offsets = empty(E + 1, dtype=torch.int32)
    for name, call in {
        "logits": lambda: ops.top_p_gating(empty(T, E, dtype=torch.float64)),
        "rows": lambda: ops.combine(x, None, ids),
        "x": lambda: ops.grouped_matmul(x, empty(E, I, H, dtype=torch.float64), offsets),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be float32, bfloat16 or float16 on CUDA, got float64$"):
            call()
    double = {"dtype": torch.float64}
    with pytest.raises(ValueError, match=r"^x must be float32, bfloat16 or float16 on CUDA, got float64$"):
        ops.expert_mlp(x, empty(E, 2 * I, H, **double), empty(E, H, I, **double), ids, weights)


def test_packing_is_refused_and_says_what_to_call(fake: FakeTensorMode) -> None:
    gate_up, down = empty(E, 2 * I, H), empty(E, H, I)
    with pytest.raises(
        ValueError, match=r"^gate_up_proj must be on the CPU to be packed, got cuda:0: .* call expert_mlp$"
    ):
        ops.prepack_experts(gate_up, down)
    with pytest.raises(ValueError, match="must be on the CPU to be packed"):
        layer().prepack()
    packed = ops.PackedExperts(torch.empty(64, dtype=torch.uint8), torch.bfloat16, E, H, I)
    with pytest.raises(
        ValueError, match=r"^x must be on the CPU like packed weights, got cuda:0: call expert_mlp there$"
    ):
        ops.expert_mlp_prepacked(empty(T, H), packed, empty(T, K, dtype=torch.int32), empty(T, K))


def test_tensors_of_two_devices_are_refused(fake: FakeTensorMode) -> None:
    with pytest.raises(ValueError, match=r"^weight must be on cuda:0 like the other arguments, got cpu$"):
        ops.grouped_matmul(empty(T, H), torch.empty(E, I, H, dtype=torch.bfloat16), empty(E + 1, dtype=torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("confirmed", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_use_warns_once_until_a_device_has_confirmed_the_kernels(
    fake: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    compiled: bool,
    confirmed: bool,
) -> None:
    torch._dynamo.reset()
    warnings.simplefilter("always")
    monkeypatch.setattr(_gpu_record, "is_confirmed", confirmed)
    ids = empty(T, K, dtype=torch.int32)
    calls = {
        "permute": lambda: ops.permute(ids, E, static_rows=True),
        "gating": lambda: ops.top_p_gating(empty(T, E)),
        "linear": lambda: ops._float32_linear.float32_linear(empty(T, H), empty(E, H)),
        "layer": lambda: layer()(empty(T, H)),
    }
    ops.top_p_gating(torch.randn(2, 3, device="cpu"))
    for name, call in calls.items():
        monkeypatch.setattr(_gpu_record, "_has_warned", False)
        recwarn.clear()
        for _ in range(2):
            (torch.compile(call, backend="eager") if compiled and name != "layer" else call)()
        found = [str(warning.message) for warning in recwarn if "no GPU has confirmed" in str(warning.message)]
        assert len(found) == (0 if confirmed else 1), name
