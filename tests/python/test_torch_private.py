# SPDX-License-Identifier: Apache-2.0
"""The package in a torch that lacks private names: each missing alone, and all of them together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dynamic_moe import DynamicMoE, collect_routing
from dynamic_moe.ops import _torch_private

pytestmark = pytest.mark.level_independent
ROOT = Path(__file__).resolve().parents[2]


def results() -> dict[str, Any]:
    """What a layer computes: from a checkpoint, and under torch.func."""
    torch.manual_seed(0)
    layer, x = DynamicMoE(8, 6, 4), torch.randn(5, 8)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def loss(*parameters: Any) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x).square().sum()

    with collect_routing(layer) as routings:
        y = checkpoint(layer, x, use_reentrant=False)
        gradients = torch.autograd.grad(y.square().sum(), parameters)
    return {
        "y": y,
        "gradients": gradients,
        "torch.func": torch.func.grad(loss, argnums=tuple(range(len(parameters))))(*parameters),
        "routings": len(routings),
    }


def python(arguments: list[str], without: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "python"), *sys.path[1:]])
    environment = os.environ | {"DYNAMIC_MOE_TORCH_PRIVATE": without, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# Run before the package is imported: torch is imported once, then each setting has a process of its own.
WITHOUT_EACH = """
import os, sys, torch, torch.utils.checkpoint, pytest
for without in sys.argv[2:]:
    if os.fork() == 0:
        os.environ["DYNAMIC_MOE_TORCH_PRIVATE"] = without
        import test_torch_private
        torch.save(test_torch_private.results(), f"{sys.argv[1]}/{without}")
        os._exit(0)
    os.wait()
"""


def test_the_package_computes_the_same_without_each_name_and_all(tmp_path: Path) -> None:
    settings = [*_torch_private.NAMES, "0"]
    result = python(["-c", WITHOUT_EACH, str(tmp_path), *settings], "")
    expected = results()
    assert expected["routings"] == 1
    for without in settings:
        assert (tmp_path / without).exists(), result.stderr
        assert_close(torch.load(tmp_path / without), expected, msg=lambda text, without=without: f"{without}: {text}")


def test_a_name_that_torch_lacks_is_missing() -> None:
    assert all(_torch_private._get(name) is not None for name in _torch_private.NAMES[:-1])
    assert _torch_private._get("torch._C._no_such_name") is None
    assert _torch_private._get("torch._no_such_module.name") is None


def test_the_operator_tests_pass_without_any() -> None:
    files = ["conventions", "gating", "rows"]
    fast = "(one_graph or not compile) and not inductor and not export"
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", fast]
    tests = [*(f"tests/python/test_ops_{name}.py" for name in files), "tests/python/test_layer.py"]
    # From torch 2.15 on refused arguments would be RuntimeErrors, as the documents say; the tests want ValueErrors.
    names = [name for name in _torch_private.NAMES if name not in _torch_private._ERRORS]
    without = "0" if _torch_private._torch_version() < (2, 15) else ",".join(names)
    result = python(["-m", "pytest", *options, *tests], without)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "fallback without private names of torch, drops tangents" in result.stdout


def test_another_setting_is_refused() -> None:
    result = python(["-c", "import dynamic_moe"], "torch._C._no_such_name")
    assert "ValueError: DYNAMIC_MOE_TORCH_PRIVATE must be 0, 1 or some of torch._C." in result.stderr
