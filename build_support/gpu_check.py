# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one go and one report: ``make gpu-check``.

Builds the extension and the C++ tests with CUDA, runs ctest and pytest on the device, repeats the C++ tests under
compute-sanitizer, measures. Where there is no device each step goes as far as the first call that needs one: the
builds must succeed, the tests must be collected and skipped, and the report says "no device". Where every step has
passed on a device, its name goes into the package, to be committed: from then on the first use of a CUDA kernel no
longer warns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compile_flags import ROOT
from cuda_toolkit import cuda_toolkit

RECORD = ROOT / "dynamic_moe" / "gpu_record.json"  # dynamic_moe/_gpu_record.py reads it
REPORT = ROOT / "build" / "gpu-report.md"
DEVICE_BUILD = ROOT / "build" / "device"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
TAIL = 40  # lines of a step's output in the report


@dataclass(frozen=True)
class Step:
    """A command of the check and what came of it."""

    name: str
    status: str  # passed, failed, or why it did not run
    seconds: float
    output: str


def main() -> int:
    """Run all steps, write the report; return 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--arch", default="native", help="architectures of the C++ tests where there is a device")
    options = parser.parse_args()
    toolkit = cuda_toolkit()
    if toolkit is None:
        sys.exit("gpu-check needs a CUDA toolkit: set CUDA_HOME to its folder")
    device = device_name()
    steps: list[Step] = []

    def add(name: str, command: list[str | Path], **environment: str) -> bool:
        print(f"\n##### {name}\n$ {' '.join(map(str, command))}", flush=True)
        start = time.monotonic()
        # cmake of this environment: an older one of the system may not know the standard that the tests are written in.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        changed = {"CUDACXX": str(toolkit / "bin" / "nvcc"), "DYNAMIC_MOE_CUDA": "1", "PATH": path, **environment}
        result = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(result.stdout[-4000:], flush=True)
        status = "passed" if result.returncode == 0 else "failed"
        steps.append(Step(name, status, time.monotonic() - start, result.stdout))
        return result.returncode == 0

    python = sys.executable
    # Without a device "native" means nothing; one architecture shows that everything compiles.
    architectures = options.arch if device else "80-real"
    listed = {} if device else {"TORCH_CUDA_ARCH_LIST": "8.0"}
    install = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--editable", "."]
    built = add("build the extension with CUDA", install, **listed)
    if built:
        add("import", [python, "-m", "dynamic_moe.info"])
        add("pytest -m gpu", [python, "-m", "pytest", "-q", "-m", "gpu", "tests/python", "-p", "no:xdist"])
        results = ROOT / "build" / "gpu-results.json"
        results.unlink(missing_ok=True)
        add("benchmarks", [python, "-m", "benchmarks.gpu", "--json", results])
    configure = ["cmake", "-S", ".", "-B", DEVICE_BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DDYNAMIC_MOE_BUILD_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    if add("configure the C++ tests for the device", configure) and add(
        "build the C++ tests for the device", ["cmake", "--build", DEVICE_BUILD, "--target", *device_tests()]
    ):
        add("ctest on the device", ["ctest", "--test-dir", DEVICE_BUILD, "-L", "gpu", "--output-on-failure"])
        steps += sanitizer_steps(add, toolkit, device is not None)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(report(device, steps))
    print(f"\nWrote {options.report}; {device or 'no device'}")
    if device and all(step.status == "passed" for step in steps):
        RECORD.write_text(json.dumps(record(), indent=2) + "\n")
        print(f"Wrote {RECORD}: commit it")
    return 1 if any(step.status == "failed" for step in steps) else 0


def device_tests() -> list[str]:
    """Return the targets of the C++ tests that run on a device: one for each folder of tests/cuda that has some."""
    folders = {path.parent.name for path in (ROOT / "tests" / "cuda").glob("*/*_test.cpp")}
    return [f"{folder}_device_test" for folder in sorted(folders)]


def sanitizer_steps(add: Callable[..., bool], toolkit: Path, has_device: bool) -> list[Step]:
    """Run the C++ tests under compute-sanitizer; return the steps that could not run."""
    tool = shutil.which("compute-sanitizer", path=f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    left_out = []
    for sanitizer in SANITIZERS:
        name = f"compute-sanitizer {sanitizer}"
        if not has_device or tool is None:
            why = "no device" if not has_device else "compute-sanitizer is not installed"
            left_out.append(Step(name, why, 0.0, ""))
            continue
        for test in sorted(DEVICE_BUILD.rglob("*_device_test")):
            add(f"{name}, {test.name}", [tool, "--tool", sanitizer, "--error-exitcode", "1", test])
    return left_out


def device_name() -> str | None:
    """Return the name of the first CUDA device that torch sees, or None."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() or None
    )


def record() -> dict[str, str]:
    """Return what the package is to say about the device that has passed."""
    code = (
        "import json; from dynamic_moe import info; found = info.collect(); gpu, build = found['gpus'][0], "
        "found['dynamic_moe']; print(json.dumps({'device': gpu['name'], 'compute_capability': "
        "gpu['compute_capability'], 'dynamic_moe': build['version'], 'torch': found['torch'], 'cuda': build['cuda']}))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return json.loads(found.stdout) | {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def report(device: str | None, steps: list[Step]) -> str:
    """Return the report as Markdown."""
    lines = ["# GPU check", "", f"Device: {device or '**no device**'}", ""]
    if device is None:
        lines += [
            "Nothing ran on a GPU. A step that passed went as far as its first call of the device: builds, imports, "
            "and tests that were collected and skipped.",
            "",
        ]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:.0f} |" for step in steps]
    results = ROOT / "build" / "gpu-results.json"
    if device and results.exists():
        lines += ["", "## Measured", "", *measured(json.loads(results.read_text()))]
    for step in steps:
        if step.output.strip():
            lines += ["", f"## {step.name}", "", "```", *step.output.strip().splitlines()[-TAIL:], "```"]
    return "\n".join(lines) + "\n"


def measured(results: list[dict[str, object]]) -> list[str]:
    """Return the table of the benchmarks."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu import Result, row

    head = "| shape | dtype | tokens | pass | who | time | of matmul ceiling | of copy ceiling |"
    return [head, "|---|---|---|---|---|---|---|---|", *(row(Result(**each)) for each in results)]


if __name__ == "__main__":
    sys.exit(main())
