# SPDX-License-Identifier: Apache-2.0
"""The plots of the page, as SVG: the same results give the same files, byte for byte, with one matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from reproduce import analysis, published
from reproduce.analysis import Comparison, Result, mean, task_correct, task_experts
from reproduce.measure import TEXT
from reproduce.plan import DENSE, DYNAMIC, PAPER_P, TOP_1, TOP_2, VARIANTS, WITHOUT_LOSS, Variant
from reproduce.tasks import TASKS

# Okabe and Ito's colors, which color-blind readers can tell apart.
STYLES = {
    DENSE.name: ("#999999", "-"),
    TOP_1.name: ("#E69F00", "-"),
    TOP_2.name: ("#0072B2", "-"),
    DYNAMIC.name: ("#000000", "-"),
    WITHOUT_LOSS.name: ("#CC79A7", "--"),
}
PUBLISHED = "#D55E00"
ROUTED = (DYNAMIC, WITHOUT_LOSS)


def plot_all(comparison: Comparison, folder: Path) -> None:
    """Write every plot into a folder."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "dynamic_moe", "axes.axisbelow": True})
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in {
        "loss": _plot_loss,
        "training": _plot_training,
        "tasks": _plot_tasks,
        "layers": _plot_layers,
        "sweep": _plot_sweep,
    }.items():
        figure = draw(comparison)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _plot_loss(comparison: Comparison) -> Any:
    """Validation loss over tokens, each variant a line."""
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for variant in VARIANTS:
        _band(axes, comparison, variant, lambda row: float(row))
    axes.set(xlabel="training bytes, in thousands", ylabel="validation loss, bits per byte", yscale="log")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.1f"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.set_yticks([1.5, 2.0, 3.0, 4.0])
    _finish(axes)
    return figure


def _band(axes: Any, comparison: Comparison, variant: Variant, value: Any, column: str = "validation_bits") -> None:
    """Draw the mean over seeds, and the range of the seeds as a band."""
    results = comparison.of(variant)
    if not results:
        return
    thousands = [step * _bytes_per_step(results[0]) / 1e3 for step in results[0]["history"]["step"]]
    curves = [[value(row) for row in result["history"][column]] for result in results]
    color, dashes = STYLES[variant.name]
    columns = list(zip(*curves, strict=True))
    axes.plot(thousands, [mean(each) for each in columns], dashes, color=color, label=variant.label)
    axes.fill_between(
        thousands,
        [min(each) for each in columns],
        [max(each) for each in columns],
        color=color,
        alpha=0.15,
        linewidth=0,
    )


def _bytes_per_step(result: Result) -> int:
    return int(result["tokens"]) // int(result["steps"])


def _plot_training(comparison: Comparison) -> Any:
    """Experts over training, beside the published ones; two panels, as the scales have nothing in common."""
    figure, (ours, theirs) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for variant in ROUTED:
        _band(ours, comparison, variant, mean, "train_experts")
    ours.axhline(2, color=STYLES[TOP_2.name][0], linewidth=0.8)
    ours.set(title="here", xlabel="training bytes, in thousands", ylabel="experts per token and layer")
    ours.set_ylim(bottom=0)
    _finish(ours)
    billions, experts = zip(*published.TRAINING, strict=True)
    theirs.plot(billions, experts, "o-", color=PUBLISHED)
    theirs.axhline(2, color=STYLES[TOP_2.name][0], linewidth=0.8)
    theirs.set(title="published, not reproduced", xlabel="training tokens, in billions", ylim=(0, 3))
    theirs.grid(color="#DDDDDD", linewidth=0.6)
    return figure


def _plot_tasks(comparison: Comparison) -> Any:
    """Experts by task, and the share of right answers, of the routed variants; an interval is a bar."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    names = [*(task.name for task in TASKS), TEXT]
    for shift, variant in zip((-0.14, 0.14), ROUTED, strict=True):
        if comparison.of(variant):
            for axes, figure_of in zip(panels, (task_experts, task_correct), strict=True):
                _points(axes, comparison, variant, [figure_of(name) for name in names], shift)
    for height, task in enumerate(TASKS):
        panels[1].plot([task.chance] * 2, [height - 0.35, height + 0.35], color="#D55E00", linewidth=1.4)
    panels[0].set_yticks(range(len(names)), labels=names)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("experts per token and layer at the answers")
    panels[1].set(xlabel="share of right bytes (orange: the best constant guess)", xlim=(0, 1.02))
    for axes in panels:
        axes.grid(color="#DDDDDD", linewidth=0.6)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _points(axes: Any, comparison: Comparison, variant: Variant, figures: Sequence[Any], shift: float) -> None:
    intervals = [comparison.interval(variant, each) for each in figures]
    halves = [0.0 if math.isnan(each.half) else each.half for each in intervals]
    heights = [index + shift for index in range(len(figures))]
    color, _ = STYLES[variant.name]
    means = [each.mean for each in intervals]
    axes.errorbar(means, heights, xerr=halves, fmt="o", color=color, markersize=4, capsize=2, label=variant.label)


def _plot_layers(comparison: Comparison) -> Any:
    """Experts by layer."""
    figure, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    for variant in ROUTED:
        results = comparison.of(variant)
        if results:
            count = results[0]["parameters"]["layers"]
            intervals = [comparison.interval(variant, analysis.layer_experts(layer)) for layer in range(count)]
            halves = [0.0 if math.isnan(each.half) else each.half for each in intervals]
            color, dashes = STYLES[variant.name]
            axes.errorbar(
                range(1, count + 1),
                [each.mean for each in intervals],
                yerr=halves,
                fmt=f"o{dashes}",
                color=color,
                capsize=2,
                label=variant.label,
            )
            axes.set_xticks(range(1, count + 1))
    axes.set(xlabel="layer", ylabel="experts per token")
    axes.set_ylim(bottom=0)
    _finish(axes)
    return figure


def _plot_sweep(comparison: Comparison) -> Any:
    """Loss against experts per token, a point for each threshold, with top-1 and top-2 of the same seed."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    results = comparison.sweep()
    color, _ = STYLES[DYNAMIC.name]
    places = [(analysis.experts(each), analysis.validation_bits(each)) for each in results]
    axes.plot(*zip(*places, strict=True), "o-", color=color, label=DYNAMIC.label)
    for result, place in zip(results, places, strict=True):
        note = f"p = {result['top_p']:g}" + (" (the paper's)" if result["top_p"] == PAPER_P else "")
        axes.annotate(note, place, (4, 5), textcoords="offset points", fontsize=8)
    for variant in (TOP_1, TOP_2):
        same_seed = [each for each in comparison.of(variant) if each["seed"] == results[0]["seed"]]
        for result in same_seed:
            place = (analysis.experts(result), analysis.validation_bits(result))
            axes.plot(*place, "s", color=STYLES[variant.name][0], label=variant.label)
    axes.set(xlabel="experts per token and layer", ylabel="validation loss, bits per byte")
    axes.set_xlim(left=0)
    _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
