# SPDX-License-Identifier: Apache-2.0
"""Writes docs/reproduction.md and its plots from the results: no number, and no verdict, of the page is typed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from byte_lm.outcome import millions
from reproduce import published
from reproduce.analysis import (
    SUMS,
    Comparison,
    Figure,
    Interval,
    active_parameters,
    answers_correct,
    depth_slope,
    difficulty_correlation,
    expert_parameters,
    experts,
    layer_experts,
    line_experts,
    mean,
    task_correct,
    task_experts,
    text_bits,
    token_correlation,
    training_experts,
    validation_bits,
)
from reproduce.measure import TEXT
from reproduce.plan import DENSE, DYNAMIC, PAPER_P, TOP_1, TOP_2, VARIANTS, WITHOUT_LOSS, Run, Variant
from reproduce.plots import plot_all
from reproduce.tasks import MODULUS, TASKS, draw_lines

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reproduction.md"
IMAGES = ROOT / "docs" / "images" / "reproduction"
NONE = "-"


def write_page(runs: Sequence[Run], results: Path, page: Path, images: Path) -> None:
    """Write the page and its plots.

    Parameters
    ----------
    runs : sequence of Run
        The plan; runs without a result are counted as missing.
    results, page, images : Path
        Folder of the results, the file to write, folder of the plots (which the page names relative to itself).

    Raises
    ------
    ValueError
        If there are no results, or too few: every variant needs one.
    """
    comparison = Comparison.read(runs, results)
    missing = [variant.name for variant in VARIANTS if not comparison.of(variant)]
    if missing:
        raise ValueError(f"results must hold a run of every variant, found none of {', '.join(missing)} in {results}")
    plot_all(comparison, images)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(compose(comparison, len(runs), images.relative_to(page.parent).as_posix()))


def compose(comparison: Comparison, planned: int, images: str) -> str:
    """Return the page as Markdown; ``images`` is where its plots lie."""
    sections = (
        introduction(comparison, planned),
        claims(comparison),
        models(comparison, images),
        tasks(comparison, images),
        over_training(comparison, images),
        layers(comparison, images),
        sweep(comparison, images),
        setting(comparison),
    )
    return "\n\n".join(section.strip() for section in sections) + "\n"


def show(interval: Interval, digits: int = 3, sign: bool = False) -> str:
    """Write a mean and its interval, or what is known of one seed."""
    plus = "+" if sign else ""
    text = f"{interval.mean:{plus}.{digits}f}"
    return f"{text} (one seed)" if math.isnan(interval.half) else f"{text} ± {interval.half:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, numbers to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def introduction(comparison: Comparison, planned: int) -> str:
    """Say what this is, and how much of it there is."""
    counts = ", ".join(f"{variant.label}: {len(comparison.of(variant))}" for variant in VARIANTS)
    total = comparison.results[0]["tokens"]
    parameters = comparison.of(DYNAMIC)[0]["parameters"]["total"]
    seeds = max(len(comparison.of(variant)) for variant in VARIANTS)
    unfinished = planned - len(comparison.results)
    rest = "All planned runs are in." if not unfinished else f"{unfinished} planned runs are not in yet."
    return f"""
# The paper's comparison, small

Huang et al. 2024, [Harder Tasks Need More Experts](https://arxiv.org/abs/2403.07652), train on 100 B tokens. This page
asks the same questions of models that one CPU core trains in minutes: {millions(parameters)} parameters with their
experts, and {total:,} bytes each, of text and of tasks whose difficulty is known. Models of this size cannot confirm or
refute the paper. They show what the method does where everything can be inspected.

Every number and every verdict below is computed by `python examples/reproduce/run.py --page` from the logs in
`examples/reproduce/results/`. A figure such as 1.234 ± 0.056 is the mean over seeds and its 95% t-interval, which with
{seeds} seeds is wide. The interval covers only the variation between seeds: other sizes, data and learning rates may
give other results. Differences are taken seed by seed. Figures of the paper are in columns marked "published".

Seeds of each model: {counts}.
{rest}
"""


def judge(interval: Interval, expected: int) -> str:
    """Compare the side of 0 that an interval lies on with the side that a claim expects."""
    if interval.count == 1:
        return "one seed: open"
    if interval.sign == 0:
        return "not resolved"
    return "**supported**" if interval.sign == expected else "**contradicted**"


def claims(comparison: Comparison) -> str:
    """The claims of the paper, one by one."""
    gap = comparison.difference(DYNAMIC, TOP_2, validation_bits)
    gap_answers = comparison.difference(DYNAMIC, TOP_2, lambda result: 100 * answers_correct(result))
    below = comparison.interval(DYNAMIC, lambda result: experts(result) - 0.9 * 2)
    share = comparison.interval(DYNAMIC, lambda result: 100 * experts(result) / 2)
    slope = comparison.interval(DYNAMIC, depth_slope)
    over_tasks = comparison.interval(DYNAMIC, difficulty_correlation)
    over_tokens = comparison.interval(DYNAMIC, token_correlation)
    fall = comparison.interval(
        DYNAMIC,
        lambda result: mean(result["history"]["train_experts"][-1]) - mean(result["history"]["train_experts"][0]),
    )
    last = comparison.of(DYNAMIC)[0]["parameters"]["layers"] - 1
    depth = comparison.interval(DYNAMIC, lambda result: layer_experts(last)(result) - layer_experts(0)(result))
    loss = comparison.difference(DYNAMIC, WITHOUT_LOSS, experts)
    hardest, others = published.EXPERTS["BBH"], [v for name, v in published.EXPERTS.items() if name != "BBH"]
    first, final = published.TRAINING[0][1], published.TRAINING[-1][1]
    accuracy = published.AVERAGE_ACCURACY
    rows = [
        (
            "Dynamic routing is better than top-2",
            f"accuracy {accuracy['dynamic']} against {accuracy['top-2']}",
            f"loss {show(gap, sign=True)} bits per byte",
            judge(gap, -1),
        ),
        ("", "", f"right answers {show(gap_answers, 1, sign=True)} points", judge(gap_answers, 1)),
        (
            "It activates less than 90% of the parameters of top-2 (of the experts; all parameters: see below)",
            f"{published.MEAN_EXPERTS} / 2 = {published.MEAN_EXPERTS / 2:.0%}",
            f"{show(share, 1)}%",
            judge(below, -1),
        ),
        (
            "Harder tasks take more experts: each further operation of a sum adds some at the `=`",
            f"BBH {hardest}, the other tasks {min(others)} to {max(others)}",
            f"{show(slope, sign=True)} per operation",
            judge(slope, 1),
        ),
        (
            "Harder tasks take more experts: over all tasks, experts rise with the cost of an answer (Spearman)",
            NONE,
            show(over_tasks, 2, sign=True),
            judge(over_tasks, 1),
        ),
        (
            "Harder tokens take more experts: over the text, experts rise with the cost of the next byte (Spearman)",
            NONE,
            show(over_tokens, sign=True),
            judge(over_tokens, 1),
        ),
        (
            "Experts per token fall over training (last part of it minus first)",
            f"{first} to {final}",
            show(fall, 2, sign=True),
            judge(fall, -1),
        ),
        (
            "Lower layers take more experts (last layer minus first)",
            NONE,
            show(depth, 2, sign=True),
            judge(depth, -1),
        ),
        (
            "The dynamic loss lowers the number of experts (with it minus without)",
            NONE,
            show(loss, 3, sign=True),
            judge(loss, -1),
        ),
    ]
    head = ("claim", "published, not reproduced", "here", "verdict here")
    return f"""
## The paper's claims, one by one

{table(head, rows)}

"Supported" and "contradicted" mean that the interval lies on one side of what the claim sets (0, or 90%), "not
resolved" that it does not; there is no correction for testing several claims. Where a published figure is missing, we
could not read one in a primary source.
"""


def models(comparison: Comparison, images: str) -> str:
    """Loss and parameters of every model."""
    rows = []
    for variant in VARIANTS:
        routed = variant is not DENSE
        training = comparison.interval(variant, training_experts) if routed else None
        rows.append(
            (
                variant.label,
                str(len(comparison.of(variant))),
                show(comparison.interval(variant, validation_bits)),
                show(comparison.interval(variant, text_bits)),
                show(comparison.interval(variant, lambda result: 100 * answers_correct(result)), 1) + "%",
                show(comparison.interval(variant, experts), 2) if routed else NONE,
                show(training, 2) if training else NONE,
                published.AVERAGE_ACCURACY.get(variant.name, NONE),
                str(published.MEAN_EXPERTS) if variant is DYNAMIC else NONE,
            )
        )
    head = (
        "model",
        "seeds",
        "validation loss, bits per byte",
        "of that on text",
        "right answers",
        "experts per token",
        "over training",
        "published, not reproduced: mean accuracy",
        "published, not reproduced: experts per token",
    )
    activated_head = (
        "model",
        "all parameters",
        "activated, all",
        "activated, experts only",
        "of top-2: all",
        "of top-2: experts only",
    )
    return f"""
## Loss and activated parameters

{table(head, rows)}

{table(activated_head, _activated(comparison))}

![Validation loss over training]({images}/loss.svg)

The lines are means over seeds, the bands their range; evaluations during training use few sequences, the table uses
many more. All models see the same bytes, in the same order for the same seed, and all models with experts have the
same number of parameters. Dense has one feed-forward layer as wide as two experts: it activates what top-2 does, less
the router. Top-1 weighs its expert by the raw probability and top-2 divides its two weights by their sum, each as is
usual; dynamic routing uses raw probabilities, as the paper does. "Over training" is the mean over all training steps,
the cost of training; "experts per token" is the cost of the trained model. Right answers are the mean over the
tasks below of the share of right bytes.
"""


def _activated(comparison: Comparison) -> list[Sequence[str]]:
    rows = []
    for variant in VARIANTS:
        shares = [
            comparison.interval(variant, _share_of_top_2(comparison, figure))
            for figure in (active_parameters, expert_parameters)
        ]
        rows.append(
            (
                variant.label,
                f"{comparison.of(variant)[0]['parameters']['total']:,}",
                f"{comparison.interval(variant, active_parameters).mean:,.0f}",
                f"{comparison.interval(variant, expert_parameters).mean:,.0f}",
                *(show(share, 1) + "%" for share in shares),
            )
        )
    return rows


def _share_of_top_2(comparison: Comparison, figure: Figure) -> Figure:
    """A number of parameters in percent of top-2's, which no seed changes."""
    whole = figure(comparison.of(TOP_2)[0])
    return lambda result: 100 * figure(result) / whole


def tasks(comparison: Comparison, images: str) -> str:
    """Answers and experts by task."""
    names = [*(task.name for task in TASKS), TEXT]
    chances = {task.name: f"{task.chance:.0%}" for task in TASKS}
    right = [
        (name, chances.get(name, NONE), *(_percent(comparison, variant, name) for variant in VARIANTS))
        for name in names
    ]
    used = [
        (
            name,
            show(comparison.interval(DYNAMIC, task_experts(name)), 2),
            show(comparison.interval(DYNAMIC, line_experts(name)), 2) if name != TEXT else NONE,
            show(comparison.interval(DYNAMIC, _task_bits(name)), 2),
            show(comparison.interval(WITHOUT_LOSS, task_experts(name)), 2),
        )
        for name in names
    ]
    theirs = [(name, f"{value:.2f}") for name, value in published.EXPERTS.items()]
    slopes = "; ".join(
        f"{variant.label}: {show(comparison.interval(variant, depth_slope), sign=True)}"
        for variant in (DYNAMIC, WITHOUT_LOSS)
    )
    example = draw_lines(120, 0).content.decode().rsplit("\n", 1)[0]
    used_head = (
        "task",
        "dynamic: at the answers",
        "dynamic: whole lines",
        "dynamic: bits per byte of the answers",
        "without dynamic loss: at the answers",
    )
    return f"""
## By task

Three quarters of the data are lines of these tasks in random order; only their characters tell the tasks apart:

```text
{example}
```

Letters are copied, the x are counted, and digits are added modulo {MODULUS}, with {SUMS[0].depth} to {SUMS[-1].depth}
operations. The sums are the task with graded difficulty: they use the same bytes, and the answer is always the one
digit after the `=`. The experts of an answer are those of the tokens that predict it; for a sum that is the `=`.
Answers to questions of which a sequence holds only the end are left out. Right bytes, in percent:

{table(("task", "best constant guess", *(variant.label for variant in VARIANTS)), right)}

Experts per token and layer:

{table(used_head, used)}

{table(("benchmark", "experts per token, published, not reproduced"), theirs)}

![Experts and right answers by task]({images}/tasks.svg)

Slope of the experts at the `=` over the number of operations:
{slopes}.
A longer sum also has a longer question, so that its `=` stands later in the line; these tasks do not separate length
from difficulty. Where a model answers no better than the best constant guess, the number of experts is that of a task
that the model has not learned.
"""


def _percent(comparison: Comparison, variant: Variant, name: str) -> str:
    return show(comparison.interval(variant, lambda result: 100 * task_correct(name)(result)), 1)


def _task_bits(name: str) -> Figure:
    return lambda result: float(result["measured"]["tasks"][name]["bits"])


def over_training(comparison: Comparison, images: str) -> str:
    """Experts per token as training goes on."""
    results = comparison.of(DYNAMIC)
    interval = results[0]["settings"]["eval_interval"]
    steps = results[0]["history"]["step"]
    per_step = results[0]["tokens"] // results[0]["steps"]
    chosen = sorted({0, *(round(part * (len(steps) - 1)) for part in (0.2, 0.4, 0.6, 0.8, 1.0))})
    rows = []
    for index in chosen:
        end = steps[index]
        counts = [_training_row(comparison, variant, index) for variant in (DYNAMIC, WITHOUT_LOSS)]
        rows.append((f"{end * per_step / results[0]['tokens']:.0%}", *counts))
    head = ("trained, up to", "dynamic", WITHOUT_LOSS.label)
    theirs = [
        (f"{1e9 * billions / published.TRAINING_TOKENS:.0%} ({billions} B tokens)", f"{value:.2f}")
        for billions, value in published.TRAINING
    ]
    return f"""
## Over training

Mean experts per token and layer over the training batches of the {interval} steps before:

{table(head, rows)}

{table(("trained", "published, not reproduced (read off a plot)"), theirs)}

![Experts per token over training]({images}/training.svg)
"""


def _training_row(comparison: Comparison, variant: Variant, index: int) -> str:
    return show(comparison.interval(variant, lambda result: mean(result["history"]["train_experts"][index])), 2)


def layers(comparison: Comparison, images: str) -> str:
    """Experts per token by layer."""
    count = comparison.of(DYNAMIC)[0]["parameters"]["layers"]
    rows = [
        (
            str(layer + 1),
            *(show(comparison.interval(variant, layer_experts(layer)), 2) for variant in (DYNAMIC, WITHOUT_LOSS)),
        )
        for layer in range(count)
    ]
    return f"""
## By layer

Experts per token on the validation data, first layer to last:

{table(("layer", "dynamic", WITHOUT_LOSS.label), rows)}

![Experts per token by layer]({images}/layers.svg)
"""


def sweep(comparison: Comparison, images: str) -> str:
    """The threshold p, from few experts to many."""
    results = comparison.sweep()
    rows = [
        (
            f"{result['top_p']:g}",
            f"{validation_bits(result):.3f}",
            f"{text_bits(result):.3f}",
            f"{100 * answers_correct(result):.1f}%",
            f"{experts(result):.2f}",
            f"{training_experts(result):.2f}",
            f"{depth_slope(result):+.3f}",
        )
        for result in results
    ]
    seed = results[0]["seed"]
    for variant in (TOP_1, TOP_2):
        for result in comparison.of(variant):
            if result["seed"] == seed:
                figures = (validation_bits(result), text_bits(result))
                shown = [f"{value:.3f}" for value in figures]
                count = f"{experts(result):.2f}"
                rows.append((variant.label, *shown, f"{100 * answers_correct(result):.1f}%", count, count, NONE))
    head = (
        "p",
        "validation loss",
        "on text",
        "right answers",
        "experts per token",
        "over training",
        "experts per operation",
    )
    return f"""
## The threshold

One run for each p, all with seed {seed}: differences as small as those between seeds above mean nothing. The paper uses
p = {PAPER_P}; we could not read its scores for other thresholds.

{table(head, rows)}

![Loss against experts per token, by threshold]({images}/sweep.svg)
"""


def setting(comparison: Comparison) -> str:
    """What was trained, on what, and how to do it again."""
    settings = comparison.of(DYNAMIC)[0]["settings"]
    sizes = [
        ("layers, width, heads", f"{settings['num_layers']}, {settings['hidden_size']}, {settings['num_heads']}"),
        ("experts per layer, width of each", f"{settings['num_experts']}, {settings['intermediate_size']}"),
        ("context, batch", f"{settings['context']} bytes, {settings['batch_size']} sequences"),
        ("steps, bytes trained on", f"{settings['steps']:,}, {comparison.results[0]['tokens']:,}"),
        ("learning rate, warm-up, weight decay", f"{settings['lr']}, {settings['warmup']}, {settings['weight_decay']}"),
        ("balance, dynamic, z-loss", f"{settings['balance']}, {settings['dynamic']}, {settings['router_z']}"),
    ]
    tokens = comparison.of(DYNAMIC)[0]["measured"]["tasks"]
    answers = textwrap.fill(", ".join(f"{name} {figures['tokens']:,}" for name, figures in tokens.items()), 120)
    corpus = comparison.results[0]["corpus"]
    environments = sorted({tuple(sorted(each["environment"].items())) for each in comparison.results})
    described = [", ".join(f"{name}: {value}" for name, value in each) for each in environments]
    machines = "\n".join(textwrap.fill(f"- {each}", 120, subsequent_indent="  ") for each in described)
    return f"""
## What was trained, and how to do it again

{table(("setting", "value"), sizes)}

This is also the default of the program, so the page can be made again:

```sh
python examples/reproduce/run.py --fresh   # trains all runs, one after the other, then writes this page
python examples/reproduce/run.py --page    # only the page, from the logged results
```

A run that was stopped continues from its last checkpoint under `runs/` and ends with the same weights, bit for bit. The
packages are in `requirements/demo.txt` and `requirements/reproduce.txt`. The trainer is the demo's, in
`examples/byte_lm/`. The text is {corpus["text"]}, split by file, in blocks between blocks of problems:
{corpus["bytes"]:,} bytes, of which a run sees less than one pass. Bytes that the figures by task rest on, in each run:
{answers}.
Short problems occur both in training and in what is measured, since there are few of them (a sum with one
operation has {MODULUS**2} questions): their answers can be remembered.

What else differs from the paper: bytes instead of tokens, models and trainings smaller by orders of magnitude,
LayerNorm, normalized queries and keys, and one learning rate for all models that was tuned for none of them.

The tasks and the size were settled before by short trials, nearly all of the dynamic model. Two starts with 1,600 steps
were given up, one for longer sums after a dense and a top-1 run (it had solved sums of 4 operations), one for time
after a dense run (75% right at 6 operations). None of this is among the results.

Machines and versions:

{machines}
"""
