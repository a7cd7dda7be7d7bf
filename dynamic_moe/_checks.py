# SPDX-License-Identifier: Apache-2.0
"""Argument checks that several modules share. Every message names the argument, its value and what was expected."""

import torch
from torch import Tensor


def check_positive(name: str, value: int) -> int:
    """Return ``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def check_std(value: float) -> float:
    """Return ``value`` if it can be the standard deviation of an initialization."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"init_std must be finite and at least 0, got {value!r}")
    return value


def flatten_tokens(x: Tensor, hidden_size: int) -> Tensor:
    """View ``x [..., H]`` as ``[T, H]``, tokens in row-major order of the leading dimensions."""
    if x.dim() == 0:
        raise ValueError(f"x must have shape [..., {hidden_size}], got a scalar")
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x has width {x.shape[-1]}, but the module was built with hidden_size={hidden_size}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    return x.reshape(-1, hidden_size)


def flatten_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """View ``token_mask [...]`` as ``[T]``, for the same leading dimensions as ``x [..., H]``."""
    if token_mask is None:
        return None
    if token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask must be a bool tensor (True: route the token), got {token_mask.dtype}")
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask must have the leading shape of x, {list(x.shape[:-1])}, got {list(token_mask.shape)}"
        )
    return token_mask.reshape(-1)
