# SPDX-License-Identifier: Apache-2.0
"""CPU levels give the same results: the same bits where nothing is rounded differently, else within rounding.

The numerics of each level are tested against float64 by running the whole suite at that level; here the levels of one
process are compared with each other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from strategies import GatingProblem, RaggedProblem, gating_problems, ragged_problems
from torch import Tensor
from torch.testing import assert_close

from dynamic_moe import _C, ops

pytestmark = pytest.mark.level_independent

LEVELS = _C.supported_cpu_isas(ask=True)
HAS_TILES = "amx" in _C.supported_cpu_isas()


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    yield
    _C.set_cpu_isa(None)


def pass_and_gradients(problem: RaggedProblem) -> list[Tensor]:
    leaves = problem.leaves()
    generator = torch.Generator().manual_seed(problem.seed)
    y = ops.expert_mlp(*leaves[:3], problem.expert_ids, leaves[3])
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Allow a few roundings to the dtype; the bound of each element is the business of the numerics tests."""
    if expected.numel() == 0:
        return
    epsilon = torch.finfo(dtype).eps
    scale = float(expected.abs().max())
    assert_close(actual, expected, atol=16 * epsilon * scale, rtol=8 * epsilon)


@given(ragged_problems())
def test_the_expert_pass_agrees(problem: RaggedProblem) -> None:
    _C.set_cpu_isa(LEVELS[0])
    expected = pass_and_gradients(problem)
    for name in LEVELS[1:]:
        _C.set_cpu_isa(name)
        for actual, exact in zip(pass_and_gradients(problem), expected, strict=True):
            if problem.dtype == torch.float64:  # the same plain loops at every level
                assert torch.equal(actual, exact)
            else:
                assert_near(actual, exact, problem.dtype)


@given(gating_problems())
def test_gating_agrees(problem: GatingProblem) -> None:
    def run() -> ops.Gating:
        return ops.top_p_gating(problem.logits, **problem.top_p)  # type: ignore[arg-type]

    _C.set_cpu_isa(LEVELS[0])
    expected = run()
    for name in LEVELS[1:]:
        _C.set_cpu_isa(name)
        actual = run()
        for field in ("probabilities", "probability_sum", "entropy", "logsumexp"):
            assert_close(getattr(actual, field), getattr(expected, field), atol=1e-6, rtol=2e-5)
        # A mass that reaches p by a rounding may do so one expert earlier or later.
        differing = (actual.expert_ids != expected.expert_ids).any(1)
        assert differing.sum() <= 1
        assert torch.equal(actual.tokens_per_expert, expected.tokens_per_expert) or differing.any()


@given(ragged_problems())
def test_permute_gives_the_same_bits(problem: RaggedProblem) -> None:
    _C.set_cpu_isa(LEVELS[0])
    expected = ops.permute(problem.expert_ids, problem.experts)
    for name in LEVELS[1:]:
        _C.set_cpu_isa(name)
        for actual, exact in zip(ops.permute(problem.expert_ids, problem.experts)[:-1], expected[:-1], strict=True):
            assert torch.equal(actual, exact)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from dynamic_moe import _C
from strategies import RaggedProblem
from test_isa import PROBLEM, pass_and_gradients
torch.save((_C.cpu_isa(), pass_and_gradients(RaggedProblem(*PROBLEM))), sys.argv[2])
"""
PROBLEM = (3, 20, 4, 3, 49, 33, torch.bfloat16, "any", "contiguous")


def test_a_level_forced_by_the_environment_gives_the_same_bits(tmp_path: Path) -> None:
    name = LEVELS[0]
    result = tmp_path / "result.pt"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(result)],
        env=os.environ | {"DYNAMIC_MOE_CPU_ISA": name},
        check=True,
    )
    level, tensors = torch.load(result)
    assert level == name
    _C.set_cpu_isa(name)
    for actual, expected in zip(tensors, pass_and_gradients(RaggedProblem(*PROBLEM)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["", "sse", "AVX2"])
def test_an_unknown_level_is_an_error_and_changes_nothing(name: str) -> None:
    before = _C.cpu_isa()
    with pytest.raises(ValueError, match=f"isa must be one of scalar, .*, got '{name}'"):
        _C.set_cpu_isa(name)
    assert _C.cpu_isa() == before


def test_none_goes_back_to_the_level_of_the_beginning() -> None:
    before = _C.cpu_isa()
    for name in LEVELS:
        _C.set_cpu_isa(name)
    _C.set_cpu_isa(None)
    assert _C.cpu_isa() == before


def tiles_seen(argument: str, level: str) -> tuple[list[str], str | None, str | None]:
    """Return the states of the tiles at import, behind float16 and behind bfloat16, the error, and the reason."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tiles_process.py")), argument],
        env=os.environ | {"DYNAMIC_MOE_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen, error, reason = json.loads(result.stdout)
    return seen, error, reason


@pytest.mark.skipif(not HAS_TILES, reason="no AMX here")
@pytest.mark.parametrize("level", ["", "amx"])
def test_tiles_are_asked_for_by_the_first_bfloat16_product(level: str) -> None:
    if "amx" not in LEVELS:
        pytest.skip(f"tiles are refused here: {_C.amx_tiles()['reason']}")
    assert tiles_seen("", level) == (["not asked for yet", "not asked for yet", "granted"], None, None)


@pytest.mark.skipif(not HAS_TILES, reason="no AMX here")
def test_where_tiles_are_refused_bfloat16_runs_at_another_level_and_a_forced_one_is_an_error() -> None:
    states = ["not asked for yet", "not asked for yet", "refused"]
    seen, error, reason = tiles_seen("refuse", "")
    assert (seen, error) == (states, None)
    assert reason is not None
    assert "alternate signal stack" in reason
    seen, error, reason = tiles_seen("refuse", "amx")
    assert seen == states
    assert error is not None
    assert "amx was forced" in error
    assert reason is not None
    assert reason in error


def test_a_level_without_tiles_never_asks() -> None:
    states, error, _ = tiles_seen("", [level for level in LEVELS if level != "amx"][-1])
    assert states == [_C.amx_tiles()["state"] if not HAS_TILES else "not asked for yet"] * 3
    assert error is None
