# SPDX-License-Identifier: Apache-2.0
"""Fixtures, markers and the budget of all Python tests.

DYNAMIC_MOE_CPU_ISA chooses the CPU level, as everywhere. Hypothesis draws the same examples in every run, fewer of them
below the best level; ``--hypothesis-profile=thorough`` draws many, other ones each time.
"""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dynamic_moe import _C

IS_BEST_LEVEL = not os.environ.get("DYNAMIC_MOE_CPU_ISA") or _C.cpu_isa() == _C.supported_cpu_isas(ask=True)[-1]

LEVEL_INDEPENDENT = "level_independent: does not depend on the CPU level, so it runs at the best one alone"
GPU = "gpu: needs a CUDA device and a build with CUDA kernels"

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("level", settings.get_profile("ci"), max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("ci" if IS_BEST_LEVEL else "level")


ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faster-than", type=float, help="leave out tests that took longer at the last `make test`")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", LEVEL_INDEPENDENT)
    config.addinivalue_line("markers", GPU)
    # Processes side by side that each take every core wait for one another at the end of every parallel region.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def why_no_gpu() -> str | None:
    """Return what is missing for the tests of the CUDA kernels."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _C.cuda_architectures() else "no CUDA kernels in this build"


def without_slow_tests(items: list[pytest.Item], seconds: float) -> list[pytest.Item]:
    """Return the tests that took less than `seconds`, those that are new, and all that are in changed files."""
    report = ROOT / "build" / "test-results" / f"pytest-{_C.cpu_isa()}.xml"
    took = {
        (case.get("classname"), case.get("name")): float(case.get("time") or 0)
        for case in ElementTree.parse(report).iter("testcase")
    }
    changed = subprocess.run(
        ["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    def is_fast(item: pytest.Item) -> bool:
        path, *classes, _ = item.nodeid.split("[")[0].split("::")
        name = ".".join((path.removesuffix(".py").replace("/", "."), *classes))
        return path in changed.stdout.split() or took.get((name, item.name), 0.0) < seconds

    return [item for item in items if is_fast(item)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if seconds := config.getoption("--faster-than"):
        items[:] = without_slow_tests(items, seconds)
    if reason := why_no_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
    if IS_BEST_LEVEL:
        return
    left_out = [item for item in items if item.get_closest_marker("level_independent")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("level_independent")]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers, in whatever order they run."""
    torch.manual_seed(0)
