# SPDX-License-Identifier: Apache-2.0
"""Check what has changed since the last commit (without a change: what that commit changed), in under a minute.

Linters on the changed files; what has to be compiled again, and the C++ tests of the changed folders at the best CPU
level and one schedule; the Python tests that took less than 0.3 s at the last ``make test``, and all tests in changed
test files. ``make test`` and ``make lint`` remain what decides.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from run_all import RESULTS, ROOT, run, runnable_levels

CPP = {".cpp", ".cu", ".cuh", ".h"}
FAST = 0.3  # seconds: together 40 s on one core
SHARED = ("csrc/common/", "tests/cpp/support/", "tests/cuda/support/", "tests/simt/", "cmake/", "CMake")
BUILDS = ("csrc/", "build_support/", "setup.py")


def changed_files() -> list[str]:
    """Return the changed files that are still there, relative to the root."""

    def git(*arguments: str) -> list[str]:
        output = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return output.splitlines()

    files = git("diff", "--name-only", "HEAD") + git("ls-files", "--others", "--exclude-standard")
    files = files or git("diff", "--name-only", "HEAD~1")
    return sorted(file for file in files if (ROOT / file).exists())


def commands(files: Sequence[str], folders: Iterable[str], level: str) -> dict[str, list[str]]:
    """Return what is to be run for changed files, by name. `folders`: those of the C++ tests."""
    python = [file for file in files if file.endswith(".py")]
    cpp = [file for file in files if Path(file).suffix in CPP]
    steps: dict[str, list[str]] = {}
    if python:
        steps["ruff"] = ["ruff", "check", *python]
        steps["ruff format"] = ["ruff", "format", "--check", *python]
        steps["mypy"] = ["mypy"]
    if cpp:
        steps["clang-format"] = ["clang-format", "--dry-run", "-Werror", *cpp]
    if any(file.startswith(BUILDS) for file in files):
        steps["the extension"] = [sys.executable, "setup.py", "build_ext", "--inplace"]
    parts = {part for file in files for part in Path(file).parts[1:-1]}
    tested = [name for name in folders if name in parts or any(file.startswith(SHARED) for file in files)]
    if tested:
        targets = [f"{name}{kind}" for name in tested for kind in ("_test", "_simt_test")]
        existing = [target for target in targets if (ROOT / target_folder(target)).is_dir()]
        names = "|".join(tested)
        steps["the C++ tests"] = ["cmake", "--build", "--preset", "release", "--target", *existing]
        steps["ctest"] = ["ctest", "--preset", "release", "-R", rf"^({names})\.{level}\.|^cuda\.({names})\.0-late\."]
    if python or "the extension" in steps:
        steps["pytest"] = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--faster-than={FAST}"]
    return steps


def target_folder(target: str) -> str:
    """Return where the sources of a test program are."""
    name = target.removesuffix("_test")
    return f"tests/cuda/{name.removesuffix('_simt')}" if name.endswith("_simt") else f"tests/cpp/{name}"


def main() -> int:
    if not (RESULTS / "ctest.xml").exists():
        sys.exit("make check needs what a `make test` leaves behind: objects, and how long each test took")
    files = changed_files()
    folders = [path.name for path in sorted((ROOT / "csrc").iterdir()) if (ROOT / "tests" / "cpp" / path.name).is_dir()]
    level = runnable_levels()[0][0]
    steps = commands(files, folders, level)
    print(f"{len(files)} files changed: " + (", ".join(steps) or "nothing to run"))
    failed, times = [], []
    for name, command in steps.items():
        start = time.monotonic()
        if run(command, {"DYNAMIC_MOE_CPU_ISA": level}, without=r"^\s*Start\s+\d+: |\sPassed\s+[\d.]+ sec$"):
            failed.append(name)
        times.append(f"{name} {time.monotonic() - start:.0f} s")
    print("\n" + ", ".join(times))
    print(f"check: {', '.join(failed)} failed" if failed else "check: all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
