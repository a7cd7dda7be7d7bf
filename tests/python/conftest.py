# SPDX-License-Identifier: Apache-2.0
"""Fixtures, markers and the budget of all Python tests.

DYNAMIC_MOE_CPU_ISA chooses the CPU level, as everywhere. Hypothesis draws the same examples in every run, fewer of them
below the best level; ``--hypothesis-profile=thorough`` draws many, other ones each time.
"""

import os

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
