# SPDX-License-Identifier: Apache-2.0
"""Argument checks that several modules share. Every message names the argument, its value and what was expected."""

import math
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

Renormalize = bool | Literal["straight_through"]


def check_positive(name: str, value: object) -> int:
    """Return ``value`` as an int if it is an integer, Python's or NumPy's, of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def check_at_most(name: str, value: int, most_name: str, most: int) -> int:
    """Return ``value`` as an int if it is an integer between 1 and ``most``."""
    if check_positive(name, value) > most:
        raise ValueError(f"{name} must be at most {most_name}={most}, got {value}")
    return int(value)


def check_std(value: float) -> float:
    """Return ``value`` as a float if it can be the standard deviation of an initialization."""
    if not isinstance(value, Real) or not 0.0 <= value < math.inf:
        raise ValueError(f"init_std must be finite and at least 0, got {value!r}")
    return float(value)


def check_p(value: float, where: str = "") -> float:
    """Return ``value`` as a float if it is a number that can be a share of the probability."""
    if not isinstance(value, Real):
        raise ValueError(f"p must be a number in (0, 1], got {value!r}{where}: a tensor's is its item()")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"p must be in (0, 1], got {value!r}{where}")
    return float(value)


def check_temperature(value: float) -> float:
    """Return ``value`` as a float if it can divide logits."""
    if not isinstance(value, Real):
        raise ValueError(f"temperature must be a number, got {value!r}: a tensor's is its item()")
    if not 0.0 < value < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {value!r}")
    return float(value)


def check_renormalize(value: Renormalize) -> Renormalize:
    """Return ``value`` if it says whether, and how, weights are renormalized."""
    if not isinstance(value, bool) and value != "straight_through":
        raise ValueError(f"renormalize must be False, True or 'straight_through', got {value!r}")
    return value


def check_weight_dtype(dtype: torch.dtype | None) -> None:
    """Raise a ValueError unless weights can have this dtype; None is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and _is_supported(dtype)):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def check_dense(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a tensor whose elements lie in memory at strides."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor, got a nested one: pass the values() of a jagged tensor, or pad it"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {value.layout}: call to_dense() first")


def flatten_tokens(x: Tensor, hidden_size: int) -> Tensor:
    """View ``x [..., H]`` as ``[T, H]``, tokens in row-major order of the leading dimensions."""
    try:
        fits = x.shape[-1] == hidden_size and x.is_floating_point() and x.layout is torch.strided
        fits = fits and x.dtype.itemsize > 1
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor, a scalar, or a nested tensor
        fits = False
    if not fits:
        _refuse_tokens(x, hidden_size)
    return x.reshape(-1, hidden_size)


def _refuse_tokens(x: Tensor, hidden_size: int) -> None:
    check_dense("x", x)
    if x.dim() == 0:
        raise ValueError(f"x must have shape [..., {hidden_size}], got a scalar")
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x has width {x.shape[-1]}, but the module was built with hidden_size={hidden_size}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}: convert it first")


def flatten_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """View ``token_mask [...]`` as ``[T]``, for the same leading dimensions as ``x [..., H]``."""
    if token_mask is None:
        return None
    check_dense("token_mask", token_mask)
    if token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask must be a bool tensor (True: route the token), got {token_mask.dtype}")
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask must have the leading shape of x, {list(x.shape[:-1])}, got {list(token_mask.shape)}"
        )
    return token_mask.reshape(-1)


def _is_supported(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
