# SPDX-License-Identifier: Apache-2.0
"""Breaks the product in many ways and shows that the tests notice each.

Every mutant of mutants.py and cuda_mutants.py is built in a scratch copy of the repository, and the tests of its part
are run: at the scalar and at the best CPU level, or, for CUDA kernels, in the host harness at several schedules. The
exit status is 0 only if the tests pass without a mutant and fail with each of them. A mutant that no longer applies or
does not compile is an error too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cuda_mutants import CUDA_MUTANTS
from mutant import Mutant
from mutants import MUTANTS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
COPIED = ["CMakeLists.txt", "cmake", "csrc", "dynamic_moe", "pyproject.toml", "tests"]
TEST_SECONDS = 300  # a mutant that makes the tests hang is noticed too
# How the harness runs CUDA kernels: the seed of the order of threads, and when asynchronous copies land.
SCHEDULES = [("0", "late"), ("1", "early"), ("2", "late")]
NOTICED, SURVIVED, INVALID, SKIPPED = "noticed", "SURVIVED", "INVALID", "skipped"
STYLES = {NOTICED: "green", SURVIVED: "bold red", INVALID: "bold red", SKIPPED: "yellow"}
# cmake and ninja of this environment come before those of the system.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@dataclass
class Outcome:
    """What the tests said of a mutant."""

    mutant: Mutant
    verdict: str
    seconds: float
    detail: str


@dataclass
class Result:
    """How a command ended, and what it printed."""

    status: int
    text: str

    def first_line_with(self, *words: str) -> str:
        lines = [line.strip() for line in self.text.splitlines() if any(word in line for word in words)]
        return lines[0] if lines else f"status {self.status}"


class Workshop:
    """A scratch copy of the repository in which mutants are made, built and tested."""

    def __init__(self, root: Path, jobs: int) -> None:
        self.root = root
        self.jobs = jobs
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, root / name)
        code = "from dynamic_moe import _C; print(*_C.supported_cpu_isas(ask=True))"
        self.supported = self.output([sys.executable, "-c", code]).split()
        self.levels = list(dict.fromkeys([self.supported[0], self.supported[-1]]))
        imported = Path(self.output([sys.executable, "-c", "import dynamic_moe; print(dynamic_moe.__file__)"]).strip())
        if root not in imported.parents:
            raise SystemExit(f"the tests would import {imported}, not the copy with the mutants")

    def run(self, command: list[str], seconds: float | None = None, **environment: str) -> Result:
        """Run a command in the copy."""
        environment = os.environ | {"PATH": PATH, "PYTHONPATH": str(self.root)} | environment
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=environment,
                timeout=seconds,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(-1, f"still running after {seconds:.0f} s")
        return Result(done.returncode, done.stdout)

    def output(self, command: list[str]) -> str:
        result = self.run(command)
        if result.status:
            raise SystemExit(result.text)
        return result.text

    def build(self, sanitizer: str) -> str:
        """Return the folder of the build with a sanitizer."""
        return f"build-{sanitizer}" if sanitizer else "build"

    def configure(self, sanitizer: str) -> None:
        """Prepare a build: no level that this machine cannot run, and little optimization."""
        options = [f"-DDYNAMIC_MOE_COMPILES_{name}={int(name in self.supported)}" for name in self.all_levels()]
        options += [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
            f"-DDYNAMIC_MOE_SANITIZE={sanitizer}",
        ]
        self.output(["cmake", "-S", ".", "-B", self.build(sanitizer), "-G", "Ninja", *options])

    def all_levels(self) -> list[str]:
        """Return the levels of the table of flags, but for the plain ones that need no check."""
        lines = (self.root / "csrc/common/isa_flags.txt").read_text().splitlines()
        names = [line.split()[0] for line in lines if line and not line.startswith("#")]
        return [name for name in names if name not in ("base", "scalar")]

    def compile(self, targets: set[str], sanitizer: str) -> Result:
        build = ["cmake", "--build", self.build(sanitizer), "-j", str(self.jobs), "--target"]
        return self.run([*build, *sorted(targets)])

    def test(self, mutant: Mutant, levels: list[str]) -> Result:
        """Run the tests of a mutant's part at each of the levels, or schedules, until some fail."""
        if mutant.tests.endswith(".py"):
            options = ["-x", "-q", "-p", "no:cacheprovider"]
            command = [sys.executable, "-m", "pytest", *options, f"tests/python/{mutant.tests}"]
        else:
            folder = "cuda" if mutant.is_cuda else "cpp"
            executable = self.root / self.build(mutant.sanitizer) / "tests" / folder / mutant.target
            command = [str(executable), "--gtest_fail_fast", "--gtest_brief=1", f"--gtest_filter={mutant.only}"]
            if mutant.sanitizer and shutil.which("setarch"):  # ThreadSanitizer needs addresses where it expects them
                command = ["setarch", "-R", *command]
        if mutant.is_cuda:
            runs = [{"DYNAMIC_MOE_SIMT_SEED": seed, "DYNAMIC_MOE_SIMT_LANDING": land} for seed, land in SCHEDULES]
        else:
            runs = [{"DYNAMIC_MOE_CPU_ISA": level} for level in levels]
        result = Result(0, "")
        for environment in runs:
            result = self.run(command, TEST_SECONDS, **environment)
            if result.status:
                break
        return result

    def levels_of(self, mutant: Mutant) -> list[str]:
        """Return the levels to test a mutant at, most telling first; none where the machine cannot show it."""
        if mutant.needs not in self.supported:
            return []
        if not mutant.is_native:
            return self.levels[-1:]
        return [level for level in self.levels if self.supported.index(level) >= self.supported.index(mutant.needs)]

    def try_mutant(self, mutant: Mutant) -> Outcome:
        start = time.monotonic()
        verdict, detail = self.verdict(mutant)
        return Outcome(mutant, verdict, time.monotonic() - start, detail)

    def verdict(self, mutant: Mutant) -> tuple[str, str]:
        file = self.root / mutant.file
        original = file.read_text()
        if original.count(mutant.old) != 1:
            return INVALID, f"its line stands {original.count(mutant.old)} times in {mutant.file}"
        levels = self.levels_of(mutant)
        if not levels:
            return SKIPPED, f"needs {mutant.needs}"
        file.write_text(original.replace(mutant.old, mutant.new))
        try:
            if mutant.is_native:
                built = self.compile({mutant.target}, mutant.sanitizer)
                if built.status:
                    return INVALID, "does not compile: " + built.first_line_with("error:")
            result = self.test(mutant, levels)
        finally:
            file.write_text(original)  # newer than what was built from the mutant, so that it is built again
        if result.status == 0:
            return SURVIVED, ""
        if mutant.tests.endswith(".py") and result.status not in (1, -1):
            return INVALID, "pytest could not run: " + result.first_line_with("Error")
        signs = ("C++ exception", "WARNING: ThreadSanitizer", "[  FAILED  ]", "FAILED ", "still running")
        return NOTICED, result.first_line_with(*signs)


def select(names: list[str]) -> list[Mutant]:
    chosen = [mutant for mutant in MUTANTS + CUDA_MUTANTS if not names or any(name in mutant.what for name in names)]
    if not chosen:
        raise SystemExit(f"no mutant's description holds any of {names}")
    return chosen


def check_baseline(workshop: Workshop, mutants: list[Mutant], console: Console) -> None:
    """Build everything without a mutant; the tests must pass, or their failing would mean nothing."""
    targets: dict[str, set[str]] = {}
    for mutant in mutants:
        if mutant.is_native:
            targets.setdefault(mutant.sanitizer, set()).add(mutant.target)
    with console.status("Building and testing without a mutant") as status:
        for sanitizer, names in targets.items():
            workshop.configure(sanitizer)
            built = workshop.compile(names, sanitizer)
            if built.status:
                raise SystemExit("\n".join(built.text.splitlines()[-50:]))
        for mutant in {(each.tests, each.sanitizer, each.only): each for each in mutants}.values():
            status.update(f"Testing without a mutant: {mutant.tests} {mutant.sanitizer}")
            levels = workshop.levels[-1:] if mutant.tests.endswith(".py") else workshop.levels
            result = workshop.test(mutant, levels)
            if result.status:
                console.print(result.text, markup=False, highlight=False)
                raise SystemExit(f"{mutant.tests} fails without a mutant")


def run_all(workshop: Workshop, mutants: list[Mutant], console: Console) -> list[Outcome]:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    outcomes = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Mutants", total=len(mutants))
        for mutant in mutants:
            progress.update(task, description=f"{mutant.what:.60}")
            outcome = workshop.try_mutant(mutant)
            outcomes.append(outcome)
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{outcome.verdict}: {mutant.what} ({outcome.seconds:.0f} s)", highlight=False)
    return outcomes


def report(outcomes: list[Outcome], seconds: float, console: Console) -> int:
    table = Table(title="Mutants")
    for header in ("mutant", "verdict", "s", "first sign"):
        table.add_column(header, justify="right" if header == "s" else "left", overflow="fold")
    for outcome in outcomes:
        style = STYLES[outcome.verdict]
        verdict = f"[{style}]{outcome.verdict}[/]"
        table.add_row(outcome.mutant.what, verdict, f"{outcome.seconds:.0f}", outcome.detail.replace("[", r"\["))
    console.print(table)
    counts = {verdict: sum(each.verdict == verdict for each in outcomes) for verdict in STYLES}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), f"in {seconds:.0f} s")
    return 1 if counts[SURVIVED] or counts[INVALID] or not counts[NOTICED] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="mutants whose description holds one of these texts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument("--list", action="store_true", help="list the mutants and whether they apply")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    mutants = select(options.only)
    if options.list:
        applies = [(ROOT / mutant.file).read_text().count(mutant.old) == 1 for mutant in mutants]
        for mutant, fits in zip(mutants, applies, strict=True):
            console.print(f"{'applies' if fits else 'DOES NOT APPLY'}: {mutant.what} ({mutant.file})", highlight=False)
        return 0 if all(applies) else 1

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workshop = Workshop(Path(folder), options.jobs)
        check_baseline(workshop, mutants, console)
        outcomes = run_all(workshop, mutants, console)
    return report(outcomes, time.monotonic() - start, console)


if __name__ == "__main__":
    sys.exit(main())
