# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product: the rows of each expert times that expert's matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    allow_tf32,
    autocast,
    check_cuda,
    check_device,
    check_tensor,
    differentiable,
    differentiable_once,
    raw,
    register_fake,
)


def grouped_matmul(x: Tensor, weight: Tensor, expert_offsets: Tensor, row_token: Tensor | None = None) -> Tensor:
    """Multiply the rows of each expert by its matrix: ``y[r] = weight[e] @ x[row_token[r]]``.

    Expert e has the rows ``expert_offsets[e]`` to ``expert_offsets[e + 1] - 1``; it may have none, and then costs
    nothing and has a gradient of exactly 0. Sums are float32 (float64 for float64). Under autocast ``x`` and ``weight``
    are cast to its dtype. On CUDA, float32 is multiplied as exactly as torch is told to
    (``torch.backends.cuda.matmul.fp32_precision``).

    Parameters
    ----------
    x : Tensor
        [T, K] (K: inner size), float32, float64, bfloat16 or float16. Differentiable.
    weight : Tensor
        [E, N, K] in the dtype of ``x``. Differentiable.
    expert_offsets : Tensor
        int32 [E + 1], rising from 0 to R. Buffers may have more rows than R; what stands there has no meaning.
    row_token : Tensor, optional
        int32 [R]. Row r reads ``x[row_token[r]]``. Default: row r reads ``x[r]``, and R = T.

    Returns
    -------
    Tensor
        [R, N] in the dtype of ``x``.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device does not fit, or, on the CPU, ``expert_offsets`` does not rise from 0 to at
        most the number of rows or an entry of ``row_token`` is not a row of ``x``. On CUDA such values are not noticed:
        they must be right.
    """
    check_tensor("x", x, FLOAT_DTYPES, T=None, K=None)
    x, weight = autocast(x, weight)
    check_cuda("x", x)
    check_tensor("weight", weight, (x.dtype,), E=None, N=None, K=x.shape[1])
    check_tensor("expert_offsets", expert_offsets, (torch.int32,), **{"E + 1": weight.shape[0] + 1})
    if row_token is not None:
        check_tensor("row_token", row_token, (torch.int32,), R=None)
    check_device(x.device, weight=weight, expert_offsets=expert_offsets, row_token=row_token)
    y: Tensor = _grouped_matmul(x, weight, expert_offsets, row_token, allow_tf32(x))
    return y


@register_fake(raw.grouped_matmul.default)
def _fake(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, row_token: Tensor | None, allow_tf32: bool = False
) -> Tensor:
    num_rows = x.shape[0] if row_token is None else row_token.shape[0]
    return x.new_empty((num_rows, weight.shape[1]))


@register_fake(raw.grouped_matmul_dx.default)
def _dx_fake(
    dy: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor | None,
    num_tokens: int,
    allow_tf32: bool = False,
) -> Tensor:
    return dy.new_empty((num_tokens, weight.shape[2]))


@register_fake(raw.grouped_matmul_dw.default)
def _dw_fake(
    dy: Tensor, x: Tensor, expert_offsets: Tensor, row_token: Tensor | None, allow_tf32: bool = False
) -> Tensor:
    return dy.new_empty((expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, expert_offsets, row_token, ctx.allow_tf32 = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.num_tokens = x.shape[0]
    # Each factor is kept for the gradient of the other alone.
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, expert_offsets, row_token)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, expert_offsets, row_token = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _grouped_matmul_dx(dy, weight, expert_offsets, row_token, ctx.num_tokens, ctx.allow_tf32)
    if ctx.needs_input_grad[1]:
        dw = _grouped_matmul_dw(dy, x, expert_offsets, row_token, ctx.allow_tf32)
    return dx, dw, None, None, None


_grouped_matmul_dx = differentiable_once(raw.grouped_matmul_dx.default)
_grouped_matmul_dw = differentiable_once(raw.grouped_matmul_dw.default)
_grouped_matmul = differentiable(raw.grouped_matmul.default, _setup, _backward)


@register_flop_formula(raw.grouped_matmul)
def _flops(x: Any, weight: Any, expert_offsets: Any, row_token: Any, *args: Any, **kwargs: Any) -> int:
    num_rows = x[0] if row_token is None else row_token[0]
    return int(2 * num_rows * weight[1] * weight[2])


@register_flop_formula(raw.grouped_matmul_dx)
def _dx_flops(dy: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dy[0] * weight[1] * weight[2])


@register_flop_formula(raw.grouped_matmul_dw)
def _dw_flops(dy: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dy[0] * dy[1] * x[1])
