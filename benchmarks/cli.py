# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: measure, print, write."""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.cases import Case, all_cases
from benchmarks.ceilings import Ceilings
from benchmarks.compile import BUILD_FOLDER
from benchmarks.machine import describe_machine
from benchmarks.measure import Plan, WorkerPool, measure_case
from benchmarks.report import RESULTS, write_report
from benchmarks.results import CaseResult, Results
from benchmarks.targets import judge

FULL = Plan(rounds=9, seconds=60, least_rounds=5, most_rounds=27)
QUICK = Plan(rounds=2, seconds=5, least_rounds=2, most_rounds=2)


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some cases, two rounds: to see that it works")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches, such as 'experts/A/*' or 'gating'")
    parser.add_argument("--peers", metavar="NAMES", help="names divided by ';' (beside dynamic_moe), or none")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: 2")
    parser.add_argument("--rounds", type=int, help=f"undisturbed rounds for each case, default {FULL.rounds}")
    parser.add_argument("--seconds", type=float, help=f"time for each case, default {FULL.seconds:g}")
    parser.add_argument("--output", type=Path, help="folder of the results; default for a full run: benchmarks/results")
    parser.add_argument("--merge", action="store_true", help="keep the results of cases that are not measured now")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log file is not 80 columns wide
    cases = choose_cases(arguments.only, arguments.quick)
    if arguments.list:
        console.print("\n".join(case.name for case in cases), markup=False, highlight=False)
        return
    if not cases:
        raise SystemExit(f"no case matches {arguments.only!r}; --list prints them")
    pool = WorkerPool(arguments.threads)
    try:
        results = run(cases, pool, make_plan(arguments), wanted_peers(arguments.peers), console)
    finally:
        pool.stop()
    folder = output_folder(arguments)
    if arguments.merge and (folder / "latest.json").exists():
        results.merge(Results.read(folder / "latest.json"))
        results.cases.sort(key=lambda result: [case.name for case in all_cases()].index(result.case))
    write_report(results, folder)
    print_targets(results, console)
    console.print(f"Written to {os.path.relpath(folder)}.", highlight=False)


def choose_cases(pattern: str | None, quick: bool) -> list[Case]:
    """Cases by pattern; a pattern without ``*`` may stand anywhere in the name."""
    cases = [case for case in all_cases() if case.quick or not quick]
    if pattern is None:
        return cases
    wildcard = pattern if "*" in pattern else f"*{pattern}*"
    return [case for case in all_cases() if fnmatch.fnmatch(case.name, wildcard)]


def wanted_peers(names: str | None) -> set[str] | None:
    """Names of ``--peers``, with this library added; None for all."""
    if names is None:
        return None
    chosen = set() if names == "none" else {name.strip() for name in names.split(";")}
    return chosen | {"dynamic_moe", "dynamic_moe, prepacked"}


def make_plan(arguments: argparse.Namespace) -> Plan:
    """How long to measure."""
    plan = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or plan.rounds
    most_rounds = rounds * plan.most_rounds // plan.rounds
    return Plan(rounds, arguments.seconds or plan.seconds, min(plan.least_rounds, rounds), most_rounds)


def output_folder(arguments: argparse.Namespace) -> Path:
    """A run of some cases must not replace the results of all."""
    if arguments.output:
        return Path(arguments.output)
    is_partial = arguments.quick or arguments.only or arguments.peers
    return RESULTS if arguments.merge or not is_partial else BUILD_FOLDER / "partial"


def run(cases: list[Case], pool: WorkerPool, plan: Plan, wanted: set[str] | None, console: Console) -> Results:
    """Measure the ceilings, then every case; print each as it is done."""
    results = measure_machine(pool)
    for ceilings in results.ceilings:
        console.print(describe_ceilings(ceilings), highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            name = case.name

            def tell(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            result = try_case(case, pool, plan, wanted, tell, console)
            progress.advance(task)
            if result is None:
                continue
            results.cases.append(result)
            results.write(BUILD_FOLDER / "unfinished.json")
            print_case(result, console)
    return results


def try_case(
    case: Case, pool: WorkerPool, plan: Plan, wanted: set[str] | None, tell: Callable[[str], None], console: Console
) -> CaseResult | None:
    """Measure a case; once more in new workers if that fails, as memory that earlier cases left may have been missing.

    None if it fails again: one case must not cost the half hour before it.
    """
    for last in (False, True):
        try:
            return measure_case(case, pool, plan, wanted, tell)
        except RuntimeError as error:
            then = "" if last else "; trying again in new workers"
            console.print(f"{case.name} failed: {error}{then}", style="red", highlight=False, markup=False)
            pool.stop()
    return None


def measure_machine(pool: WorkerPool) -> Results:
    """The ceilings with one thread and with all, as medians of five."""
    worker = pool["warm"]
    counts = sorted({1, pool.threads})
    return Results(
        machine=describe_machine(pool.threads),
        ceilings=[median_ceilings([worker.ceilings(threads) for _ in range(5)]) for threads in counts],
        cache_read={str(threads): worker.cache_read(threads) for threads in counts},
        allocators={name: setting.allocator for name, setting in pool.settings.items()},
    )


def median_ceilings(samples: list[Ceilings]) -> Ceilings:
    """Field by field."""
    names = [field.name for field in fields(Ceilings) if field.name != "threads"]
    medians = {name: statistics.median(getattr(sample, name) for sample in samples) for name in names}
    return Ceilings(threads=samples[0].threads, **medians)


def describe_ceilings(ceilings: Ceilings) -> str:
    """One line."""
    return (
        f"Ceilings, {ceilings.threads} thread(s): float32 {ceilings.float32_flops / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {ceilings.bfloat16_flops / 1e9:.0f} GFLOP/s, read {ceilings.read_bandwidth / 1e9:.1f} GB/s, "
        f"copy {ceilings.copy_bandwidth / 1e9:.1f} GB/s"
    )


def print_case(result: CaseResult, console: Console) -> None:
    """The rows of a case, the fastest first."""
    if result.kind == "memory":
        for row in result.rows:
            ratio = (row.value or 0) / result.facts["least"]
            console.print(f"{result.case}: {row.subject} keeps {ratio:.2f} of the least", highlight=False)
        return
    grid = Table(title=result.case, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "median ms", "quartiles", "of the ceiling"):
        grid.add_column(heading, justify="left" if not heading else "right")
    for row in sorted(result.rows, key=lambda row: result.spread(row).median):
        spread = result.spread(row)
        quartiles = f"{1e3 * spread.lower:.4g} to {1e3 * spread.upper:.4g}"
        style = "bold" if row.is_ours else ""
        grid.add_row(row.title, f"{1e3 * spread.median:.4g}", quartiles, f"{result.fraction(row):.2f}", style=style)
    console.print(grid)
    for peer, reason in result.absent.items():
        console.print(f"  {peer}: {reason}", style="dim", highlight=False)
    if result.disturbed:
        taken = 100 * max(result.others)
        console.print(f"  disturbed: other programs took up to {taken:.0f}% of the CPU", style="yellow")
    console.print()


def print_targets(results: Results, console: Console) -> None:
    """Target, reached, lead over the best peer."""
    grid = Table(title="Targets", title_justify="left", box=None, pad_edge=False)
    for heading in ("work", "dtype", "target", "reached", "", "over best peer", "which is"):
        grid.add_column(heading)
    verdicts = [verdict for verdict in judge(results) if verdict.reached is not None]
    for verdict in verdicts:
        target = verdict.target
        dtype = "" if target.case.startswith("gating") else target.case.rsplit("/", 1)[-1]
        word = "[green]met" if verdict.is_met else "[red]not met"
        word += "" if verdict.is_ahead else "[red], behind"
        lead = f"{verdict.lead:.2f}" if verdict.lead else ""
        sign = "≥" if target.is_floor else "≤"
        bound, reached = f"{sign} {target.bound:g}", f"{verdict.reached or 0:.3f}"
        grid.add_row(target.work, dtype, bound, reached, word, lead, verdict.best_peer)
    if verdicts:
        console.print(grid)
