# SPDX-License-Identifier: Apache-2.0
"""The part of the report that shows validation text, every character colored by the number of its experts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from byte_lm.colors import LEVELS, level_of
from byte_lm.corpus import TextFile
from byte_lm.evaluation import Evaluation


@dataclass(frozen=True)
class View:
    """One way to color the text; report.js takes the same fields.

    Attributes
    ----------
    name, label : str
        Short, for the figures of a character; and in full.
    low, high : float
        Values of the first and the last color.
    first, last : str
        The same in words.
    values : list of float
        One for each character.
    """

    name: str
    label: str
    low: float
    high: float
    first: str
    last: str
    values: list[float]


def text_section(excerpt: TextFile, trace: Evaluation) -> str:
    """Return the section: the text, a choice of what its colors mean, and the figures behind it."""
    characters, views = text_views(excerpt, trace)
    first = views[0]
    spans = []
    for character, value in zip(characters, first.values, strict=True):
        level = level_of(value, first.low, first.high)
        end = " end" if character == "\n" else ""
        shown = "↵\n" if character == "\n" else escape(character)
        spans.append(f'<span class="ink{level} back{level}{end}">{shown}</span>')
    options = "".join(f'<option value="{index}">{escape(view.label)}</option>' for index, view in enumerate(views))
    swatches = "".join(f'<i class="back{level}"></i>' for level in range(LEVELS))
    data = {"levels": LEVELS, "views": [dataclasses.asdict(view) for view in views]}
    # "</script>" must not end the element that holds the data.
    json_text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<section class="main" id="reading">
<h2>Where the experts go</h2>
<p class="note">The beginning of <code>{escape(excerpt.name)}</code>, which the model has never seen. Each character is
colored by the number of experts that worked on it to predict the next one. Point at a character for its figures.</p>
<div class="controls">
<label>Color by <select id="view" autocomplete="off">{options}</select></label>
<span class="legend" id="legend"><b class="from">{escape(first.first)}</b><span class="swatches">{swatches}</span><b
class="to">{escape(first.last)}</b></span>
</div>
<pre id="text" tabindex="0">{"".join(spans)}</pre>
<script type="application/json" id="text-data">{json_text}</script>
</section>
"""


def text_views(excerpt: TextFile, trace: Evaluation) -> tuple[list[str], list[View]]:
    """Return the characters of the excerpt, and the figures by which the page can color them.

    A character of several bytes has the mean of their experts and the sum of their costs.
    """
    characters = list(excerpt.content.decode("utf-8", errors="surrogateescape"))
    lengths = [len(character.encode("utf-8", errors="surrogateescape")) for character in characters]
    mean = _means(trace.experts.double().mean(0).tolist(), lengths)
    low, high = _most_of(mean)
    views = [View("mean", "experts, mean of all layers", low, high, f"{low:.1f}", f"{high:.1f} experts", mean)]
    most = max(2, int(trace.experts.max()))
    for layer, counts in enumerate(trace.experts.tolist(), start=1):
        values = _means(counts, lengths)
        views.append(View(f"layer {layer}", f"experts, layer {layer}", 1, most, "1", f"{most} experts", values))
    # The cost of a byte stands with the byte before it, from which it was predicted.
    costs = [0.0, *trace.bits.tolist()[:-1]]
    sums = [round(mean * length, 2) for mean, length in zip(_means(costs, lengths), lengths, strict=True)]
    views.append(View("bits", "bits that it took to predict the character", 0, 8, "0", "8 bits", sums))
    shown = [character if character.isprintable() or character in "\n\t" else "\ufffd" for character in characters]
    return shown, views


def _means(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Mean of the values of each character's bytes."""
    result = []
    start = 0
    for length in lengths:
        result.append(round(sum(values[start : start + length]) / length, 2))
        start += length
    return result


def _most_of(values: Sequence[float]) -> tuple[float, float]:
    """Bounds that leave out the 2% at either end, so that few characters do not take all the colors."""
    ordered = sorted(values)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.02, 0.98))
    return low, max(high, low + 0.5)
