# SPDX-License-Identifier: Apache-2.0
"""Permutation of (token, expert) pairs into rows sorted by expert, and the sum of the rows back to tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    accumulator_dtype,
    as_int,
    check_device,
    check_float64,
    check_tensor,
    differentiable,
    differentiable_once,
    raw,
    register_fake,
)


class Permutation(NamedTuple):
    """Where the rows of each expert are. Everything is int32.

    R is the number of live rows. After ``permute(..., static_rows=True)`` ``row_token`` and ``row_slot`` hold T * K
    rows, of which the first R are live.

    Attributes
    ----------
    tokens_per_expert : Tensor
        [E]. Rows of each expert.
    expert_offsets : Tensor
        [E + 1]. First row of each expert; the last entry is R.
    row_token : Tensor
        [R]. The token of each row. Rows are sorted by expert, then by token.
    row_slot : Tensor
        [R]. The flat slot t * K + k of each row.
    slot_row : Tensor
        [T, K]. The row of each slot; -1 if it is unused.
    """

    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor


def permute(expert_ids: Tensor, num_experts: int, *, static_rows: bool = False) -> Permutation:
    """Sort the (token, expert) pairs by expert, then by token.

    Nothing is padded: R, the number of rows, is the number of used slots, and depends on the data. On CUDA the host
    waits for it once, unless ``static_rows`` is given.

    Parameters
    ----------
    expert_ids : Tensor
        int32 or int64 [T, K]. An id outside [0, E) marks an unused slot.
    num_experts : int
        E >= 1.
    static_rows : bool, default False
        Let the row buffers, here and in every operator that takes the permutation, hold T * K rows, so that no shape
        depends on data: nothing waits for the device, and a CUDA graph can hold the call. Results are the same; what
        stands in row buffers beyond R has no meaning. It costs memory for the unused slots. Needed on the meta device,
        and under ``torch.func.vmap``, which runs the operators once for each element of the mapped dimension.

    Returns
    -------
    Permutation

    Raises
    ------
    ValueError
        If ``expert_ids`` has another dtype or number of dimensions, ``num_experts`` is not a positive integer, T * K
        does not fit into 31 bits, or ``static_rows`` is needed and not given.
    """
    check_tensor("expert_ids", expert_ids, (torch.int32, torch.int64), T=None, K=None)
    if type(num_experts) is not int:
        num_experts = as_int("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if expert_ids.dtype == torch.int64:
        expert_ids = expert_ids.clamp(-1, num_experts).to(torch.int32)  # clamped: 2**32 must not wrap to expert 0
    try:
        return Permutation(*raw.permute.default(expert_ids, num_experts, static_rows))
    except RuntimeError as error:
        if static_rows:
            raise
        _refuse_dynamic_rows(expert_ids, error)


def _refuse_dynamic_rows(expert_ids: Tensor, error: RuntimeError) -> NoReturn:
    """Say what is missing where the number of rows cannot depend on the data."""
    if expert_ids.device.type == "meta":
        where = "on the meta device there are no expert_ids to count"
    elif not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        where = "under torch.func.vmap every element of the mapped dimension would have another number of rows"
    else:
        raise error
    raise ValueError(f"static_rows must be True, got False: {where}") from error


def combine(rows: Tensor, weights: Tensor | None, slot_row: Tensor) -> Tensor:
    """Sum the rows of each token: ``y[t] = sum_k weights[t, k] * rows[slot_row[t, k]]``.

    Sums are float32 (float64 for float64) in the order of the slots, so they are the same bit for bit in every run.
    A token without a row gets 0.

    Parameters
    ----------
    rows : Tensor
        [R, H], float32, float64, bfloat16 or float16. Differentiable.
    weights : Tensor or None
        [T, K]; None for 1. Differentiable.
    slot_row : Tensor
        int32 [T, K], as `permute` gives it.

    Returns
    -------
    Tensor
        [T, H] in the dtype of ``rows``.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device does not fit, or an entry of ``slot_row`` is not a row.
    """
    check_tensor("rows", rows, FLOAT_DTYPES, R=None, H=None)
    check_float64("rows", rows)
    check_tensor("slot_row", slot_row, (torch.int32,), T=None, K=None)
    num_tokens, max_experts = slot_row.shape
    if weights is not None:
        check_tensor("weights", weights, FLOAT_DTYPES, T=num_tokens, K=max_experts)
        weights = weights.to(accumulator_dtype(rows.dtype))
    check_device(rows.device, weights=weights, slot_row=slot_row)
    y: Tensor = _combine(rows, weights, slot_row)
    return y


@register_fake(raw.permute.default)
def _permute_fake(expert_ids: Tensor, num_experts: int, static_rows: bool = False) -> tuple[Tensor, ...]:
    num_rows: Any = expert_ids.numel() if static_rows else torch.library.get_ctx().new_dynamic_size()
    sizes: tuple[Any, ...] = ((num_experts,), (num_experts + 1,), (num_rows,), (num_rows,), expert_ids.shape)
    return tuple(expert_ids.new_empty(size) for size in sizes)


@register_fake(raw.combine.default)
def _combine_fake(rows: Tensor, weights: Tensor | None, slot_row: Tensor) -> Tensor:
    return rows.new_empty((slot_row.shape[0], rows.shape[1]))


@register_fake(raw.combine_backward.default)
def _combine_backward_fake(
    dy: Tensor, rows: Tensor, weights: Tensor | None, slot_row: Tensor, need_rows: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape if need_rows else (0,)),
        rows.new_empty(slot_row.shape if need_weights else (0,), dtype=accumulator_dtype(rows.dtype)),
    )


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, slot_row = ctx.saved_tensors
    need_rows, need_weights, _ = ctx.needs_input_grad
    d_rows, d_weights = _combine_backward_op(dy, rows, weights, slot_row, need_rows, need_weights)
    return d_rows if need_rows else None, d_weights if need_weights else None, None


_combine_backward_op = differentiable_once(raw.combine_backward.default)
_combine = differentiable(raw.combine.default, _combine_setup, _combine_backward)


@register_flop_formula([raw.permute, raw.combine, raw.combine_backward])
def _no_flops(*args: Any, **kwargs: Any) -> int:
    """Return 0: torch counts matrix products alone."""
    return 0
