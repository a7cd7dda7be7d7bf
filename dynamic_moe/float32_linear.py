# SPDX-License-Identifier: Apache-2.0
"""A linear map in float32 whatever the dtype of its input and weight, and whatever autocast says: for gates."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which autocast leaves dtypes alone."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def float32_linear(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """``x W^T`` in float32, or in float64 if x or W is float64.

    Parameters
    ----------
    x_TH : Tensor
        ``[T, H]``, any floating-point dtype.
    weight_EH : Tensor
        ``[E, H]``, any floating-point dtype.

    Returns
    -------
    Tensor
        ``[T, E]``. The gradients have the dtypes of x and W. For the backward pass x is kept as it came: a bfloat16
        input does not leave a float32 copy behind.
    """
    with without_autocast(x_TH.device.type):
        dtype = _accumulation_dtype(x_TH, weight_EH)
        if x_TH.dtype == dtype and weight_EH.dtype == dtype:
            return functional.linear(x_TH, weight_EH)
        out: Tensor = _MixedLinear.apply(x_TH, weight_EH)  # type: ignore[no-untyped-call]
        return out


def _accumulation_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


class _MixedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        dtype = _accumulation_dtype(x_TH, weight_EH)
        return functional.linear(x_TH.to(dtype), weight_EH.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TH, weight_EH = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        with without_autocast(d_out_TE.device.type):  # a backward pass inside autocast must not round either
            dx_TH = (d_out_TE @ weight_EH.to(d_out_TE.dtype)).to(x_TH.dtype) if need_x else None
            d_weight_EH = (d_out_TE.T @ x_TH.to(d_out_TE.dtype)).to(weight_EH.dtype) if need_weight else None
        return dx_TH, d_weight_EH
