# SPDX-License-Identifier: Apache-2.0
"""How far a result may lie from the float64 one, element by element.

A tolerance for a whole tensor, relative to its largest element, hides a wrong tile among large numbers. Here every
element has a bound of its own, made of the numbers that were added up for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Terms = int | Tensor


@dataclass(frozen=True)
class Precision:
    """Rounding errors of a dtype and of the accumulator that goes with it."""

    accumulator: float  # unit roundoff of sums and elementwise functions
    store: float  # unit roundoff of what is stored
    smallest: float  # absolute error of what is stored, below the normal numbers

    def sums(self, magnitude: Tensor, terms: Terms) -> Tensor:
        """Bound the error of sums of ``terms`` products whose absolute values add up to ``magnitude``.

        The errors of the steps have either sign and grow like the root of their number; 8 covers short sums. A product
        left out, or taken twice, is an error of about magnitude / terms, far above this.
        """
        return self.accumulator * (8 + torch.as_tensor(terms, dtype=torch.float64).sqrt()) * magnitude

    def stored(self, value: Tensor) -> Tensor:
        """Bound the error of rounding to the dtype."""
        return self.store * value.abs() + self.smallest


def precision(dtype: torch.dtype) -> Precision:
    """Return what a kernel for tensors of this dtype may do.

    float64 is compared with float64: twice the roundoff, the kernel's and the oracle's.
    """
    return {
        torch.float64: Precision(2.0**-52, 2.0**-52, 0.0),
        torch.float32: Precision(2.0**-24, 2.0**-24, 2.0**-126),
        torch.bfloat16: Precision(2.0**-24, 2.0**-8, 2.0**-126),
        torch.float16: Precision(2.0**-24, 2.0**-11, 2.0**-25),
    }[dtype]


@dataclass
class Bounded:
    """Exact values in float64 and how far the computed ones may be off."""

    value: Tensor
    bound: Tensor

    def stored(self, p: Precision) -> "Bounded":
        """Round to the dtype once."""
        return Bounded(self.value, self.bound + p.stored(self.value))

    def __mul__(self, other: "Bounded | Tensor") -> "Bounded":
        other = other if isinstance(other, Bounded) else exactly(other)
        value = self.value * other.value
        bound = self.value.abs() * other.bound + self.bound * other.value.abs() + self.bound * other.bound
        return Bounded(value, bound)

    def __getitem__(self, index: object) -> "Bounded":
        return Bounded(self.value[index], self.bound[index])


def exactly(value: Tensor) -> Bounded:
    """Take a tensor as it is."""
    value = value.detach().double()
    return Bounded(value, torch.zeros_like(value))


def contraction(
    p: Precision, multiply: Callable[[Tensor, Tensor], Tensor], a: Bounded | Tensor, b: Bounded | Tensor, terms: Terms
) -> Bounded:
    """Sum products as ``multiply`` does: the value, and the errors of the terms and of the summation.

    Rounding errors of the terms have either sign: eight times the root of the sum of their squares is never reached.
    """
    a = a if isinstance(a, Bounded) else exactly(a)
    b = b if isinstance(b, Bounded) else exactly(b)
    squares = multiply(a.bound**2, b.value**2) + multiply(a.value**2, b.bound**2)
    magnitude = multiply(a.value.abs(), b.value.abs())
    return Bounded(multiply(a.value, b.value), p.sums(magnitude, terms) + 8 * squares.sqrt())


def scatter(p: Precision, rows: Bounded, index: Tensor, count: int) -> Bounded:
    """Add up rows that belong to the same index."""
    value = rows.value.new_zeros((count, *rows.value.shape[1:])).index_add_(0, index.long(), rows.value)
    magnitude = torch.zeros_like(value).index_add_(0, index.long(), rows.value.abs())
    bound = torch.zeros_like(value).index_add_(0, index.long(), rows.bound)
    return Bounded(value, bound + p.sums(magnitude, 1))


def assert_within(actual: Tensor, exact: Bounded, name: str = "result") -> None:
    """Fail unless every element lies within its bound. NaN never does."""
    assert actual.shape == exact.value.shape, f"{name} has shape {list(actual.shape)}, not {list(exact.value.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.detach().double() - exact.value).abs()
    bad = ~(error <= exact.bound)
    if not bad.any():
        return
    ratio = torch.where(error.isnan(), torch.inf, error / exact.bound)
    index = tuple(int(i) for i in torch.unravel_index(ratio.nan_to_num(torch.inf).argmax(), ratio.shape))
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are out of bounds, the worst at {list(index)}: "
        f"got {actual[index].item():.9g}, exactly {exact.value[index].item():.9g} +- {exact.bound[index].item():.3g}"
    )
