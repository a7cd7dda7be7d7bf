# SPDX-License-Identifier: Apache-2.0
"""What torch expects of an operator: opcheck, gradcheck, compile, export, autocast, checkpointing, FLOPs."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck
from torch.nn.functional import silu
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dynamic_moe import ops, reference
from dynamic_moe.ops import _torch_private

pytestmark = pytest.mark.level_independent
raw = torch.ops.dynamic_moe
E, H, I = 4, 10, 7  # noqa: E741
OPERATORS = [
    "combine",
    "combine_backward",
    "expert_mlp",
    "expert_mlp_backward",
    "expert_mlp_prepacked",
    "float32_linear",
    "float32_linear_dw",
    "float32_linear_dx",
    "gating_backward",
    "grouped_matmul",
    "grouped_matmul_dw",
    "grouped_matmul_dx",
    "permute",
    "prepack_experts",
    "top_k_gating",
    "top_p_gating",
]


class Block(nn.Module):
    """Router and experts in one expression of operators."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.router = nn.Parameter(torch.randn(E, H))
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H) / H**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, I) / I**0.5)

    def forward(self, x: Tensor, module: Any = ops) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.router.T
        if self.fused:
            gating = module.top_p_gating(logits, 0.6)
            y = module.expert_mlp(x, self.gate_up_proj, self.down_proj, gating.expert_ids, gating.expert_weights)
        else:
            gating = module.top_k_gating(logits, 2)
            permutation = module.permute(gating.expert_ids, E)
            offsets = permutation.expert_offsets
            gate, up = module.grouped_matmul(x, self.gate_up_proj, offsets, permutation.row_token).chunk(2, dim=1)
            rows = module.grouped_matmul(silu(gate) * up, self.down_proj, offsets)
            y = module.combine(rows, gating.expert_weights, permutation.slot_row)
        return y, gating.probability_sum, gating.entropy + gating.logsumexp


def gradients(block: Block, call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The results of a call and the gradients of all that it depends on."""
    leaf = x.clone().requires_grad_()
    outputs = call(leaf)
    loss = sum((output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, [leaf, *block.parameters()])]


def linear_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """The three products of a router, of float32 alone."""
    x, weight, d_logits = (torch.randn(*shape, requires_grad=True) for shape in ((9, H), (E, H), (9, E)))
    return [
        (raw.float32_linear.default, (x, weight)),
        (raw.float32_linear_dx.default, (d_logits, weight, torch.float32)),
        (raw.float32_linear_dw.default, (d_logits, x, torch.float32)),
    ]


def raw_calls() -> list[Any]:
    """One call of every raw operator, as arguments that want a gradient where they can have one."""
    problem = make_problem(grad=True)
    p = problem.permutation
    rows = torch.randn(p.row_token.numel(), H, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(p.row_token.numel(), 2 * I, dtype=torch.float64)
    gating = ops.top_p_gating(problem.logits.detach(), 0.6)
    mask = torch.rand(9) > 0.2
    d_weights = torch.randn_like(gating.expert_weights)
    x, gate_up, down, weights = (tensor.detach() for tensor in problem.floats)
    index = (p.expert_offsets, p.row_token, p.row_slot)
    plain = problem.logits.detach()
    tail = (True, 0.7, torch.float64)
    return [
        pytest.param(raw.top_p_gating.default, (plain, 0.6, E, False, True, 0.7, mask, False), id="top_p_gating"),
        pytest.param(
            raw.top_p_gating.tensor,
            (plain, torch.tensor([0.6], dtype=torch.float64), E, False, True, 0.7, mask, False),
            id="top_p_gating of a tensor",
        ),
        pytest.param(raw.top_k_gating.default, (plain, 2, True, 1.0, None, False), id="top_k_gating"),
        pytest.param(
            raw.gating_backward.default,
            (gating.probabilities, gating.expert_ids, gating.entropy, mask, d_weights, *[None] * 4, *tail),
            id="gating_backward",
        ),
        pytest.param(raw.permute.default, (problem.expert_ids, E), id="permute"),
        pytest.param(raw.permute.default, (problem.expert_ids, E, 1000), id="permute with a row capacity"),
        pytest.param(raw.combine.default, (rows, problem.expert_weights, p.slot_row), id="combine"),
        pytest.param(raw.combine.default, (rows, None, p.slot_row), id="combine without weights"),
        pytest.param(
            raw.combine_backward.default, (x, rows.detach(), weights, p.slot_row, True, True), id="combine_backward"
        ),
        pytest.param(
            raw.grouped_matmul.default,
            (problem.x, problem.gate_up_proj, p.expert_offsets, p.row_token),
            id="grouped_matmul",
        ),
        pytest.param(
            raw.grouped_matmul_dx.default, (wide, gate_up, p.expert_offsets, p.row_token, 9), id="grouped_matmul_dx"
        ),
        pytest.param(raw.grouped_matmul_dw.default, (wide, x, p.expert_offsets, p.row_token), id="grouped_matmul_dw"),
        pytest.param(raw.expert_mlp.default, (*problem.floats, *index, True), id="expert_mlp"),
        pytest.param(
            raw.expert_mlp_backward.default,
            (x, x, gate_up, down, weights, *index, wide, True, True, True),
            id="expert_mlp_backward",
        ),
        pytest.param(
            raw.expert_mlp_backward.default,
            (x, x, gate_up, down, weights, *index, wide, False, True, False),
            id="expert_mlp_backward of the projections alone",
        ),
        *(pytest.param(op, arguments, id=op._opname) for op, arguments in linear_calls()),
        pytest.param(raw.prepack_experts.default, (gate_up.float(), down.float()), id="prepack_experts"),
        pytest.param(
            raw.expert_mlp_prepacked.default,
            (x.float(), raw.prepack_experts(gate_up.float(), down.float()), I, weights.float(), *index),
            id="expert_mlp_prepacked",
        ),
    ]


@pytest.mark.parametrize(("op", "arguments"), raw_calls())
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    # Gating is called without requires_grad: opcheck adds up the sums of all outputs, beginning with the integers, and
    # fails on that. Its gradient under AOTAutograd is tested by the compile tests below.
    torch.library.opcheck(op, arguments)


def test_every_operator_has_a_call_above() -> None:
    names = {call.values[0]._opname for call in raw_calls()}
    assert names == set(OPERATORS)


@pytest.mark.parametrize("through", ["public", "raw"])
def test_gradcheck(through: str) -> None:
    problem = make_problem(tokens=5, hidden=3, intermediate=2, grad=True)
    p = problem.permutation
    offsets, row_token, row_slot = p.expert_offsets, p.row_token, p.row_slot
    rows = torch.randn(row_token.numel(), 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    checks: list[tuple[Callable[..., Any], tuple[Tensor, ...]]]
    if through == "public":
        checks = [
            (lambda logits: ops.top_p_gating(logits, 0.6)[1], (problem.logits,)),
            (lambda logits: ops.top_p_gating(logits, 0.6)[3:], (problem.logits,)),
            (
                lambda logits: ops.top_p_gating(logits, 0.6, renormalize=True, temperature=0.7, token_mask=mask)[1],
                (problem.logits,),
            ),
            (lambda logits: ops.top_k_gating(logits, 2)[1], (problem.logits,)),
            (lambda rows, weights: ops.combine(rows, weights, p.slot_row), (rows, problem.expert_weights)),
            (lambda rows: ops.combine(rows, None, p.slot_row), (rows,)),
            (lambda x, w: ops.grouped_matmul(x, w, offsets, row_token), (problem.x, problem.gate_up_proj)),
            (lambda x, g, d, w: ops.expert_mlp(x, g, d, problem.expert_ids, w), problem.floats),
        ]
    else:
        checks = [
            (lambda logits: raw.top_p_gating(logits, 0.6, E, False, True, 0.7, mask, False)[1], (problem.logits,)),
            (lambda logits: raw.top_k_gating(logits, 2, True, 1.0, None, False)[5], (problem.logits,)),
            (lambda rows, weights: raw.combine(rows, weights, p.slot_row), (rows, problem.expert_weights)),
            (lambda x, w: raw.grouped_matmul(x, w, offsets, row_token), (problem.x, problem.gate_up_proj)),
            (lambda x, g, d, w: raw.expert_mlp(x, g, d, w, offsets, row_token, row_slot, True)[0], problem.floats),
        ]
    for function, inputs in checks:
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "mark_dynamic"])
def test_compile_traces_one_graph_for_all_token_counts(fused: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    block = Block(fused)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=graphs)
    graphs_made = set()
    for tokens in (7, 33, 64, 12):
        x = torch.randn(tokens, H)
        leaf = x.clone().requires_grad_()
        if dynamic is None:
            torch._dynamo.mark_dynamic(leaf, 0)
        outputs = compiled(leaf)
        expected = gradients(block, lambda x: block(x, reference), x)
        loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
        actual = [*outputs, *torch.autograd.grad(loss, [leaf, *block.parameters()])]
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, atol=1e-4, rtol=1e-4)
        graphs_made.add(graphs.frame_count)
    assert len(graphs_made) == 1  # all by the first call


@pytest.mark.parametrize("tokens", [0, 1])
def test_compile_with_hardly_a_token(tokens: int) -> None:
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(tokens, H)
    expected = gradients(block, lambda x: block(x, reference), x)
    for a, b in zip(gradients(block, compiled, x), expected, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_inductor() -> None:
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (7, 33):
        x = torch.randn(tokens, H)
        expected = gradients(block, lambda x: block(x, reference), x)
        for a, b in zip(gradients(block, compiled, x), expected, strict=True):
            assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_compile_without_gradients_drops_the_pre_activation() -> None:
    torch._dynamo.reset()
    block = Block()
    kept: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        kept.extend(node.args[-2] for node in graph.graph.nodes if node.target is raw.expert_mlp.default)
        return graph.forward

    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend=backend)(torch.randn(5, H))
    torch.compile(block, fullgraph=True, backend=backend)(torch.randn(5, H))
    assert kept == [False, True]


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operators_and_their_gradients(strict: bool) -> None:
    block = Block()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (torch.randn(6, H),), dynamic_shapes=({0: tokens},), strict=strict)
    nodes = {node.target for node in program.graph.nodes}
    assert {raw.top_p_gating.default, raw.permute.default, raw.expert_mlp.default} <= nodes
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    exported = torch.export.load(stored).module()
    for count in (2, 5, 300):
        x = torch.randn(count, H)
        for a, b in zip(exported(x), block(x), strict=True):
            assert_close(a, b)
    block(x)[0].square().sum().backward()
    exported(x)[0].square().sum().backward()
    for name, parameter in exported.named_parameters():
        assert_close(parameter.grad, block.get_parameter(name).grad)


def test_a_program_exported_without_gradients_runs_anywhere_and_says_why_it_has_none() -> None:
    block = Block()
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(6, H),))
    y = program.module()(x := torch.randn(6, H))[0]
    assert_close(y, block(x)[0])
    with pytest.raises(RuntimeError, match="keep_pre_activation=False"):
        y.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_products_and_leaves_the_gates(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    block = Block()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype):
            gating = ops.top_p_gating(x @ block.router.T, 0.6)
            permutation = ops.permute(gating.expert_ids, E)
            rows = ops.grouped_matmul(x, block.gate_up_proj, permutation.expert_offsets, permutation.row_token)
            y = ops.expert_mlp(
                x, block.gate_up_proj, block.down_proj, gating.expert_ids, gating.expert_weights, permutation
            )
            return gating.expert_weights, rows, ops.combine(rows, gating.expert_weights, permutation.slot_row), y

    call = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True) if compiled else run
    outputs = call(torch.randn(8, H))
    assert [output.dtype for output in outputs] == [torch.float32, dtype, dtype, dtype]
    sum(output.float().sum() for output in outputs).backward()  # type: ignore[union-attr]
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_autocast_leaves_float64_alone() -> None:
    problem = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = problem.expert_mlp()
    assert torch.equal(y, problem.expert_mlp())


def mlp_flops(call: Callable[[], Any]) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return counts.get(raw.expert_mlp, 0), counts.get(raw.expert_mlp_backward, 0)


def test_flops_are_those_of_the_live_rows() -> None:
    problem = make_problem(grad=True)
    rows = problem.permutation.row_token.numel()
    assert rows < problem.expert_ids.numel()
    product = 2 * rows * H * I
    assert mlp_flops(lambda: problem.expert_mlp()) == (3 * product, 0)
    assert mlp_flops(lambda: problem.expert_mlp().sum().backward()) == (3 * product, 6 * product)
    problem.x.requires_grad_(False)
    assert mlp_flops(lambda: problem.expert_mlp().sum().backward()) == (3 * product, 4 * product)
    problem.x.requires_grad_()
    problem.gate_up_proj.requires_grad_(False)
    problem.down_proj.requires_grad_(False)
    assert mlp_flops(lambda: problem.expert_mlp().sum().backward()) == (3 * product, 3 * product)


def test_flops_of_the_grouped_product() -> None:
    problem = make_problem(grad=True)
    permutation = problem.permutation
    product = 2 * permutation.row_token.numel() * 2 * I * H
    with FlopCounterMode(display=False) as counter:
        y = ops.grouped_matmul(problem.x, problem.gate_up_proj, permutation.expert_offsets, permutation.row_token)
        y.sum().backward()
        rows = torch.randn(permutation.row_token.numel(), H, dtype=torch.float64)
        ops.grouped_matmul(rows, problem.gate_up_proj, permutation.expert_offsets)
    counts = counter.get_flop_counts()["Global"]
    assert counts[raw.grouped_matmul] == 2 * product
    assert counts[raw.grouped_matmul_dx] == product
    assert counts[raw.grouped_matmul_dw] == product


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_flop_formula(name: str) -> None:
    assert getattr(raw, name) in torch.utils.flop_counter.flop_registry


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_computes_the_expert_pass_again_unless_its_results_are_kept(selective: bool) -> None:
    block = Block()
    x = torch.randn(8, H)
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ops.sac_save_ops())

    def run(x: Tensor) -> Any:
        return checkpoint(block, x, use_reentrant=False, **options)

    for a, b in zip(gradients(block, run, x), gradients(block, block, x), strict=True):
        assert torch.equal(a, b)
    once, _ = mlp_flops(lambda: block(x))
    forward, _ = mlp_flops(lambda: run(x)[0].sum().backward())
    assert forward == (once if selective else 2 * once)


def test_selective_checkpointing_compiles() -> None:
    torch._dynamo.reset()
    block = Block()
    contexts = partial(create_selective_checkpoint_contexts, ops.sac_save_ops())
    run = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    x = torch.randn(8, H)
    for a, b in zip(gradients(block, run, x), gradients(block, block, x), strict=True):
        assert_close(a, b)


def scalar_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each operator as a function of one number that has a second derivative; x itself is added to it."""
    gate_up = torch.tensor([[[1.3], [0.9]]], dtype=torch.float64)
    down = torch.tensor([[[1.1]]], dtype=torch.float64)
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.float64)
    p = ops.permute(ids, 1)
    index = (p.expert_offsets, p.row_token, p.row_slot)
    spread = torch.tensor([[1.0, -0.5]], dtype=torch.float64)

    def product(x: Tensor) -> Tensor:
        return ops.grouped_matmul(x.reshape(1, 1), x.reshape(1, 1, 1), p.expert_offsets)

    def through_torch_ops(x: Tensor) -> Tensor:
        y: Tensor = raw.expert_mlp(x.reshape(1, 1), gate_up, down, weights, *index, True)[0]
        return y

    return {
        "expert_mlp": lambda x: ops.expert_mlp(x.reshape(1, 1), gate_up, down, ids, weights, p),
        "expert_mlp through torch.ops": through_torch_ops,
        "top_p_gating": lambda x: ops.top_p_gating(x * spread, 0.9).expert_weights[:, :1],
        "top_p_gating of a tensor": lambda x: ops.top_p_gating(x * spread, torch.tensor(0.9)).entropy,
        "top_k_gating": lambda x: ops.top_k_gating(x * spread, 1).logsumexp,
        "grouped_matmul": product,
        "combine": lambda x: ops.combine(x.reshape(1, 1), x.reshape(1, 1), p.slot_row),
    }


SECOND_DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "jvp by double backward": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    "grad of grad": lambda f, x: torch.func.grad(torch.func.grad(f))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "hessian of torch.func": lambda f, x: torch.func.hessian(f)(x),
    "loss of a gradient": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x), x, create_graph=True)[0].square(), x, allow_unused=True
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
@pytest.mark.parametrize("name", scalar_calls())
def test_a_second_derivative_raises_and_a_first_one_does_not(name: str, way: str) -> None:
    call = scalar_calls()[name]
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return call(x).sum() + x

    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    (plain,) = torch.autograd.grad(function(x), x)
    assert torch.equal(gradient, plain)
    assert plain != 1.0
    with pytest.raises((RuntimeError, NotImplementedError), match=r"second derivative|jvp|functorch transforms"):
        SECOND_DERIVATIVES[way](function, x)


raw_operators_refuse_tangents = pytest.mark.skipif(
    not _torch_private.raw_operators_refuse_tangents,
    reason="torch.library.register_autograd, the fallback without private names of torch, drops tangents",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=raw_operators_refuse_tangents if "torch.ops" in name else ()) for name in scalar_calls()],
)
def test_forward_mode_raises(name: str) -> None:
    call = scalar_calls()[name]
    x = torch.tensor(0.7, dtype=torch.float64)
    error, match = (RuntimeError, "no forward-mode") if "torch.ops" in name else (NotImplementedError, "jvp")
    with forward_ad.dual_level(), pytest.raises(error, match=match):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(error, match=match):
        torch.func.jvp(call, (x,), (x,))


@raw_operators_refuse_tangents
def test_forward_mode_raises_in_an_exported_program() -> None:
    block = Block().requires_grad_(False)
    exported = torch.export.export(block, (torch.randn(6, H),)).module()
    x = torch.randn(6, H)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="top_p_gating has no forward-mode"):
        exported(forward_ad.make_dual(x, x))


@raw_operators_refuse_tangents
def test_forward_mode_raises_where_weights_are_packed() -> None:
    gate_up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="prepack_experts has no forward"):
        ops.prepack_experts(forward_ad.make_dual(gate_up, gate_up), down)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_grad_and_vmap() -> None:
    problem = make_problem(grad=True)

    def loss(x: Tensor, logits: Tensor) -> Tensor:
        gating = ops.top_k_gating(logits, 2)
        y = ops.expert_mlp(x, problem.gate_up_proj, problem.down_proj, gating.expert_ids, gating.expert_weights)
        return y.square().sum() + gating.entropy.sum()

    inputs = (problem.x, problem.logits)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1))(*inputs), expected, strict=True):
        assert_close(a, b)
    batch = tuple(torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in inputs)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(*batch)
    for a, b in zip(per_sample, expected, strict=True):
        assert_close(a[0], b)


def test_inference_mode() -> None:
    problem = make_problem(grad=True)
    with torch.inference_mode():
        y = problem.expert_mlp()
    assert y.is_inference()
    assert torch.equal(y, problem.expert_mlp())


def test_fake_tensors_on_another_device() -> None:
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(6, 4, device="cuda", dtype=torch.bfloat16)
        gating = ops.top_p_gating(logits)
    assert gating.expert_weights.device.type == "cuda"
    assert gating.expert_weights.dtype == torch.float32
    assert gating.expert_ids.shape == (6, 4)


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"dynamic_moe::combine.*MkldnnCPU"):
        raw.combine(torch.randn(3, 4).to_mkldnn(), None, torch.zeros(2, 1, dtype=torch.int32))
