# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels through torch, on a device: against the CPU's, and as a guest of torch's streams and graphs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from strategies import RaggedProblem
from test_determinism import same_bits
from torch import Tensor
from torch.testing import assert_close

from dynamic_moe import DynamicMoE, TopKRouter, TopPRouter, losses, ops
from dynamic_moe.float32_linear import float32_linear

pytestmark = [pytest.mark.gpu, pytest.mark.level_independent]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, experts, experts of a token, hidden, intermediate
SIZES = [(1, 1, 1, 8, 8), (9, 4, 3, 10, 7), (130, 7, 3, 128, 72), (300, 64, 6, 64, 40), (0, 3, 2, 16, 16)]
# Units in the last place of the largest element: both sides round, products of products twice.
ULPS = 32


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.device.type == "cuda"
    assert actual.dtype == expected.dtype
    if not expected.is_floating_point():
        assert torch.equal(actual.cpu(), expected)
        return
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    bound = ULPS * torch.finfo(expected.dtype).eps
    assert_close(actual.cpu().double(), expected.double(), atol=bound * scale, rtol=bound, equal_nan=True)


def on_both(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> None:
    """Compare results and gradients on the device with those on the CPU."""

    def run(device: str) -> list[Tensor]:
        moved = [
            None if each is None else each.detach().to(device).requires_grad_(each.requires_grad) for each in inputs
        ]
        outputs = function(*moved)
        floats = [output for output in outputs if output.requires_grad]
        leaves = [leaf for leaf in moved if leaf is not None and leaf.requires_grad]
        if not floats:
            return list(outputs)
        weights = [torch.linspace(-1, 1, each.numel()).view(each.shape).to(each) for each in floats]
        return [*outputs, *torch.autograd.grad(floats, leaves, weights)]

    for actual, expected in zip(run("cuda"), run("cpu"), strict=True):
        close(actual, expected)


def problem_of(size: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tokens, experts, k, hidden, intermediate = size
    problem = RaggedProblem(3, tokens, experts, k, hidden, intermediate, dtype, "any", "contiguous")
    return problem.leaves(), problem.expert_ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (77, 8), (513, 130), (64, 1024)])
def test_gating(tokens: int, experts: int, masked: bool, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(tokens, experts)).to(dtype).requires_grad_()
    mask = torch.rand(tokens) < 0.8 if masked else None
    on_both(lambda z, mask: ops.top_p_gating(z, 0.7, renormalize=True, temperature=1.3, token_mask=mask), logits, mask)
    on_both(lambda z, mask: ops.top_p_gating(z, 0.4, threshold_rule="released", token_mask=mask), logits, mask)
    on_both(lambda z, mask: ops.top_k_gating(z, min(2, experts), token_mask=mask), logits, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_products_of_a_router(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, experts, _, hidden, _ = size
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    on_both(lambda x, w: (float32_linear(x, w),), x, torch.randn(experts, hidden, requires_grad=True))


def test_a_threshold_on_the_device_is_read_there() -> None:
    logits, p = torch.randn(77, 8, device="cuda"), torch.tensor([0.3], dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    ops.top_p_gating(logits, p)
    with torch.cuda.graph(graph):
        gating = ops.top_p_gating(logits, p)
    for value in (0.3, 0.7, 1.0):
        p.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(gating, ops.top_p_gating(logits, value), strict=True))


def test_a_faulty_token_stays_alone() -> None:
    logits = torch.randn(6, 8)
    logits[2, 3], logits[4] = torch.nan, -torch.inf
    on_both(lambda z: ops.top_p_gating(z, 0.5), logits)
    with pytest.raises(ValueError, match=r"^logits must be finite.* in 2 of 6 tokens$"):
        ops.top_p_gating(logits.cuda(), 0.5, check_finite=True)


@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_permute(size: tuple[int, ...], static_rows: bool) -> None:
    _, ids = problem_of(size, torch.float32)
    on_both(lambda ids: ops.permute(ids, size[1], static_rows=static_rows)[:-1], ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_expert_mlp(size: tuple[int, ...], static_rows: bool, dtype: torch.dtype) -> None:
    (x, gate_up, down, weights), ids = problem_of(size, dtype)
    on_both(
        lambda x, g, d, w, ids: (ops.expert_mlp(x, g, d, ids, w, static_rows=static_rows),),
        x,
        gate_up,
        down,
        weights,
        ids,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_grouped_matmul_and_combine(size: tuple[int, ...], static_rows: bool, dtype: torch.dtype) -> None:
    (x, gate_up, _, weights), ids = problem_of(size, dtype)

    def run(x: Tensor, matrices: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        p = ops.permute(ids, size[1], static_rows=static_rows)
        rows = ops.grouped_matmul(x, matrices, p.expert_offsets, p.row_token)
        return ops.combine(rows, weights, p.slot_row), ops.combine(rows, None, p.slot_row)

    on_both(run, x, gate_up, weights, ids)


def test_unaligned_and_strided_inputs() -> None:
    (x, gate_up, down, weights), ids = problem_of((33, 4, 2, 32, 24), torch.bfloat16)

    def run(x: Tensor, g: Tensor, d: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.new_zeros(1), x.flatten()])
        shifted = flat[1:].view(x.shape)  # two bytes off
        return ops.expert_mlp(shifted, g, d, ids, w), ops.expert_mlp(x.T.contiguous().T, g, d, ids, w)

    on_both(run, x, gate_up, down, weights, ids)


def make_layer(dtype: torch.dtype = torch.float32, static_rows: bool = False, k: int | None = None) -> DynamicMoE:
    router: Any = TopPRouter(64, 8, 0.5, max_experts=4) if k is None else TopKRouter(64, 8, k)
    return DynamicMoE(64, 48, 8, router=router, static_rows=static_rows, shared_intermediate_size=32).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static_rows", [False, True])
def test_layer(static_rows: bool, dtype: torch.dtype) -> None:
    layer = make_layer(dtype, static_rows)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        bound = dict(zip(names, parameters, strict=True))
        y, routing = torch.func.functional_call(layer, bound, x, {"return_routing": True})
        return y, losses.load_balancing(routing), losses.dynamic(routing)

    on_both(run, torch.randn(3, 40, 64).to(dtype).requires_grad_(), *parameters)


def test_float64_is_refused_by_the_operators_too() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match=r"^rows must be float32, bfloat16 or float16 on CUDA, got float64$"):
        torch.ops.dynamic_moe.combine(x, None, torch.zeros(2, 1, dtype=torch.int32, device="cuda"))


def test_tensors_of_two_devices_are_refused_by_the_operators_too() -> None:
    raw, slots = torch.ops.dynamic_moe, torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^slot_row must be on cuda:0 like the other arguments$"):
        raw.combine(torch.randn(3, 4, device="cuda"), None, slots)
    with pytest.raises(ValueError, match=r"^rows must be on a CUDA device like the other arguments$"):
        raw.combine(torch.randn(3, 4), None, slots.cuda())


def train_step(layer: DynamicMoE, x: Tensor) -> list[Tensor]:
    y, routing = layer(x, return_routing=True)
    loss = y.float().square().mean() + losses.load_balancing(routing)
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static_rows", [False, True])
def test_ten_runs_give_the_same_bits(static_rows: bool, dtype: torch.dtype) -> None:
    (x, gate_up, down, weights), ids = problem_of((300, 16, 4, 128, 64), dtype)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in (x, gate_up, down, weights)]
    logits = torch.randn(300, 16, device="cuda", requires_grad=True)
    ids = ids.cuda()

    def run() -> list[Tensor]:
        y = ops.expert_mlp(*leaves[:3], ids, leaves[3], static_rows=static_rows)
        gating = ops.top_p_gating(logits, 0.6, renormalize=True)
        loss = gating.probability_sum.square().sum() + gating.expert_weights.square().sum()
        return [y, *gating, *torch.autograd.grad(y.float().square().sum(), leaves), *torch.autograd.grad(loss, logits)]

    first = run()
    for _ in range(9):
        assert all(same_bits(a, b) for a, b in zip(run(), first, strict=True))


@pytest.fixture
def strict_about_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_static_rows_never_wait_for_the_device(strict_about_waiting: None) -> None:
    layer = make_layer(static_rows=True)
    train_step(layer, torch.randn(50, 64, device="cuda", requires_grad=True))


def test_exact_rows_wait_once(strict_about_waiting: None) -> None:
    ids = torch.zeros(5, 1, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"):
        ops.permute(ids, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_is_captured_and_replayed(dtype: torch.dtype) -> None:
    layer = make_layer(dtype, static_rows=True)
    x = torch.randn(64, 64, device="cuda", dtype=dtype, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train_step(layer, x)
    for _ in range(3):  # other tokens choose other experts: the graph must follow
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(captured, train_step(layer, x), strict=True))


def test_work_goes_to_the_current_stream() -> None:
    """Inputs that a busy stream is still writing: only work on that stream sees them finished."""
    layer = make_layer(static_rows=True)
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    expected = train_step(layer, x)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            mine = late.clone()
            torch.cuda._sleep(50_000_000)
            mine.copy_(x.detach())
            results.append(train_step(layer, mine.requires_grad_()))
    torch.cuda.synchronize()
    for result in results:
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


def test_the_device_of_the_tensors_is_used_and_the_current_one_stays() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    (x, gate_up, down, weights), ids = problem_of((33, 4, 2, 32, 24), torch.float32)
    expected = ops.expert_mlp(x, gate_up, down, ids, weights)
    moved = [each.to("cuda:1") for each in (x, gate_up, down, ids, weights)]
    assert torch.cuda.current_device() == 0
    y = ops.expert_mlp(*moved)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    close(y, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("static_rows", [False, True])
def test_compile(static_rows: bool, backend: str) -> None:
    torch._dynamo.reset()
    layer = make_layer(static_rows=static_rows)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (7, 33):
        x = torch.randn(tokens, 64, device="cuda")
        assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)


def test_opcheck_on_the_device() -> None:
    (x, gate_up, down, weights), ids = problem_of((9, 4, 2, 16, 8), torch.float32)
    x, gate_up, down, weights = (each.detach().cuda().requires_grad_() for each in (x, gate_up, down, weights))
    p = ops.permute(ids.cuda(), 4)
    raw, check = torch.ops.dynamic_moe, torch.library.opcheck
    index = (p.expert_offsets, p.row_token, p.row_slot)
    check(raw.top_p_gating.default, (torch.randn(9, 4, device="cuda"), 0.6, 4, False, True, 0.7, None, False))
    check(raw.permute.default, (ids.cuda(), 4))
    check(raw.permute.default, (ids.cuda(), 4, 7))
    check(raw.grouped_matmul.default, (x, gate_up, p.expert_offsets, p.row_token))
    check(raw.combine.default, (torch.randn(p.row_token.numel(), 16, device="cuda"), weights, p.slot_row))
    check(raw.expert_mlp.default, (x, gate_up, down, weights, *index, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = make_layer()
    with torch.autocast("cuda", dtype=dtype):
        y, routing = layer(torch.randn(20, 64, device="cuda"), return_routing=True)
    assert y.dtype == dtype
    assert routing.logits.dtype == torch.float32


def test_tf32_rounds_the_inputs_alone() -> None:
    (x, gate_up, down, weights), ids = problem_of((130, 4, 2, 128, 64), torch.float32)
    call = partial(
        ops.expert_mlp, *(each.detach().cuda() for each in (x, gate_up, down)), ids.cuda(), weights.detach().cuda()
    )
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        exact = call()
        matmul.fp32_precision = "tf32"
        rounded = call()
    finally:
        matmul.fp32_precision = before
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < 2e-2


def test_memory_of_a_training_step_stays_within_the_budget() -> None:
    """Kept: x and the pre-activation [R, 2I]. On top, at the peak of a pass: workspace of the order of the rows."""
    tokens, experts, k, hidden, intermediate = 2048, 8, 2, 512, 256
    problem = RaggedProblem(1, tokens, experts, k, hidden, intermediate, torch.bfloat16, "any", "contiguous")
    x, gate_up, down, weights = (leaf.detach().cuda().requires_grad_() for leaf in problem.leaves())
    ids = problem.expert_ids.cuda()
    rows = int((ids < experts).sum())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = ops.expert_mlp(x, gate_up, down, ids, weights)
    kept = torch.cuda.memory_allocated() - before - y.numel() * 2
    indices = 4 * (3 * tokens * k + 2 * experts + 1)
    assert kept <= rows * 2 * intermediate * 2 + indices + 8 * 512  # torch rounds each tensor up to 512 bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.sum().backward()
    gradients = 2 * (x.numel() + gate_up.numel() + down.numel()) + 4 * weights.numel()
    peak = torch.cuda.max_memory_allocated() - before - gradients
    assert peak <= 2 * (tokens * hidden + rows * (hidden + 4 * intermediate)) + 2**21
