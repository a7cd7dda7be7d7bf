# SPDX-License-Identifier: Apache-2.0
"""Runs every test: ctest, then pytest once for each CPU level of this machine; ends with one summary.

ctest registers its own tests once per level. The exit status is 0 only if something ran and all of it passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
from compile_flags import build_temp  # noqa: E402

RESULTS = ROOT / "build" / "test-results"
# What ctest prints of each of a thousand tests that pass.
UNEVENTFUL = r"^\s*Start\s+\d+: |\sPassed\s+[\d.]+ sec$"
# cmake, ctest and ninja of this environment come before those of the system.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


@dataclass(frozen=True)
class Outcome:
    """What one run of a test program came to."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float

    def counts(self) -> str:
        parts = [f"{self.passed} passed", f"{self.failed} failed", f"{self.skipped} skipped"]
        return ", ".join(part for part in parts if not part.startswith("0 ") or part.endswith("passed"))


def run(command: list[str], environment: dict[str, str] | None = None, without: str | None = None) -> int:
    """Run a command in the repository and return its exit status; lines that match `without` are not shown."""
    print(f"\n$ {' '.join(command)}", flush=True)
    environment = ENVIRONMENT | (environment or {})
    if without is None:
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if not re.search(without, line):
                print(line, end="", flush=True)
    return process.returncode


def outcome(name: str, report: Path, status: int, seconds: float) -> Outcome:
    """Read a JUnit report. A program that failed without saying which test did counts as one failure more."""
    passed = failed = skipped = 0
    cases: Iterable[ElementTree.Element] = ElementTree.parse(report).iter("testcase") if report.exists() else []
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    if failed == 0 and (status != 0 or passed == 0):
        failed = 1
    return Outcome(name, passed, failed, skipped, seconds)


def run_ctest(preset: str) -> Outcome:
    """Build the unit tests and run them; a release build tests the very objects that the extension is linked from."""
    start = time.monotonic()
    report = fresh_report("ctest")
    levels = build_temp() / "levels" if preset == "release" else ""
    status = run(["cmake", "--preset", preset, f"-DDYNAMIC_MOE_LEVEL_OBJECTS={levels}"])
    status = status or run(["cmake", "--build", "--preset", preset])
    status = status or run(["ctest", "--preset", preset, "--output-junit", str(report)], without=UNEVENTFUL)
    return outcome("ctest", report, status, time.monotonic() - start)


def run_pytest(level: str, arguments: list[str]) -> Outcome:
    """Run the Python tests at one CPU level."""
    start = time.monotonic()
    report = fresh_report(f"pytest-{level}")
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    status = run(command, {"DYNAMIC_MOE_CPU_ISA": level})
    return outcome(f"pytest {level}", report, status, time.monotonic() - start)


def fresh_report(name: str) -> Path:
    """Return where a report goes, with no old one there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    return report


def runnable_levels() -> tuple[list[str], str]:
    """Return the CPU levels that this machine runs, best first, and why one that it supports is not among them."""
    code = "import json, dynamic_moe._C as c; print(json.dumps([c.supported_cpu_isas(True), c.amx_tiles(True)]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"dynamic_moe cannot be imported:\n{result.stderr}")
    levels, tiles = json.loads(result.stdout)
    refused = tiles["state"] == "refused"
    return levels[::-1], f"amx was left out, its tiles are refused: {tiles['reason']}" if refused else ""


def summary(outcomes: list[Outcome], left_out: str = "") -> int:
    """Print what passed and failed and return the exit status."""
    print("\n" + "=" * 80)
    width = max(len(each.name) for each in outcomes)
    for each in outcomes:
        print(f"{each.name:<{width}}  {each.counts()}  ({each.seconds:.0f} s)")
    if left_out:
        print(left_out)
    passed = sum(each.passed for each in outcomes)
    failed = sum(each.failed for each in outcomes)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def slowest(reports: Iterable[Path], count: int = 10) -> str:
    """Say which tests took longest, and how long those of each folder or file took together."""
    tests: list[tuple[float, str]] = []
    groups: dict[str, float] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            seconds, name, owner = float(case.get("time") or 0), str(case.get("name")), str(case.get("classname"))
            is_ctest = owner == name
            group = re.sub(r"\.\d.*|\.(scalar|a[mv]x\w*)\..*", "", name) if is_ctest else owner.split(".")[2]
            tests.append((seconds, name if is_ctest else f"{group}::{name}"))
            groups[group] = groups.get(group, 0.0) + seconds
    lines = ["", "Slowest tests, seconds"]
    lines += [f"{seconds:7.1f}  {name}" for seconds, name in sorted(tests, reverse=True)[:count]]
    lines += ["Folders and files, seconds of one core"]
    lines += [f"{seconds:7.0f}  {name}" for name, seconds in sorted(groups.items(), key=lambda each: -each[1])[:count]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="release", help="CMake preset of the unit tests")
    parser.add_argument("--levels", nargs="+", help="CPU levels for pytest (all of this machine)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pytest processes")
    options, pytest_arguments = parser.parse_known_args()

    outcomes = [run_ctest(options.preset)]
    levels, left_out = (options.levels, "") if options.levels else runnable_levels()
    for level in levels:
        arguments = ["-n", str(options.jobs), *pytest_arguments]
        outcomes.append(run_pytest(level, arguments))
    print(slowest(sorted(RESULTS.glob("*.xml"))))
    return summary(outcomes, left_out)


if __name__ == "__main__":
    sys.exit(main())
