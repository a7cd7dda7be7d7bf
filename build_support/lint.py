# SPDX-License-Identifier: Apache-2.0
"""Runs every linter and says which found something: ruff, mypy, clang-format, clang-tidy.

``--fix`` lets ruff and clang-format rewrite the files instead. Versions are pinned in ``requirements/lint.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "lint"
CSRC = ROOT / "csrc"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def main() -> int:
    """Run the linters in turn; return 0 if none found anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="rewrite the files where a tool can")
    options = parser.parse_args()
    sources = [str(path.relative_to(ROOT)) for path in cpp_files()]
    if options.fix:
        return max(
            run(["ruff", "check", "--fix", "."]),
            run(["ruff", "format", "."]),
            run(["clang-format", "-i", *sources]),
        )
    failed = [
        name
        for name, check in {
            "ruff check": lambda: run(["ruff", "check", "."]),
            "ruff format": lambda: run(["ruff", "format", "--check", "."]),
            "mypy": lambda: run(["mypy"]),
            "clang-format": lambda: run(["clang-format", "--dry-run", "-Werror", *sources]),
            "clang-tidy": clang_tidy,
        }.items()
        if timed(name, check)
    ]
    print(f"lint: {', '.join(failed)} failed" if failed else "lint: all clean")
    return 1 if failed else 0


def timed(name: str, check: Callable[[], int]) -> int:
    """Run a check, print how long it took, and return its status."""
    start = time.monotonic()
    status = check()
    print(f"{name}: {'failed' if status else 'clean'} ({time.monotonic() - start:.0f} s)\n", flush=True)
    return status


def run(command: list[str], *, quiet: bool = False) -> int:
    """Run a command in the repository; `quiet` shows its output only if it failed."""
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=quiet, text=True, check=False)
    if quiet and result.returncode:
        print(result.stdout, result.stderr, sep="\n", flush=True)
    return result.returncode


def cpp_files() -> list[Path]:
    """Return the C++ and CUDA files of the repository."""
    folders = [ROOT / name for name in ("benchmarks", "cmake", "csrc", "tests")]
    return sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"}
    )


def clang_tidy() -> int:
    """Check the kernels as CMake compiles them, then the bindings as setup.py does; headers come with them.

    Not the unit tests: GoogleTest's macros take the analyzer a minute a file. Nor the CUDA kernels, which `make
    cuda-check` looks at.
    """
    if run(["cmake", "--preset", "release", "-B", str(BUILD), "-DDYNAMIC_MOE_BUILD_TESTS=OFF"], quiet=True):
        return 1
    database = json.loads((BUILD / "compile_commands.json").read_text())
    files = sorted(entry["file"] for entry in database)
    kernels = [path for path in files if Path(path).is_relative_to(CSRC) and path.endswith(".cpp")]
    commands = [["clang-tidy", "--quiet", "-p", str(BUILD), path] for path in kernels]
    commands += [
        ["clang-tidy", "--quiet", str(path), "--", *binding_flags()]
        for path in sorted((CSRC / "bindings").glob("*.cpp"))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(lambda command: run(command, quiet=True), commands), default=0)


def binding_flags() -> list[str]:
    """Return what compiles a file of csrc/bindings; headers of others are system headers, hence not checked."""
    import pybind11

    torch = Path(util.find_spec("torch").origin).parent
    folders = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
    folders += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020d000000000000", '-DDYNAMIC_MOE_VERSION="lint"']
    flags.append('-DDYNAMIC_MOE_CUDA_TOOLKIT="lint"')  # so that the operators of CUDA are looked at too
    return [*flags, f"-I{CSRC}", *(part for folder in folders for part in ("-isystem", str(folder)))]


if __name__ == "__main__":
    sys.exit(main())
