# SPDX-License-Identifier: Apache-2.0
"""The router's products: float32 whatever torch is told, forward and backward, with derivatives of any order."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_moe import TopPRouter
from dynamic_moe.float32_linear import float32_linear

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "_grouped_mm"}


class Names(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def leaves(dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((37, 130), (11, 130)))
    return x.to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()


def run(x: Tensor, weight: Tensor) -> list[Tensor]:
    logits = float32_linear(x, weight)
    return [logits, *torch.autograd.grad(logits.square().sum(), (x, weight))]


# Without bfloat16 instructions "medium" changes nothing: then it is the names of what ran that the test stands on.
@pytest.mark.usefixtures("medium_precision")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_setting_and_no_autocast_rounds_a_product(
    dtype: torch.dtype, weight_dtype: torch.dtype, compiled: bool
) -> None:
    torch._dynamo.reset()
    x, weight = leaves(dtype, weight_dtype)
    call = torch.compile(run, backend="aot_eager") if compiled else run
    with Names() as ran, torch.autocast("cpu", torch.bfloat16):
        logits, dx, dw = call(x, weight)
    assert not ran.names & PRODUCTS
    exact = linear(x.double(), weight.double())
    d_logits = 2 * exact.detach()
    expected_dx, expected_dw = torch.autograd.grad(exact, (x, weight), d_logits)
    assert (logits.dtype, dx.dtype, dw.dtype) == (torch.float32, dtype, weight_dtype)
    assert_close(logits.double(), exact, rtol=1e-6, atol=2e-5)
    assert_close(dx, expected_dx, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-3)
    assert_close(dw, expected_dw, rtol=1e-6 if weight_dtype == torch.float32 else 1e-2, atol=2e-3)


def test_backward_inside_autocast_is_the_one_outside() -> None:
    router = TopPRouter(130, 11)
    x = torch.randn(37, 130)
    router(x).logits.square().sum().backward()
    assert router.weight.grad is not None
    outside, router.weight.grad = router.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        router(x).logits.square().sum().backward()
    assert torch.equal(router.weight.grad, outside)


def test_derivatives_of_any_order() -> None:
    def third(function: Any) -> tuple[Tensor, ...]:
        x, weight = leaves(torch.float32, torch.float32)
        dx, dw = torch.autograd.grad(function(x, weight).sin().sum(), (x, weight), create_graph=True)
        dx, dw = torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad((dx * x.detach()).sum() + (dw * weight.detach()).sum(), (x, weight))

    expected = third(lambda x, weight: linear(x.double(), weight.double()))
    for a, b in zip(third(float32_linear), expected, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_float64_stays() -> None:
    x, weight = leaves(torch.float64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float32_linear(x, weight), linear(x, weight.double()))
