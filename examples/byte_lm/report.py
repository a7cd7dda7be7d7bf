# SPDX-License-Identifier: Apache-2.0
"""The page about a run: one HTML file with everything in it, which needs no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path

import torch

from byte_lm.charts import Series, heat_map, line_chart, smoothed, stacked_bars
from byte_lm.colors import LEVELS, level_of, scale_css
from byte_lm.evaluation import figures_by_class
from byte_lm.outcome import Outcome, duration, millions
from byte_lm.reading import text_section

HERE = Path(__file__).parent
SMOOTHING = 0.02  # of a run, over which curves are averaged


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the page."""
    path.write_text(render(outcome), encoding="utf-8")


def render(outcome: Outcome) -> str:
    """Return the page."""
    sections = [loss_section(outcome)]
    if outcome.routed:
        side = f'<div class="side">{classes_section(outcome)}{sample_section(outcome)}</div>'
        sections += [experts_section(outcome), layers_section(outcome), load_section(outcome)]
        sections += [text_section(outcome.excerpt, outcome.trace), side]
    else:
        sections.append(sample_section(outcome))
    sections.append(settings_section(outcome))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(outcome.settings.name)}: training report</title>
<style>
{(HERE / "report.css").read_text(encoding="utf-8")}
{scale_css()}
</style>
</head>
<body>
<main>
{header(outcome)}
{tiles(outcome)}
<div class="grid">
{"".join(sections)}
</div>
<footer>Written by examples/train_lm.py of dynamic_moe. All curves:
<code>tensorboard --logdir {escape(outcome.settings.runs_dir)}</code></footer>
</main>
<div id="tip" role="status" hidden></div>
<script>
{(HERE / "report.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


def header(outcome: Outcome) -> str:
    """Say in a few sentences what happened."""
    settings = outcome.settings
    bits = f"{outcome.evaluation.bits_per_byte:.2f} bits per byte"
    if outcome.routed:
        headline = f"{outcome.mean_experts:.2f} experts per byte, {bits}"
        rule = {
            "top_p": f"as few of them as hold {settings.top_p:.0%} of it",
            "top_k": f"the {settings.top_k} that have most of it",
        }[settings.router]
        model = (
            f"In each of its {settings.num_layers} layers a router spreads its probability over {settings.num_experts} "
            f"experts, and a byte gets {rule}."
        )
    else:
        headline = f"{bits}, without experts"
        model = f"Each of its {settings.num_layers} layers has one SwiGLU that all bytes go through."
    stopped = "" if outcome.finished else " The run was stopped before its end."
    return f"""<header>
<p class="eyebrow">dynamic_moe · {escape(settings.name)} · {escape(outcome.facts["Date"])}</p>
<h1>{headline}</h1>
<p class="lead">A byte-level language model, trained for {duration(outcome.seconds)} on {escape(outcome.source)}.
{model}{stopped}</p>
</header>"""


def tiles(outcome: Outcome) -> str:
    """The figures to see first."""
    bits = f"{outcome.evaluation.bits_per_byte:.3f}"
    rows = [("Validation loss", bits, f"bits per byte; training began at {outcome.first_bits:.2f}")]
    if outcome.routed:
        experts = f"of {outcome.settings.num_experts}, mean over layers"
        rows.append(("Experts per byte", f"{outcome.mean_experts:.2f}", experts))
    rows += [
        ("Active parameters", millions(outcome.active_parameters), f"of {millions(outcome.total_parameters)} in all"),
        ("Bytes read", millions(outcome.tokens), f"in {outcome.steps:,} steps"),
        ("Speed", f"{outcome.speed:,.0f}", f"bytes per second on {outcome.facts['Device']}"),
    ]
    cells = [f"<div><dt>{name}</dt><dd>{value}<small>{escape(note)}</small></dd></div>" for name, value, note in rows]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def loss_section(outcome: Outcome) -> str:
    """Training and validation loss over the steps."""
    history = outcome.history
    chart = line_chart(
        [
            Series("each step", history.step, history.bits, "var(--train)", "faint"),
            Series("training", history.step, smoothed(history.bits, SMOOTHING * len(history.bits)), "var(--train)"),
            Series("validation", history.eval_step, history.eval_bits, "var(--validation)", "points"),
        ],
        title=f"Loss over training, ending at {outcome.evaluation.bits_per_byte:.3f} bits per byte on validation text",
        x_label="step",
        y_label="bits per byte",
        log=True,
        width=560 if outcome.routed else 1120,
    )
    return f"""<section class="{"half" if outcome.routed else "wide"}" id="loss">
<h2>Loss</h2>
<p class="note">What it costs to predict the next byte. A byte that could be any of 256 costs 8 bits.</p>
{chart}
</section>
"""


def experts_section(outcome: Outcome) -> str:
    """Experts per byte over the steps, in each layer and on average."""
    history = outcome.history
    layers = len(outcome.evaluation.experts)
    series = []
    for layer in range(layers):
        values = smoothed([experts[layer] for experts in history.experts], SMOOTHING * len(history.step))
        series.append(Series(f"layer {layer + 1}", history.step, values, layer_color(layer, layers)))
    means = smoothed([sum(experts) / layers for experts in history.experts], SMOOTHING * len(history.step))
    series.append(Series("mean", history.step, means, "var(--text)", "bold"))
    title = "Mean experts per byte over training, by layer"
    return f"""<section class="half" id="experts">
<h2>Experts per byte over training</h2>
<p class="note">A router that is sure reaches its threshold with few experts; one in doubt takes more.</p>
{line_chart(series, title=title, x_label="step", y_label="experts per byte")}
</section>
"""


def layers_section(outcome: Outcome) -> str:
    """How many bytes of the validation text got 1, 2, 3, ... experts in each layer."""
    experts = outcome.evaluation.experts.long()
    means = outcome.evaluation.experts_per_layer
    most = int(experts.max())
    bars = min(most, LEVELS)  # the last one stands for all larger numbers
    levels = [level_of(count, 1, max(2, most)) for count in range(1, bars + 1)]
    rows = []
    for layer, counts in enumerate(experts):
        bins = torch.bincount(counts.clamp(max=bars), minlength=bars + 1)[1:]
        rows.append((f"layer {layer + 1}", (bins / counts.numel()).tolist(), f"mean {means[layer]:.2f}"))
    key = []
    for count, level in enumerate(levels, start=1):
        name = f"{count}+" if count == bars < most else str(count)
        key.append(f'<span><i class="back{level}"></i>{name} {"expert" if count == 1 else "experts"}</span>')
    return f"""<section class="half" id="layers">
<h2>Experts per byte, layer by layer</h2>
<p class="note">Share of the validation bytes that got one expert, two, three, and so on.</p>
{stacked_bars(rows, levels, title="Share of bytes by number of experts in each layer")}
<div class="key">{"".join(key)}</div>
</section>
"""


def load_section(outcome: Outcome) -> str:
    """Share of each expert in the rows of its layer."""
    load = outcome.evaluation.load
    title = "Share of the work of each layer that each expert does"
    return f"""<section class="half" id="load">
<h2>Load of each expert</h2>
<p class="note">Percent of its layer's work on the validation text. An even share is {100 / len(load[0]):.4g}.</p>
{heat_map(load, row="layer", column="expert", title=title)}
</section>
"""


def classes_section(outcome: Outcome) -> str:
    """Mean experts and cost of each class of bytes."""
    figures = sorted(figures_by_class(outcome.evaluation), key=lambda each: -each.experts)
    most_experts = max(each.experts for each in figures)
    most_bits = max(each.bits for each in figures)
    rows = [
        f'<tr><td>{each.name}</td><td class="figure">{each.share:.1%}</td>'
        f'<td class="figure">{each.experts:.2f}</td>{_bar(each.experts, most_experts, "var(--layer-last)")}'
        f'<td class="figure">{each.bits:.2f}</td>{_bar(each.bits, most_bits, "var(--validation)")}</tr>'
        for each in figures
    ]
    return f"""<section id="classes">
<h2>Which bytes need more</h2>
<p class="note">The validation text by kind of byte: how many experts work on one, and how many bits the byte after it
costs.</p>
<table>
<thead><tr><th>Byte</th><th class="figure">Share</th><th colspan="2">Experts</th>
<th colspan="2">Bits, next byte</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table>
</section>
"""


def _bar(value: float, most: float, color: str) -> str:
    width = max(0.5, 100 * value / most)
    return f'<td class="bars"><span class="bar" style="width:{width:.1f}%;background:{color}"></span></td>'


def sample_section(outcome: Outcome) -> str:
    """What the model writes."""
    temperature = f"{outcome.settings.temperature:g}"
    return f"""<section class="wide" id="sample">
<h2>What it writes</h2>
<p class="note">The prompt is bold; the rest was drawn byte by byte at temperature {temperature}.</p>
<pre class="sample"><b>{escape(outcome.prompt)}</b>{escape(outcome.sample)}</pre>
</section>
"""


def settings_section(outcome: Outcome) -> str:
    """The final numbers, what the run ran on, and every setting."""
    numbers = {
        "Validation loss": f"{outcome.evaluation.bits_per_byte:.4f} bits/byte",
        "Training loss, at the end": f"{outcome.last_bits:.4f} bits/byte",
        "Parameters": f"{outcome.total_parameters:,}",
        "Active parameters": f"{outcome.active_parameters:,}",
        "Steps": f"{outcome.steps:,}",
        "Bytes read": f"{outcome.tokens:,}",
        "Time": duration(outcome.seconds),
    }
    if outcome.routed:
        layers = " ".join(f"{value:.2f}" for value in outcome.evaluation.experts_per_layer)
        numbers["Experts by layer"] = layers
    options = dataclasses.asdict(outcome.settings)
    flags = {f"--{name.replace('_', '-')}": _shown(value) for name, value in options.items()}
    return f"""<section class="wide" id="settings">
<h2>Final numbers</h2>
{_facts(numbers)}
<h2>Machine and text</h2>
{_facts(outcome.facts)}
<h2>Settings</h2>
{_facts(flags)}
</section>
"""


def _facts(entries: Mapping[str, str]) -> str:
    rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries.items()]
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "not set"


def layer_color(layer: int, layers: int) -> str:
    """Return the color of a layer, between that of the first and that of the last."""
    part = layer / max(1, layers - 1)
    return f"color-mix(in oklab, var(--layer-first), var(--layer-last) {part:.0%})"
