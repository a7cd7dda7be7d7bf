# SPDX-License-Identifier: Apache-2.0
"""Markdown from results, and its place in the README.

``python -m benchmarks.report`` renders ``benchmarks/results/latest.json`` again: tables, figures, and with ``--readme``
the block between the markers ``<!-- benchmark:begin -->`` and ``<!-- benchmark:end -->`` of the README.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from benchmarks.cases import DTYPES
from benchmarks.compile import HERE
from benchmarks.results import CaseResult, Results, Row
from benchmarks.shapes import SHAPES
from benchmarks.targets import Verdict, judge

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
RESULTS = HERE / "results"
# Rows of the README: many tokens, with and without backward, and few tokens where peers are furthest ahead.
README_WORKS = (
    "A/T4096/forward",
    "A/T4096/forward+backward",
    "B/T2048/forward",
    "B/T2048/forward+backward",
    "A/T1/forward",
    "B/T64/forward",
)
README = HERE.parent / "README.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def machine_line(results: Results) -> str:
    """One sentence: on what, when, from which commit."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "dynamic_moe")
    return (
        f"{machine['cpu']} (family {machine['cpu_family']}, model {machine['cpu_model_number']}), {machine['threads']} "
        f"threads of {machine['cores']} cores, {machine['memory_gib']} GiB; {versions}; {machine['date']}, commit "
        f"{machine['commit']}."
    )


def ceilings_table(results: Results) -> str:
    """What the machine can do."""
    rows = []
    for ceilings in results.ceilings:
        cache_read = results.cache_read[str(ceilings.threads)]
        rates = (ceilings.float32_flops, ceilings.bfloat16_flops, ceilings.read_bandwidth, ceilings.copy_bandwidth)
        rows.append([str(ceilings.threads), *(f"{rate / 1e9:.0f}" for rate in (*rates, cache_read))])
    header = ["threads", "float32 FMA, GFLOP/s", "bfloat16 dot, GFLOP/s", "read, GB/s", "copy, GB/s", "read L3, GB/s"]
    return table(header, rows)


def targets_table(verdicts: list[Verdict]) -> str:
    """Target, reached, and the best peer."""
    header = ["work", "dtype", "target", "reached", "", "times faster than the best peer", "which is"]
    return table(header, [_target_cells(verdict) for verdict in verdicts])


def _target_cells(verdict: Verdict) -> list[str]:
    target = verdict.target
    sign = "≥" if target.is_floor else "≤"
    if verdict.reached is None:
        return [target.work, _dtype(target.case), f"{sign} {target.bound:g}", "not measured", "", "", ""]
    met = "met" if verdict.is_met else "**not met**"
    if not verdict.is_ahead:
        met += ", **behind**"
    lead = f"{verdict.lead:.2f}" if verdict.lead else ""
    reached = f"{verdict.reached:.3f}" + (" (prepacked)" if verdict.subject.endswith("prepacked") else "")
    return [target.work, _dtype(target.case), f"{sign} {target.bound:g}", reached, met, lead, verdict.best_peer]


def _dtype(case: str) -> str:
    last = case.rsplit("/", 1)[-1]
    return last if last in ("float32", "bfloat16") else "float32"


def case_section(result: CaseResult) -> str:
    """All rows of a case."""
    lines = [f"### {result.case}", ""]
    if result.kind == "memory":
        header = ["", "MB kept", "over the least"]
        least = result.facts["least"]
        kept = [(row.subject, row.value or 0) for row in result.rows]
        rows = [[name, f"{count / 1e6:.1f}", f"{count / least:.2f}"] for name, count in kept]
    else:
        bound = result.bound_name(result.rows[0].cost) if result.rows else ""
        header = ["", "median, ms", "quartiles, ms", "GFLOP/s", "GB/s", f"of the {bound}"]
        ranked = sorted(result.rows, key=lambda row: result.spread(row).median)
        rows = [_row_cells(result, row) for row in ranked]
    lines += [table(header, rows), ""]
    lines += [f"- {peer}: {reason}" for peer, reason in result.absent.items()]
    if result.disturbed:
        taken = 100 * max(result.others[index] for index in result.quiet_rounds())
        lines += [f"- Disturbed: other programs took up to {taken:.0f}% of the CPU time. Not to be quoted."]
    return "\n".join(lines).rstrip() + "\n"


def _row_cells(result: CaseResult, row: Row) -> list[str]:
    spread = result.spread(row)
    name = f"**{row.title}**" if row.is_ours else row.title
    flops = f"{row.cost.flops / spread.median / 1e9:.0f}" if row.cost.flops else ""
    return [
        name,
        f"{1e3 * spread.median:.4g}",
        f"{1e3 * spread.lower:.4g} to {1e3 * spread.upper:.4g}",
        flops,
        f"{row.cost.bytes / spread.median / 1e9:.1f}",
        f"{result.fraction(row):.2f}",
    ]


def full_report(results: Results) -> str:
    """Everything, as ``latest.md``."""
    verdicts = judge(results)
    measured = [verdict for verdict in verdicts if verdict.reached is not None]
    met = sum(verdict.is_met and verdict.is_ahead for verdict in measured)
    sections = [
        "# Benchmark results",
        "Written by `make bench`; do not edit. What is measured, and how: `benchmarks/README.md`.",
        machine_line(results),
        "Allocators: " + "; ".join(f"{name}: {what}" for name, what in results.allocators.items()) + ".",
        "Shapes: " + "; ".join(f"{name}: {shape.describe()}" for name, shape in SHAPES.items()) + ".",
        "## Ceilings",
        ceilings_table(results),
        f"## Targets\n\n{met} of {len(measured)} measured targets are met and ahead of every peer.",
        targets_table(verdicts),
        _gating_sentence(results),
        "![Fraction of the ceiling](experts.svg)",
        "![Gating](gating.svg)",
        "## All rows",
        *(case_section(result) for result in results.cases),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def readme_block(results: Results) -> str:
    """The short table of the README, the expert pass by us and by the best other; then the machine."""
    rows = []
    for work in README_WORKS:
        cells = [_readme_cells(results.case(f"experts/{work}/{dtype}")) for dtype in DTYPES]
        rows.append([work.replace("/", ", ").replace("+", " + "), *(cell for group in cells for cell in group)])
    header = ["", *(name for dtype in DTYPES for name in (f"{dtype}, ms", "of the ceiling", "over the best other"))]
    machine = textwrap.fill(machine_line(results), 120, break_long_words=False, break_on_hyphens=False)
    return f"{table(header, rows)}\n\n{machine}"


def _readme_cells(result: CaseResult | None) -> list[str]:
    """Milliseconds, fraction of the ceiling, and how many times faster than whom; empty if it was not measured."""
    if result is None or (ours := result.best(ours=True)) is None:
        return ["", "", ""]
    peer = result.best(ours=False)
    seconds = result.spread(ours).median
    lead = f"{result.spread(peer).median / seconds:.2f} ({peer.title})" if peer else ""
    milliseconds = 1e3 * seconds
    shown = f"{milliseconds:.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"
    return [shown, f"{result.fraction(ours):.2f}", lead]


def _gating_sentence(results: Results) -> str:
    """How many times faster than PyTorch gating is."""
    leads = []
    for result in results.cases:
        ours, peer = result.best(ours=True), result.best(ours=False)
        if result.kind == "gating" and result.passes == "forward" and ours and peer:
            lead = result.spread(peer).median / result.spread(ours).median
            leads.append(f"{lead:.0f} with {result.case.split('/')[1].removeprefix('E')} experts")
    return f"Gating with its statistics, times faster than in PyTorch: {', '.join(leads)}." if leads else ""


def update_readme(results: Results, readme: Path = README) -> None:
    """Replace what is between the markers.

    Raises
    ------
    ValueError
        If the markers are not there, once each and in order.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{readme.name} must have the markers {BEGIN} and {END} once each, in this order")
    readme.write_text(f"{before}{BEGIN}\n{readme_block(results)}\n{END}{after}")


def write_report(results: Results, folder: Path) -> None:
    """Write JSON, Markdown and figures."""
    from benchmarks.plot import plot_all

    results.write(folder / "latest.json")
    (folder / "latest.md").write_text(full_report(results))
    plot_all(results, folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Render results again.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with latest.json")
    parser.add_argument("--readme", action="store_true", help="also replace the block in README.md")
    arguments = parser.parse_args()
    results = Results.read(arguments.results / "latest.json")
    write_report(results, arguments.results)
    if arguments.readme:
        update_readme(results)


if __name__ == "__main__":
    main()
