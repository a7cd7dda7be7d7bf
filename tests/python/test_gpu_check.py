# SPDX-License-Identifier: Apache-2.0
"""The report of `make gpu-check`, and the benchmark that it runs, where there is no device."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_build import load

from dynamic_moe import _gpu_record, info

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.level_independent
gpu_check = load(ROOT / "build_support" / "gpu_check.py")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return __import__("benchmarks.gpu", fromlist=["gpu"])


STEPS = [
    gpu_check.Step("import", "passed", 1.4, "one\ntwo"),
    gpu_check.Step("compute-sanitizer memcheck", "no device", 0.0, ""),
]


def test_the_report_says_that_there_is_no_device():
    text = gpu_check.report(None, STEPS)
    assert "Device: **no device**" in text
    assert "Nothing ran on a GPU" in text
    assert "| import | passed | 1 |" in text
    assert "| compute-sanitizer memcheck | no device | 0 |" in text
    assert text.count("```") == 2  # the output of the one step that has any


def test_the_report_names_the_device_and_holds_what_was_measured(monkeypatch, tmp_path, gpu):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "build").mkdir()
    results = [
        gpu.Result("A", "bfloat16", 32, False, "dynamic_moe", 1.5, 0.25, 0.5),
        gpu.Result("A", "bfloat16", 32, True, "ScatterMoE", None, None, None, "ImportError: not installed"),
    ]
    (tmp_path / "build" / "gpu-results.json").write_text(json.dumps([vars(result) for result in results]))
    text = gpu_check.report("Some GPU", STEPS)
    assert "Nothing ran" not in text
    assert "| A | bfloat16 | 32 | forward | dynamic_moe | 1.500 ms | 25% | 50% |" in text
    assert "| A | bfloat16 | 32 | training | ScatterMoE | ImportError: not installed | | |" in text


@pytest.mark.parametrize("case", ["passed", "failed", "left out", "no device"])
def test_only_a_run_that_passed_on_a_device_is_recorded(monkeypatch, tmp_path, case):
    facts = {"device": "Some GPU", "compute_capability": "9.0", "dynamic_moe": "1", "torch": "2", "cuda": "13.0"}

    def run(command, **_):
        words = " ".join(map(str, command))
        failed = case == "failed" and "pytest" in words
        out = json.dumps(facts) if "json.dumps" in words else "abc-dirty\n" if "describe" in words else ""
        return SimpleNamespace(returncode=int(failed), stdout=out)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "cuda_toolkit", lambda: tmp_path)
    monkeypatch.setattr(gpu_check, "device_name", lambda: None if case == "no device" else "Some GPU")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None if case == "left out" else "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "RECORD", record := tmp_path / "gpu_record.json")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--report", str(tmp_path / "report.md")])
    assert gpu_check.main() == (case == "failed")
    assert record.exists() == (case == "passed")
    if case != "passed":
        return
    monkeypatch.setattr(_gpu_record, "PATH", record)
    assert _gpu_record.read() == facts | {"commit": "abc-dirty", "date": time.strftime("%Y-%m-%d")}
    assert "\nconfirmed on  Some GPU (compute capability 9.0), " in info.as_text(info.collect())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_benchmark_says_that_there_is_no_device(monkeypatch, capsys, gpu):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "no device\n"


def test_a_contender_that_fails_does_not_end_the_rest(monkeypatch, gpu):
    def fail() -> None:
        raise ImportError("x is not installed")

    monkeypatch.setattr(gpu, "contenders", lambda shape, k: {"x": fail, "y": lambda: lambda x, *rest: x * 2})
    monkeypatch.setattr(gpu, "milliseconds", lambda call, runs: [call(), 2.0][1])
    for name in ("randn", "empty"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, plain=plain, **o: plain(*a, **{k: v for k, v in o.items() if k != "device"})
        )
    shape = gpu.Shape("tiny", 8, 4, 3, 2)
    for training in (False, True):
        failed, ran = gpu.measure_case(shape, 5, "float32", training, 1e9, 1e9, 1)
        assert (failed.milliseconds, failed.note) == (None, "ImportError: x is not installed")
        assert ran.milliseconds == 2.0
        work = (3 if training else 1) * 2 * 10 * 3 * 8 * 4
        assert ran.of_matmul == pytest.approx(work / 2e-3 / 1e9)
