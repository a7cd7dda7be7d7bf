# SPDX-License-Identifier: Apache-2.0
"""A linear map in float32 whatever the dtype of its input and weight, and whatever torch is told: for gates."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynamic_moe.ops._float32_linear import float32_linear as _float32_linear


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which autocast leaves dtypes alone."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def float32_linear(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """``x W^T`` in float32, or in float64 if x or W is float64.

    The products are exact float32 ones, forward and backward, also where autocast, ``set_float32_matmul_precision`` or
    ``torch.backends`` let torch's own matrix products round their operands.

    Parameters
    ----------
    x_TH : Tensor
        ``[T, H]``, any floating-point dtype.
    weight_EH : Tensor
        ``[E, H]``, any floating-point dtype.

    Returns
    -------
    Tensor
        ``[T, E]``. The gradients have the dtypes of x and W. For the backward pass x and W are kept as they
        came: a bfloat16 input does not leave a float32 copy behind.
    """
    if torch.float64 in (x_TH.dtype, weight_EH.dtype):  # no setting makes torch round float64
        return functional.linear(x_TH.double(), weight_EH.double())
    return _float32_linear(x_TH, weight_EH)
