# SPDX-License-Identifier: Apache-2.0
"""The linear map of a router in float32, forward and backward, whatever torch is told about its own products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe._gpu_record import warn_unless_confirmed
from dynamic_moe.ops._common import differentiable, raw, register_fake


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` with float32 products and sums: ``[T, E]``, differentiable any number of times in reverse mode.

    ``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision`` and autocast do not change it, here or
    in the backward pass, and neither does the number of threads. For the backward pass x and weight are kept as they
    came.

    Parameters
    ----------
    x : Tensor
        [T, H], float32, bfloat16 or float16.
    weight : Tensor
        [E, H], float32, bfloat16 or float16.
    """
    if x.is_cuda:
        warn_unless_confirmed()
    logits: Tensor = _forward(x, weight)
    return logits


@register_fake(raw.float32_linear.default)
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


@register_fake(raw.float32_linear_dx.default)
def _dx_fake(d_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return d_logits.new_empty((d_logits.shape[0], weight.shape[1]), dtype=dtype)


@register_fake(raw.float32_linear_dw.default)
def _dw_fake(d_logits: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return d_logits.new_empty((d_logits.shape[1], x.shape[1]), dtype=dtype)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


# Each of the three products is linear in both factors, and its two derivatives are the two others.


def _backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad
    return (
        _dx(d_logits, weight, x.dtype) if need_x else None,
        _dw(d_logits, x, weight.dtype) if need_weight else None,
    )


def _dx_backward(ctx: Any, d_dx: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    d_logits, weight = ctx.saved_tensors
    need_d_logits, need_weight, _ = ctx.needs_input_grad
    return (
        _forward(d_dx, weight) if need_d_logits else None,
        _dw(d_logits, d_dx, weight.dtype) if need_weight else None,
        None,
    )


def _dw_backward(ctx: Any, d_dw: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    d_logits, x = ctx.saved_tensors
    need_d_logits, need_x, _ = ctx.needs_input_grad
    return _forward(x, d_dw) if need_d_logits else None, _dx(d_logits, d_dw, x.dtype) if need_x else None, None


_forward = differentiable(raw.float32_linear.default, _save_factors, _backward)
_dx = differentiable(raw.float32_linear_dx.default, _save_factors, _dx_backward)
_dw = differentiable(raw.float32_linear_dw.default, _save_factors, _dw_backward)


@register_flop_formula(raw.float32_linear)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


@register_flop_formula(raw.float32_linear_dx)
def _dx_flops(d_logits: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * d_logits[0] * weight[0] * weight[1])


@register_flop_formula(raw.float32_linear_dw)
def _dw_flops(d_logits: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * d_logits[0] * d_logits[1] * x[1])
