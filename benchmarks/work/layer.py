# SPDX-License-Identifier: Apache-2.0
"""The whole layer, from tokens to tokens: router, gating and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers.torch_loop import loop_over_experts
from benchmarks.problem import Problem, make_problem
from benchmarks.work.experts import TOLERANCE, relative_error
from benchmarks.work.gating import TOP_P, scale_for_mean, torch_top_p_gating
from benchmarks.work.subject import Cost, Opened, Subject

Layer = Callable[[Tensor], Tensor]


@torch.no_grad()
def open_layer(case: Case) -> Opened:
    """`dynamic_moe.DynamicMoE` against the layer of the released Dynamic MoE, written anew in PyTorch."""
    problem = make_problem(case.shape, case.dtype, case.num_tokens, training=False)
    router = _router_weight(problem)
    layers: dict[str, Layer] = {
        "dynamic_moe": _our_layer(problem, router),
        "released Dynamic MoE style": _released_layer(problem, router),
    }
    layers |= _prepacked_layer(problem, router)
    x = problem.batches[0].x
    expected = layers["released Dynamic MoE style"](x)
    for name, layer in layers.items():
        error = relative_error(layer(x), expected)
        if not error < TOLERANCE[problem.dtype]:
            raise RuntimeError(f"wrong result of the layer of {name}: off by {error:.1e}")
    cost = _cost(problem, router)
    subjects = [Subject(name, _call(layer, problem), cost, len(problem.batches)) for name, layer in layers.items()]
    return Opened(subjects=subjects)


def _router_weight(problem: Problem) -> Tensor:
    """Of such a size that tokens get the wanted number of experts on average."""
    shape = problem.shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape.num_experts, shape.hidden_size, generator=generator) * shape.hidden_size**-0.5
    tokens = torch.randn(4096, shape.hidden_size, generator=generator)
    scale = scale_for_mean(tokens @ weight.T, shape.mean_experts)
    scaled: Tensor = weight * scale
    return scaled.to(problem.dtype)


def _our_layer(problem: Problem, router: Tensor) -> Any:
    from dynamic_moe import DynamicMoE

    shape = problem.shape
    with torch.device("meta"):
        layer = DynamicMoE(shape.hidden_size, shape.intermediate_size, shape.num_experts, top_p=TOP_P)
    layer.router.weight = nn.Parameter(router, requires_grad=False)
    layer.experts.gate_up_proj = nn.Parameter(problem.gate_up_proj, requires_grad=False)
    layer.experts.down_proj = nn.Parameter(problem.down_proj, requires_grad=False)
    return layer


def _prepacked_layer(problem: Problem, router: Tensor) -> dict[str, Layer]:
    layer = _our_layer(problem, router)
    if not hasattr(layer, "prepack"):
        return {}
    layer.prepack()
    return {"dynamic_moe, prepacked": layer}


def _released_layer(problem: Problem, router: Tensor) -> Layer:
    def layer(x: Tensor) -> Tensor:
        expert_ids, expert_weights, *_ = torch_top_p_gating(x.float() @ router.float().T)
        return loop_over_experts(x, problem.gate_up_proj, problem.down_proj, expert_ids, expert_weights)

    return layer


def _call(layer: Layer, problem: Problem) -> Callable[[int], object]:
    @torch.no_grad()
    def call(index: int) -> object:
        return layer(problem.batches[index].x)

    return call


def _cost(problem: Problem, router: Tensor) -> Cost:
    shape, rows, distinct = problem.shape, 0, 0
    for batch in problem.batches:
        expert_ids = torch_top_p_gating(batch.x.float() @ router.float().T)[0]
        used = expert_ids[expert_ids < shape.num_experts]
        rows += used.numel()
        distinct += len(set(used.tolist()))
    count = len(problem.batches)
    values = distinct / count * shape.expert_values + router.numel() + 2 * problem.batches[0].x.numel()
    return Cost(flops=shape.flops(1, training=False) * rows / count, bytes=values * router.element_size())
