# SPDX-License-Identifier: Apache-2.0
"""The SwiGLU expert pass, from tokens to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    accumulator_dtype,
    allow_tf32,
    autocast,
    check_cuda,
    check_device,
    check_tensor,
    differentiable,
    differentiable_once,
    needs_grad,
    raw,
    register_fake,
)
from dynamic_moe.ops._permutation import Permutation, permute


def expert_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    permutation: Permutation | None = None,
    *,
    row_capacity: int | None = None,
    static_rows: bool = False,
) -> Tensor:
    r"""Send each token through its experts and sum their outputs by weight.

    .. math:: y_t = \sum_k w_{tk} \, W^{down}_e (\operatorname{silu}(g) \odot u),
              \quad (g, u) = W^{gate,up}_e x_t, \quad e = \text{expert\_ids}_{tk}

    Nothing is padded, and nothing dropped without a ``row_capacity``; a token without an expert gets 0; an expert
    without a token costs nothing and has a gradient of exactly 0. For the backward pass ``x`` and the pre-activation
    [R, 2I] are kept, and nothing else; without a gradient to compute, nothing is. Sums are float32 (float64 for
    float64). In float16 the activation ``silu(g) * u`` and all gradients must stay within 65504, or they are infinite;
    the pre-activation need not: the backward pass sums again what was too large to keep. Under autocast ``x`` and the
    projections are cast to its dtype. On CUDA, float32 is multiplied as exactly as torch is told to
    (``torch.backends.cuda.matmul.fp32_precision``).

    Parameters
    ----------
    x : Tensor
        [T, H], float32, float64, bfloat16 or float16. Differentiable.
    gate_up_proj : Tensor
        [E, 2I, H] in the dtype of ``x``: the I gate rows, then the I up rows. Differentiable.
    down_proj : Tensor
        [E, H, I] in the dtype of ``x``. Differentiable.
    expert_ids : Tensor
        int32 or int64 [T, K]. An id outside [0, E) marks an unused slot.
    expert_weights : Tensor
        [T, K]; used as float32 (float64 where ``x`` is float64). Differentiable; the gradient in unused slots is 0.
    permutation : Permutation, optional
        ``permute(expert_ids, E)`` where the caller has it already. Default: computed here.
    row_capacity, static_rows
        How to compute it here, see `permute`: with a row capacity C the host never waits for the device, and the
        pre-activation that is kept is [C, 2I].

    Returns
    -------
    Tensor
        [T, H] in the dtype of ``x``.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device does not fit, or ``permutation`` is not one of these sizes.
    """
    check_tensor("x", x, FLOAT_DTYPES, T=None, H=None)
    x, gate_up_proj, down_proj = autocast(x, gate_up_proj, down_proj)
    check_cuda("x", x)
    num_tokens, hidden_size = x.shape
    check_tensor("down_proj", down_proj, (x.dtype,), E=None, H=hidden_size, I=None)
    num_experts, _, intermediate_size = down_proj.shape
    gate_up_sizes = {"E": num_experts, "2I": 2 * intermediate_size, "H": hidden_size}
    check_tensor("gate_up_proj", gate_up_proj, (x.dtype,), **gate_up_sizes)
    check_tensor("expert_weights", expert_weights, FLOAT_DTYPES, T=num_tokens, K=None)
    check_tensor("expert_ids", expert_ids, (torch.int32, torch.int64), T=num_tokens, K=expert_weights.shape[1])
    check_device(
        x.device,
        gate_up_proj=gate_up_proj,
        down_proj=down_proj,
        expert_ids=expert_ids,
        expert_weights=expert_weights,
    )
    if permutation is None:
        permutation = permute(expert_ids, num_experts, row_capacity=row_capacity, static_rows=static_rows)
    expert_weights = expert_weights.to(accumulator_dtype(x.dtype))
    keep_pre_activation = needs_grad(x, gate_up_proj, down_proj, expert_weights)
    y: Tensor
    y, _ = _expert_mlp(
        x,
        gate_up_proj,
        down_proj,
        expert_weights,
        permutation.expert_offsets,
        permutation.row_token,
        permutation.row_slot,
        keep_pre_activation,
        allow_tf32(x),
    )
    return y


@register_fake(raw.expert_mlp.default)
def _fake(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    keep_pre_activation: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    num_rows = row_token.shape[0] if keep_pre_activation else 0
    return x.new_empty(x.shape), x.new_empty((num_rows, gate_up_proj.shape[1]))


@register_fake(raw.expert_mlp_backward.default)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    pre_activation: Tensor,
    need_x: bool,
    need_weights: bool,
    need_expert_weights: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        gate_up_proj.new_empty(gate_up_proj.shape if need_weights else (0,)),
        down_proj.new_empty(down_proj.shape if need_weights else (0,)),
        expert_weights.new_empty(expert_weights.shape if need_expert_weights else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, keep_pre_activation, ctx.allow_tf32 = inputs
    pre_activation = output[1]
    # Without it there is nothing to go back with. That is an error of the backward pass, not of this one: a program
    # exported for inference may be run outside torch.no_grad.
    ctx.save_for_backward(*((*tensors, pre_activation) if keep_pre_activation else ()))
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # no [R, 2I] of zeros for the pre-activation


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: checkpointing unpacks them once only
    if not saved:
        raise RuntimeError("expert_mlp ran with keep_pre_activation=False, as it does under torch.no_grad: no gradient")
    need_x, need_gate_up, need_down, need_weights = ctx.needs_input_grad[:4]
    dx, d_gate_up, d_down, d_weights = _expert_mlp_backward(
        dy, *saved, need_x, need_gate_up or need_down, need_weights, ctx.allow_tf32
    )
    return (
        dx if need_x else None,
        d_gate_up if need_gate_up else None,
        d_down if need_down else None,
        d_weights if need_weights else None,
        *(None,) * 5,
    )


_expert_mlp_backward = differentiable_once(raw.expert_mlp_backward.default)
_expert_mlp = differentiable(raw.expert_mlp.default, _setup, _backward)


@register_flop_formula(raw.expert_mlp)
def _flops(
    x: Any, gate_up: Any, down_proj: Any, weights: Any, offsets: Any, row_token: Any, *args: Any, **kwargs: Any
) -> int:
    _, hidden_size, intermediate_size = down_proj
    return int(2 * row_token[0] * 3 * intermediate_size * hidden_size)


@register_flop_formula(raw.expert_mlp_backward)
def _backward_flops(
    dy: Any,
    x: Any,
    gate_up_proj: Any,
    down_proj: Any,
    expert_weights: Any,
    expert_offsets: Any,
    row_token: Any,
    row_slot: Any,
    pre_activation: Any,
    need_x: bool,
    need_weights: bool,
    need_expert_weights: bool,
    **kwargs: Any,
) -> int:
    _, hidden_size, intermediate_size = down_proj
    products = 1  # the gradient of the activation, H x I
    products += 2 if need_x else 0  # 2I x H
    products += 3 if need_weights else 0  # both
    return int(2 * row_token[0] * products * intermediate_size * hidden_size)
