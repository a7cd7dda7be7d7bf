# SPDX-License-Identifier: Apache-2.0
"""Permutation of (token, expert) pairs into rows sorted by expert, and the sum of the rows back to tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe._checks import check_positive
from dynamic_moe._gpu_record import warn_unless_confirmed
from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    accumulator_dtype,
    as_int,
    check_cuda,
    check_device,
    check_tensor,
    checked_mode,
    differentiable,
    differentiable_once,
    raw,
    register_fake,
)
from dynamic_moe.ops._torch_private import transforms_are_active

# Row capacities of the raw operator: R, whatever it is, and one row for each slot.
_EXACT, _EVERY_SLOT = -1, 2**31 - 1


class Permutation(NamedTuple):
    """Where the rows of each expert are. Everything is int32.

    R is the number of live rows. With a row capacity ``row_token`` and ``row_slot`` hold that many rows, at most T * K,
    of which the first R are live.

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
        [T, K]. The row of each slot; -1 if it is unused, or was dropped.
    overflow : Tensor or None
        Scalar: how many (token, expert) pairs the row capacity dropped. None without a capacity, as none can be.
    """

    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
    overflow: Tensor | None = None


def permute(
    expert_ids: Tensor, num_experts: int, *, row_capacity: int | None = None, static_rows: bool = False
) -> Permutation:
    """Sort the (token, expert) pairs by expert, then by token.

    Nothing is padded: R, the number of rows, is the number of used slots, and depends on the data. On CUDA the host
    waits for it once, unless ``row_capacity`` is given.

    Parameters
    ----------
    expert_ids : Tensor
        int32 or int64 [T, K]. An id outside [0, E) marks an unused slot.
    num_experts : int
        E >= 1.
    row_capacity : int, optional
        Let the row buffers, here and in every operator that takes the permutation, hold this many rows, but never more
        than T * K, so that no shape depends on data: nothing waits for the device, and a CUDA graph can hold the call.
        What stands in row buffers beyond R has no meaning. Where R would be larger, pairs are dropped until the rest
        fits, and counted in ``overflow``: those in the last slot first, in a slot those of the last tokens first. In
        checked mode that is an error instead. T * K rows always suffice; some row capacity is needed on the meta
        device, and under ``torch.func.vmap``, which runs the operators once for each element of the mapped dimension.
    static_rows : bool, default False
        Deprecated: a row capacity of T * K, by its older name.

    Returns
    -------
    Permutation

    Raises
    ------
    ValueError
        If ``expert_ids`` has another dtype or number of dimensions, ``num_experts`` or ``row_capacity`` is not a
        positive integer, T * K does not fit into 31 bits, ``row_capacity`` is needed and not given, or, in checked
        mode, it does not suffice.
    """
    check_tensor("expert_ids", expert_ids, (torch.int32, torch.int64), T=None, K=None)
    if expert_ids.is_cuda:
        warn_unless_confirmed()
    if type(num_experts) is not int:
        num_experts = as_int("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if expert_ids.dtype == torch.int64:
        expert_ids = expert_ids.clamp(-1, num_experts).to(torch.int32)  # clamped: 2**32 must not wrap to expert 0
    overflow = None
    if row_capacity is not None:
        check_row_capacity(row_capacity, static_rows)
        if row_capacity < expert_ids.numel():
            expert_ids, overflow = _drop_overflow(expert_ids, num_experts, row_capacity)
        else:
            overflow = expert_ids.new_zeros(())
    elif static_rows:
        row_capacity = _EVERY_SLOT
    raw_capacity = _EXACT if row_capacity is None else row_capacity
    try:
        permutation = Permutation(*raw.permute.default(expert_ids, num_experts, raw_capacity))
    except RuntimeError as error:
        if row_capacity is not None:
            raise
        _refuse_dynamic_rows(expert_ids, error)
    return permutation if overflow is None else permutation._replace(overflow=overflow)


def check_row_capacity(row_capacity: int | None, static_rows: bool) -> int | None:
    """Return the capacity if it is None or an integer of at least 1, and not given by both of its names."""
    if row_capacity is None:
        return None
    if static_rows:
        raise ValueError(f"static_rows must be False where row_capacity is given, got {static_rows!r}")
    return check_positive("row_capacity", row_capacity)


def _drop_overflow(expert_ids: Tensor, num_experts: int, row_capacity: int) -> tuple[Tensor, Tensor]:
    """Mark the slots as unused that do not fit; also returns how many they are."""
    num_tokens, max_experts = expert_ids.shape
    used = (expert_ids >= 0) & (expert_ids < num_experts)
    # Every token's first slot comes before any token's second one.
    rank = used.t().reshape(-1).cumsum(0).view(max_experts, num_tokens).t()
    dropped = used & (rank > row_capacity)
    overflow = dropped.sum(dtype=torch.int32)
    if checked_mode() and not torch.compiler.is_compiling() and expert_ids.device.type != "meta" and overflow:
        raise ValueError(f"row_capacity must be at least the number of used slots, {used.sum()}, got {row_capacity}")
    return torch.where(dropped, num_experts, expert_ids), overflow


def _refuse_dynamic_rows(expert_ids: Tensor, error: RuntimeError) -> NoReturn:
    """Say what is missing where the number of rows cannot depend on the data."""
    if expert_ids.device.type == "meta":
        where = "on the meta device there are no expert_ids to count"
    elif not torch.compiler.is_compiling() and transforms_are_active():
        where = "under torch.func.vmap every element of the mapped dimension would have another number of rows"
    else:
        raise error
    raise ValueError(f"row_capacity must be given, got None: {where}") from error


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
    check_cuda("rows", rows)
    check_tensor("slot_row", slot_row, (torch.int32,), T=None, K=None)
    num_tokens, max_experts = slot_row.shape
    if weights is not None:
        check_tensor("weights", weights, FLOAT_DTYPES, T=num_tokens, K=max_experts)
        weights = weights.to(accumulator_dtype(rows.dtype))
    check_device(rows.device, weights=weights, slot_row=slot_row)
    y: Tensor = _combine(rows, weights, slot_row)
    return y


@register_fake(raw.permute.default)
def _permute_fake(expert_ids: Tensor, num_experts: int, row_capacity: int = _EXACT) -> tuple[Tensor, ...]:
    if row_capacity == _EXACT:
        num_rows: Any = torch.library.get_ctx().new_dynamic_size()
    elif row_capacity == _EVERY_SLOT:
        num_rows = expert_ids.numel()
    else:
        num_rows = torch.sym_min(row_capacity, expert_ids.numel())  # type: ignore[no-untyped-call]
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
