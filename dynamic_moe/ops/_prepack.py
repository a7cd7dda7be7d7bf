# SPDX-License-Identifier: Apache-2.0
"""Inference on expert weights that are rearranged once, beforehand, into the order in which the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe import _C
from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    accumulator_dtype,
    check_device,
    check_tensor,
    differentiable,
    needs_grad,
    raw,
    register_fake,
)
from dynamic_moe.ops._permutation import Permutation, permute
from dynamic_moe.ops._torch_private import register_autograd

PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADER_BYTES = 64


class PackedExperts(NamedTuple):
    """Expert weights as `prepack_experts` rearranges them.

    Attributes
    ----------
    data : Tensor
        uint8, opaque. It says at its beginning for which CPU level, dtype and sizes it was made, and works for those
        alone.
    dtype : torch.dtype
        Of the weights.
    num_experts, hidden_size, intermediate_size : int
        E, H and I.
    """

    data: Tensor
    dtype: torch.dtype
    num_experts: int
    hidden_size: int
    intermediate_size: int


def prepack_experts(gate_up_proj: Tensor, down_proj: Tensor) -> PackedExperts:
    """Rearrange expert weights for `expert_mlp_prepacked`.

    The order depends on the CPU level that computes with the dtype (``dynamic_moe.info``). The result takes as much
    memory as the weights, up to padding; float16, and bfloat16 below the level avx512_bf16, are converted to float32
    and take twice as much.

    Parameters
    ----------
    gate_up_proj : Tensor
        [E, 2I, H], float32, bfloat16 or float16, on the CPU: the I gate rows, then the I up rows.
    down_proj : Tensor
        [E, H, I] in the dtype of ``gate_up_proj``.

    Returns
    -------
    PackedExperts
        A copy: later changes of the weights do not reach it.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device does not fit. float64 is not packed: its kernels read the weights as they are.
    """
    check_tensor("gate_up_proj", gate_up_proj, PACKED_DTYPES, E=None, twice_I=None, H=None)
    num_experts, _, hidden_size = gate_up_proj.shape
    check_tensor("down_proj", down_proj, (gate_up_proj.dtype,), E=num_experts, H=hidden_size, I=None)
    intermediate_size = down_proj.shape[2]
    gate_up_sizes = {"E": num_experts, "2I": 2 * intermediate_size, "H": hidden_size}
    check_tensor("gate_up_proj", gate_up_proj, PACKED_DTYPES, **gate_up_sizes)
    if gate_up_proj.device.type != "cpu":
        raise ValueError(
            f"gate_up_proj must be on the CPU to be packed, got {gate_up_proj.device}: "
            "kernels of other devices read the weights as they are, call expert_mlp"
        )
    check_device(gate_up_proj.device, down_proj=down_proj)
    with torch.no_grad():
        data = raw.prepack_experts.default(gate_up_proj, down_proj)
    return PackedExperts(data, gate_up_proj.dtype, num_experts, hidden_size, intermediate_size)


def expert_mlp_prepacked(
    x: Tensor,
    packed: PackedExperts,
    expert_ids: Tensor,
    expert_weights: Tensor,
    permutation: Permutation | None = None,
) -> Tensor:
    """Do what `expert_mlp` does, on packed weights and without a gradient.

    Experts with many tokens give the same bits; for those with few, `expert_mlp` adds up in another order, and results
    differ by rounding. Under autocast ``x`` is cast to the dtype of the packed weights.

    Parameters
    ----------
    x : Tensor
        [T, H] in the dtype of the packed weights (any float dtype but float64 under autocast).
    packed : PackedExperts
        The experts.
    expert_ids : Tensor
        int32 or int64 [T, K]. An id outside [0, E) marks an unused slot.
    expert_weights : Tensor
        [T, K]; used as float32.
    permutation : Permutation, optional
        ``permute(expert_ids, E)`` where the caller has it already. Default: computed here.

    Returns
    -------
    Tensor
        [T, H] in the dtype of the packed weights.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device does not fit, or the weights were packed at another CPU level than the one in
        use.
    RuntimeError
        If a gradient would be needed.
    """
    check_tensor("x", x, FLOAT_DTYPES, T=None, H=packed.hidden_size)
    if x.device.type != "cpu":
        raise ValueError(f"x must be on the CPU like packed weights, got {x.device}: call expert_mlp there")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(packed.dtype)
    check_tensor("x", x, (packed.dtype,), T=None, H=packed.hidden_size)
    num_tokens = x.shape[0]
    check_tensor("expert_weights", expert_weights, FLOAT_DTYPES, T=num_tokens, K=None)
    check_tensor("expert_ids", expert_ids, (torch.int32, torch.int64), T=num_tokens, K=expert_weights.shape[1])
    check_device(x.device, packed=packed.data, expert_ids=expert_ids, expert_weights=expert_weights)
    if needs_grad(x, expert_weights):
        raise RuntimeError("expert_mlp_prepacked has no gradient: call it under torch.no_grad(), or use expert_mlp")
    if permutation is None:
        permutation = permute(expert_ids, packed.num_experts)
    y: Tensor = _expert_mlp_prepacked(
        x,
        packed.data,
        packed.intermediate_size,
        expert_weights.to(accumulator_dtype(x.dtype)),
        permutation.expert_offsets,
        permutation.row_token,
        permutation.row_slot,
    )
    return y


@register_fake(raw.prepack_experts.default)
def _prepack_fake(gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    num_experts, hidden_size, intermediate_size = down_proj.shape
    dtype = str(gate_up_proj.dtype).removeprefix("torch.")
    plan = _C.tile_plan(_C.cpu_isa_for(dtype), dtype)
    lanes, per_word = plan["lanes"], 2 if plan["multiplies_pairs"] else 1

    def words(columns: int, inner: int) -> int:
        return (inner + per_word - 1) // per_word * ((columns + lanes - 1) // lanes * lanes)

    expert = 2 * words(intermediate_size, hidden_size) + words(hidden_size, intermediate_size)
    return gate_up_proj.new_empty((HEADER_BYTES + 4 * num_experts * expert,), dtype=torch.uint8)


@register_fake(raw.expert_mlp_prepacked.default)
def _fake(
    x: Tensor,
    packed: Tensor,
    intermediate_size: int,
    expert_weights: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep nothing."""


def _backward(ctx: Any, dy: Tensor | None) -> tuple[None, ...]:
    # An error of the backward pass alone: a program exported for inference may be run outside torch.no_grad.
    raise RuntimeError("expert_mlp_prepacked has no gradient: use expert_mlp")


def _prepack_backward(ctx: Any, d_packed: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("prepack_experts has no gradient")


_expert_mlp_prepacked = differentiable(raw.expert_mlp_prepacked.default, _setup, _backward)
register_autograd(raw.prepack_experts.default, _setup, _prepack_backward)


@register_flop_formula(raw.prepack_experts)
def _prepack_flops(*args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula(raw.expert_mlp_prepacked)
def _flops(
    x: Any, packed: Any, intermediate_size: int, weights: Any, offsets: Any, row_token: Any, *args: Any, **kwargs: Any
) -> int:
    return int(2 * row_token[0] * 3 * intermediate_size * x[1])
