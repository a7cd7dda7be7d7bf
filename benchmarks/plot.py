# SPDX-License-Identifier: Apache-2.0
"""Figures of the results: how much of the ceiling everybody reaches, and gating by number of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import CaseResult, Results, Row
from benchmarks.targets import load_targets

# Okabe and Ito's colors, which color-blind readers can tell apart; this library is the dark one.
STYLES = {
    "dynamic_moe": ("#000000", "D"),
    "dynamic_moe, prepacked": ("#555555", "d"),
    "Python loop over experts": ("#E69F00", "o"),
    "Hugging Face eager": ("#F0C040", "v"),
    "Hugging Face grouped_mm": ("#D55E00", "^"),
    "F.grouped_mm composition": ("#CC79A7", "s"),
    "vLLM": ("#0072B2", "o"),
    "SGLang": ("#56B4E9", "s"),
    "zentorch": ("#009E73", "^"),
    "kt-kernel": ("#7F5AB6", "v"),
}
DTYPES = ("float32", "bfloat16")


def plot_all(results: Results, folder: Path) -> None:
    """Write every figure that the results have data for, as PNG and SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "dynamic_moe", "svg.fonttype": "none", "axes.axisbelow": True})
    experts = [result for result in results.cases if result.kind == "experts" and result.rows]
    if experts:
        _save(_plot_experts(experts, results), folder / "experts")
    gating = [result for result in results.cases if result.kind == "gating"]
    if gating:
        _save(_plot_gating(gating), folder / "gating")


def _plot_experts(cases: list[CaseResult], results: Results) -> Any:
    """One panel per dtype, one line per case, one mark per subject; a bar where the target is."""
    from matplotlib import pyplot

    works = list(dict.fromkeys(_work(result) for result in cases))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.36 * len(works)), sharey=True, layout="constrained")
    targets = {target.case: target.bound for target in load_targets() if target.measure == "fraction"}
    for axes, dtype in zip(panels, DTYPES, strict=True):
        for result in cases:
            if result.dtype == dtype:
                height = works.index(_work(result))
                _plot_case(axes, result, height, targets.get(result.case))
        axes.set(title=dtype, xlim=(0, 1), xlabel="fraction of the roofline")
        axes.set_yticks(range(len(works)), labels=works)
        axes.grid(color="#DDDDDD", linewidth=0.6)
    panels[0].invert_yaxis()
    _legend(figure, panels)
    figure.suptitle(f"Expert pass on {results.machine['cpu']}, {results.machine['threads']} threads")
    return figure


def _plot_case(axes: Any, result: CaseResult, height: int, target: float | None) -> None:
    best: dict[str, Row] = {}
    for row in result.rows:
        if row.subject not in best or result.fraction(row) > result.fraction(best[row.subject]):
            best[row.subject] = row
    for subject, row in reversed(best.items()):
        color, marker = STYLES.get(subject, ("#999999", "x"))
        size = 8 if row.is_ours else 5.5
        axes.plot(result.fraction(row), height, marker, color=color, markersize=size, label=subject, linestyle="none")
    if target is not None:
        axes.plot([target, target], [height - 0.38, height + 0.38], color="#C00000", linewidth=1.6, label="target")


def _legend(figure: Any, panels: Any) -> None:
    marks: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, handle)
    order = [name for name in (*STYLES, "target") if name in marks]
    handles = [marks[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _work(result: CaseResult) -> str:
    _, letter, tokens, passes, _ = result.case.split("/")
    return f"{letter}, T {tokens[1:]}, {passes.replace('+', ' + ')}"


def _plot_gating(cases: list[CaseResult]) -> Any:
    """Nanoseconds per token over the number of experts."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, passes in zip(panels, ("forward", "forward+backward"), strict=True):
        chosen = [result for result in cases if result.passes == passes]
        for subject in dict.fromkeys(row.subject for result in chosen for row in result.rows):
            _plot_gate(axes, chosen, subject)
        axes.set(title=passes.replace("+", " + "), xlabel="experts", xscale="log", yscale="log")
        axes.set_xticks(experts := [_experts(result) for result in chosen], labels=map(str, experts), minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("nanoseconds per token, T = 16384")
    figure.suptitle("Top-p gating with its statistics")
    return figure


def _plot_gate(axes: Any, cases: list[CaseResult], subject: str) -> None:
    times = [1e9 * result.spread(result.row(subject)).median / 16384 for result in cases]
    color, marker = STYLES.get(subject, ("#D55E00", "o"))
    axes.plot([_experts(result) for result in cases], times, marker=marker, color=color, label=subject)


def _experts(result: CaseResult) -> int:
    return int(result.case.split("/")[1].removeprefix("E"))


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".png"), dpi=130)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
