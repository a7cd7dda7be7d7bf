# SPDX-License-Identifier: Apache-2.0
"""How a run is watched: a live panel on a terminal, plain lines anywhere else, TensorBoard in both cases."""

from __future__ import annotations

import math
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from byte_lm.charts import smoothed
from byte_lm.settings import Settings
from byte_lm.training import Trainer

SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 36  # of bars and curves, in characters
REFRESH_SECONDS = 0.5
LINE_SECONDS = 10.0  # between lines where the output is not a terminal
SPEED_SECONDS = 5.0  # over which the speed is measured


class Progress:
    """Shows a trainer's progress; call it after each step, inside ``with``.

    Parameters
    ----------
    console : Console
        Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = -math.inf
        self._marks: list[tuple[float, int]] = []

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, trainer: Trainer) -> None:
        """Show where the trainer stands, if it is time to."""
        now = time.monotonic()
        self._marks.append((now, trainer.tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_SECONDS:
            self._marks.pop(0)
        due = now - self._shown >= (REFRESH_SECONDS if self._live else LINE_SECONDS)
        if not trainer.history.step or not (due or trainer.progress >= 1):
            return
        self._shown = now
        if self._live:
            self._live.update(panel(trainer, self._speed()), refresh=True)
        else:
            self._console.print(line(trainer, self._speed()), soft_wrap=True, highlight=False)

    def _speed(self) -> float:
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else math.nan


def line(trainer: Trainer, speed: float) -> str:
    """One line of plain text about a run."""
    history = trainer.history
    parts = [
        f"{trainer.progress:4.0%}",
        f"step {history.step[-1]:,}",
        f"loss {smoothed(history.bits[-100:], 30)[-1]:.3f} bits/byte",
    ]
    if history.eval_bits:
        parts.append(f"validation {history.eval_bits[-1]:.3f}")
    if history.experts[-1]:
        parts.append(f"experts {_mean(history.experts[-1]):.2f}")
    parts += [f"{_count(speed)} bytes/s", f"{clock(trainer.seconds_left)} left"]
    return " | ".join(parts)


def panel(trainer: Trainer, speed: float) -> Panel:
    """The live view of a run."""
    history = trainer.history
    loss = smoothed(history.bits, 30)
    figures = Table.grid(padding=(0, 3))
    figures.add_column(style="dim")
    figures.add_column(justify="right", min_width=9)
    figures.add_column()
    figures.add_row("loss", f"[bold]{loss[-1]:.3f}[/]", Text(sparkline(loss, WIDTH), style="blue"))
    if history.eval_bits:
        figures.add_row("validation", f"[bold]{history.eval_bits[-1]:.3f}[/]", "[dim]bits per byte[/]")
    figures.add_row("speed", _count(speed), "[dim]bytes per second[/]")
    if history.experts[-1]:
        means = [_mean(experts) for experts in history.experts]
        trend = Text(sparkline(smoothed(means, 30), WIDTH), style="magenta")
        figures.add_row("experts per byte", f"[bold]{means[-1]:.2f}[/]", trend)
    parts: list[Table | Text | ProgressBar] = [_head(trainer), Text(), figures]
    if history.experts[-1]:
        parts += [Text(), _layers(history.experts[-1], trainer.settings)]
    return Panel(Group(*parts), title=f"[bold]{trainer.settings.name}[/]", border_style="dim", padding=(1, 2), width=88)


def _head(trainer: Trainer) -> Table:
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    times = f"{clock(trainer.seconds)} gone   {clock(trainer.seconds_left)} left"
    status = f"{trainer.progress:.0%}   step {trainer.step:,}   {times}"
    head.add_row(ProgressBar(total=1.0, completed=trainer.progress), status)
    return head


def _layers(experts: list[float], settings: Settings) -> Table:
    """A line for each layer, as long as its mean number of experts; the gray rest goes up to a round number."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column(justify="right", min_width=9)
    table.add_column()
    most = min(settings.num_experts, max(4, math.ceil(max(experts))))
    for layer, mean in enumerate(experts):
        filled = round(mean / most * WIDTH)
        bar = Text.assemble(("━" * filled, "magenta"), ("━" * (WIDTH - filled), "bright_black"))
        if layer == 0:
            bar.append(f"  of {most}", "dim")
        table.add_row(f"layer {layer + 1:<10}", f"{mean:.2f}", bar)
    return table


def sparkline(values: list[float], width: int) -> str:
    """Draw values as a line of blocks, the highest as a full one."""
    run = math.ceil(len(values) / width)
    means = [_mean(values[start : start + run]) for start in range(0, len(values), run)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in means)


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "?"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class TensorBoardLog:
    """Writes what is new in a trainer's history to TensorBoard; call it after each step.

    Parameters
    ----------
    folder : Path
        Of the event files.
    interval : int
        Steps between points.
    trainer : Trainer
        Its history so far is in the files already.
    """

    def __init__(self, folder: Path, interval: int, trainer: Trainer) -> None:
        # Points after the step that a run is resumed from were logged before it stopped; this hides them.
        self._writer = SummaryWriter(str(folder), purge_step=trainer.step + 1 if trainer.step else None)
        self._interval = interval
        self._evaluations = len(trainer.history.eval_step)
        self._steps = len(trainer.history.step)

    def __call__(self, trainer: Trainer) -> None:
        """Log the steps that are due."""
        history = trainer.history
        for index in range(self._steps, len(history.step)):
            if history.step[index] % self._interval == 0:
                self._log_step(trainer, index)
        self._steps = len(history.step)
        for index in range(self._evaluations, len(history.eval_step)):
            step = history.eval_step[index]
            self._writer.add_scalar("validation/bits_per_byte", history.eval_bits[index], step)
            for layer, value in enumerate(history.eval_experts[index]):
                self._writer.add_scalar(f"validation/experts_layer_{layer + 1}", value, step)
        self._evaluations = len(history.eval_step)

    def _log_step(self, trainer: Trainer, index: int) -> None:
        history, step = trainer.history, trainer.history.step[index]
        scalars = {
            "train/bits_per_byte": history.bits[index],
            "train/learning_rate": history.lr[index],
            "train/gradient_norm": history.gradient_norm[index],
        }
        if history.experts[index]:
            scalars |= {
                "router/load_balancing_loss": history.balance[index],
                "router/entropy": history.entropy[index],
                "router/experts_per_byte": _mean(history.experts[index]),
            }
            scalars |= {f"experts/layer_{i + 1}": value for i, value in enumerate(history.experts[index])}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._writer.close()
