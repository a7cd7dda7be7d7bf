# SPDX-License-Identifier: Apache-2.0
"""The helpers of the tests can fail: a test that cannot is worse than none."""

import pytest
import torch
from strategies import LAYOUTS, LOADS, RaggedProblem, laid_out
from tolerances import Bounded, assert_within, contraction, exactly, precision

pytestmark = pytest.mark.level_independent


def bounded(*pairs: tuple[float, float]) -> Bounded:
    values, bounds = zip(*pairs, strict=True)
    return Bounded(torch.tensor(values, dtype=torch.float64), torch.tensor(bounds, dtype=torch.float64))


def test_an_error_in_a_small_element_does_not_hide_behind_a_large_one() -> None:
    exact = bounded((1000.0, 1e-2), (1.0, 1e-5))
    assert_within(torch.tensor([1000.009, 1.000009]), exact)
    with pytest.raises(AssertionError, match=r"y: 1 of 2 elements are out of bounds, the worst at \[1\]: got 1.001"):
        assert_within(torch.tensor([1000.0, 1.001]), exact, "y")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_never_within(wrong: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_within(torch.tensor([1.0, wrong]), bounded((1.0, 1.0), (1.0, 1e30)))


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"shape \[2, 1\], not \[2\]"):
        assert_within(torch.zeros(2, 1), bounded((0.0, 1.0), (0.0, 1.0)))


@pytest.mark.parametrize("terms", [1, 7, 65, 1000])
def test_sums_notice_one_product_left_out_and_take_float32_rounding(terms: int) -> None:
    a, b = torch.randn(50, terms), torch.randn(terms)
    exact = contraction(precision(torch.float32), torch.matmul, a, b, terms)
    total = torch.zeros(50)
    for k in range(terms):
        total = total + a[:, k] * b[k]
    assert_within(total, exact)
    with pytest.raises(AssertionError):
        assert_within(total - a[:, 0] * b[0], exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_of_the_terms_are_carried_along(dtype: torch.dtype) -> None:
    p = precision(dtype)
    a, b = torch.randn(200, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    exact = contraction(p, torch.matmul, exactly(a).stored(p), b, 64)
    assert_within(a.to(dtype).double() @ b, exact)
    coarser = torch.bfloat16 if dtype == torch.float16 else torch.float8_e4m3fn
    with pytest.raises(AssertionError):
        assert_within(a.to(coarser).double() @ b, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout: str) -> None:
    tensor = torch.randn(3, 4, 5)
    view = laid_out(tensor, layout)
    assert torch.equal(view, tensor)
    assert view.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (view.data_ptr() % 8 != 0) == (layout == "offset")


@pytest.mark.parametrize("load", LOADS)
def test_loads_are_what_they_say(load: str) -> None:
    problem = RaggedProblem(1, 40, 5, 3, 4, 4, torch.float32, load, "contiguous")
    used = problem.expert_ids < 5
    rows = int(used.sum())
    assert problem.expert_ids.shape == (40, 3)
    assert rows == {"top": 120, "one expert": 120, "nothing": 0}.get(load, rows)
    assert 0 < rows < 60 if load == "sparse" else True
    assert (rows < 120) == (load in ("any", "sparse", "nothing"))
