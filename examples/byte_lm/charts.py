# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, drawn in the colors of the page's theme (see report.css)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from byte_lm.colors import level_of

MOST_POINTS = 240  # of a line; more would only make the page larger


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes
    ----------
    label : str
        Its name; written at its end unless it is faint.
    x, y : sequence of float
        Its points.
    color : str
        A CSS color, such as a variable of the theme.
    style : {"line", "bold", "faint", "points"}
        How it is drawn.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: str = "line"


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.0
        return self.start + (self.end - self.start) * part


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log: bool = False, width: int = 560
) -> str:
    """Draw lines over a common x, each named at its end; report.js adds the values under the pointer.

    Parameters
    ----------
    title : str
        What the chart shows, for those who cannot see it.
    log : bool
        Whether y is logarithmic; its values must be positive then.
    """
    height, left, right, top, bottom = 300, 56, 92, 14, 40
    series = [thinned(each) for each in series if len(each.x)]
    xs = [value for each in series for value in each.x]
    ys = [value for each in series for value in each.y]
    x_ticks = ticks(min(0.0, *xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_axis = Axis(min(0.0, *xs), max(max(xs), 1e-9), left, width - right)
    y_axis = Axis(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), height - bottom, top, log)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'data-x="{x_axis.low},{x_axis.high},{x_axis.start},{x_axis.end}" '
        f'data-y="{y_axis.low},{y_axis.high},{y_axis.start},{y_axis.end},{int(log)}" data-x-label="{escape(x_label)}">'
    ]
    for value in y_ticks:
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        place = f'x="{x_axis(value):.1f}" y="{height - bottom + 18}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(11 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    parts += [_line(each, x_axis, y_axis) for each in series]
    named = [each for each in series if each.style != "faint"]
    places = apart([y_axis(each.y[-1]) for each in named], 15, top, height - bottom)
    for each, y in zip(named, places, strict=True):
        parts.append(
            f'<text class="name" x="{x_axis(each.x[-1]) + 9:.1f}" y="{y + 4:.1f}" '
            f'style="fill:{each.color}">{escape(each.label)}</text>'
        )
    parts.append('<line class="cursor" y1="0" y2="0" hidden=""/></svg>')
    return "\n".join(parts)


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[float], str]], levels: Sequence[int], *, title: str, width: int = 560
) -> str:
    """Draw a bar of colored shares for each (name, shares, note); share i has step ``levels[i]`` of the color scale."""
    bar, gap, left, right, top = 24, 10, 62, 92, 4
    height = top + len(rows) * (bar + gap)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for index, (name, shares, note) in enumerate(rows):
        y = top + index * (bar + gap)
        middle = y + bar / 2 + 4
        parts.append(f'<text class="tick" x="{left - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        x = float(left)
        for level, share in zip(levels, shares, strict=True):
            span = share * (width - left - right)
            if span > 0:
                parts.append(
                    f'<rect class="fill{level}" x="{x:.2f}" y="{y}" width="{span:.2f}" height="{bar}">'
                    f"<title>{escape(name)}: {share:.1%} of the bytes</title></rect>"
                )
            if span > 34:
                place = f'x="{x + span / 2:.1f}" y="{middle}"'
                parts.append(f'<text class="ink{level}" {place} text-anchor="middle">{share:.0%}</text>')
            x += span
        parts.append(f'<text class="name" x="{width - right + 10}" y="{middle}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>"])


def heat_map(cells: Sequence[Sequence[float]], *, row: str, column: str, title: str, width: int = 560) -> str:
    """Draw shares, rows that sum to 1, as colored cells in percent; an even share stands a third up the scale."""
    columns = len(cells[0])
    left, top, gap, cell_height = 62, 24, 3, 36
    cell_width = (width - left) / columns
    even = 1 / columns
    height = top + len(cells) * (cell_height + gap)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for j in range(columns):
        x = left + (j + 0.5) * cell_width
        parts.append(f'<text class="tick" x="{x:.1f}" y="15" text-anchor="middle">{j + 1}</text>')
    for i, shares in enumerate(cells):
        y = top + i * (cell_height + gap)
        middle = y + cell_height / 2 + 4
        parts.append(f'<text class="tick" x="{left - 10}" y="{middle}" text-anchor="end">{escape(row)} {i + 1}</text>')
        for j, share in enumerate(shares):
            level = level_of(share, 0.0, 3 * even)
            x, span = left + j * cell_width, cell_width - gap
            box = f'x="{x:.1f}" y="{y}" width="{span:.1f}" height="{cell_height}" rx="4"'
            name = f"{row} {i + 1}, {column} {j + 1}: {share:.2%}"
            parts.append(f'<rect class="fill{level}" {box}><title>{escape(name)}</title></rect>')
            if span >= 24:  # room for a number
                place = f'x="{x + span / 2:.1f}" y="{middle}"'
                parts.append(f'<text class="cell ink{level}" {place} text-anchor="middle">{100 * share:.1f}</text>')
    return "\n".join([*parts, "</svg>"])


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about ``span`` values, without the pull of its start."""
    keep = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def thinned(series: Series) -> Series:
    """Replace runs of points by their means where there are too many; the last point stays as it is."""
    run = math.ceil(len(series.x) / MOST_POINTS)
    if run <= 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        parts = [values[start : start + run] for start in range(0, len(values) - 1, run)]
        return [*(sum(part) / len(part) for part in parts), values[-1]]

    return Series(series.label, means(series.x), means(series.y), series.color, series.style)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers that span [low, high]."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda each: abs(math.log(each / raw)))
    first, last = math.floor(low / step), math.floor(high / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1) if step * i >= low - 1e-9 or i == first]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis that spans [low, high]."""
    known = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 1.5, 2, 3, 4, 6, 8)]
    below = max((each for each in known if each <= low), default=known[0])
    return [each for each in known if below <= each <= high]


def apart(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move positions, in their order, as little as it takes to keep them ``distance`` apart and inside [low, high]."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [places[index] for index in order]
    for _ in range(50):
        for i in range(len(moved) - 1):
            overlap = distance - (moved[i + 1] - moved[i])
            if overlap > 0:
                moved[i] -= overlap / 2
                moved[i + 1] += overlap / 2
        moved = [min(max(value, low + 4), high) for value in moved]
    result = [0.0] * len(places)
    for place, index in zip(moved, order, strict=True):
        result[index] = place
    return result


def number(value: float) -> str:
    """Write a tick."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:g}"


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    points = [(x_axis(x), y_axis(y)) for x, y in zip(series.x, series.y, strict=True)]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = (
        f'<polyline class="line {series.style}" points="{text}" style="stroke:{series.color}" '
        f'data-name="{escape(series.label)}"/>'
    )
    if series.style == "points":
        color = f'style="fill:{series.color}"'
        line += "".join(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3" {color}/>' for x, y in points)
    return line
