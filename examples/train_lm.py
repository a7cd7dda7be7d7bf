# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level language model with dynamic routing on real text, shows how it goes, and writes a report.

::

    python examples/train_lm.py                          # the Python standard library, 4 minutes
    python examples/train_lm.py --router dense           # the same model without experts
    python examples/train_lm.py --data ~/notes --minutes 30 --name notes
    python examples/train_lm.py --name notes --resume --minutes 60

The page runs/<name>/report.html tells how it went. Ctrl-C stops a run after its current step; a checkpoint and the page
are written all the same.
"""

from __future__ import annotations

import byte_lm  # noqa: F401  before torch: it tells OpenMP how to wait

# isort: split
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dynamic_moe
from byte_lm.corpus import Corpus, load_corpus
from byte_lm.evaluation import Evaluation
from byte_lm.model import parameter_counts
from byte_lm.outcome import Outcome, choose_excerpt, duration, millions
from byte_lm.progress import Progress, TensorBoardLog
from byte_lm.report import write_report
from byte_lm.settings import Settings, complete, parse
from byte_lm.training import Trainer, load_checkpoint
from dynamic_moe import _C
from dynamic_moe.info import processor_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    console = Console()
    given = parse(arguments)
    try:
        settings, checkpoint = prepare(given, console)
        corpus = load_corpus(settings.data, settings.context)
        trainer = Trainer(settings, corpus, folder_of(settings), checkpoint)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"train_lm.py: error: {error}", style="red", markup=False, highlight=False)
        return 2
    introduce(console, trainer)
    finished = train(trainer, console)
    conclude(console, trainer, finished)
    return 0 if finished else 130


def prepare(given: dict[str, Any], console: Console) -> tuple[Settings, dict[str, Any] | None]:
    """Complete the options, and make the folder of the run or read the checkpoint in it."""
    settings = complete(given)
    folder = folder_of(settings)
    if settings.resume:
        checkpoint = load_checkpoint(folder)
        return complete(given, checkpoint["settings"]), checkpoint
    if folder.exists():
        old = next(path for i in range(1, sys.maxsize) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(old)
        console.print(f"The earlier run {folder} is now {old}.", highlight=False, soft_wrap=True)
    folder.mkdir(parents=True)
    return settings, None


def folder_of(settings: Settings) -> Path:
    """Where a run keeps its files."""
    return Path(settings.runs_dir) / settings.name


def introduce(console: Console, trainer: Trainer) -> None:
    """Say what is about to be trained, on what."""
    settings, corpus = trainer.settings, trainer.corpus
    experts = {"top_p": settings.num_experts, "top_k": settings.num_experts, "dense": 0}[settings.router]
    total, _ = parameter_counts(trainer.model, 1)
    layers = f"{settings.num_layers} layers" + (f" of {experts} experts" if experts else "")
    rule = {"top_p": f"top-p {settings.top_p:g}", "top_k": f"top-{settings.top_k}", "dense": "dense"}[settings.router]
    rows = {
        "text": f"{corpus.source}: {millions(len(corpus.train))} bytes in {len(corpus.train_files)} files to learn, "
        f"{millions(len(corpus.validation))} in {len(corpus.validation_files)} to validate",
        "model": f"{layers}, {rule}, {millions(total)} parameters",
        "device": f"{device_name(trainer)}, {str(trainer.dtype).removeprefix('torch.')}",
        "folder": f"{trainer.folder} (tensorboard --logdir {settings.runs_dir})",
    }
    if trainer.step:
        rows["resumed"] = f"after step {trainer.step:,}, {duration(trainer.seconds)} of training"
    for name, value in rows.items():
        console.print(Text.assemble((f"{name:<9}", "dim"), value), soft_wrap=True)


def train(trainer: Trainer, console: Console) -> bool:
    """Train until the run is over; return False if the user stopped it before."""
    log = TensorBoardLog(trainer.folder / "tensorboard", trainer.settings.log_interval, trainer)
    with StopRequest() as stop, Progress(console) as progress:

        def after_step(trainer: Trainer) -> bool:
            progress(trainer)
            log(trainer)
            return not stop.requested

        trainer.run(after_step)
        log.close()
    if stop.requested:
        console.print("Stopped. Writing the checkpoint and the report; --resume goes on from here.", soft_wrap=True)
    return trainer.progress >= 1


class StopRequest:
    """Inside ``with``, the first Ctrl-C (or SIGTERM) only asks for a stop, so that no step is left half done."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()  # the second one takes its usual effect

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def conclude(console: Console, trainer: Trainer, finished: bool) -> None:
    """Evaluate, save, let the model write, and tell all of it."""
    evaluation = trainer.evaluate(final=True)
    trainer.save()
    outcome = make_outcome(trainer, evaluation, finished)
    report = trainer.folder / "report.html"
    write_report(outcome, report)
    (trainer.folder / "result.json").write_text(json.dumps(outcome.as_json(), indent=2) + "\n")
    console.print(summary(outcome))
    sample = Text.assemble(("\nSample\n", "bold"), (outcome.prompt, "bold magenta"), outcome.sample)
    console.print(sample, soft_wrap=True)
    console.print(Text.assemble("\nReport: ", (str(report), "bold")), soft_wrap=True)


def make_outcome(trainer: Trainer, evaluation: Evaluation, finished: bool) -> Outcome:
    """Gather what the report tells."""
    settings, corpus = trainer.settings, trainer.corpus
    excerpt = choose_excerpt(corpus.validation_files)
    written = trainer.inference.write(
        settings.prompt.encode(), settings.sample_bytes, settings.temperature, settings.seed
    )
    total, active = parameter_counts(trainer.model, evaluation.mean_experts)
    return Outcome(
        settings=settings,
        history=trainer.history,
        source=corpus.source,
        evaluation=evaluation,
        excerpt=excerpt,
        trace=trainer.inference.trace(excerpt.content),
        prompt=settings.prompt,
        sample=bytes(written).decode("utf-8", errors="replace"),
        total_parameters=total,
        active_parameters=active,
        tokens=trainer.tokens,
        seconds=trainer.seconds,
        finished=finished,
        facts=facts(trainer, corpus),
    )


def facts(trainer: Trainer, corpus: Corpus) -> dict[str, str]:
    """The machine and the versions."""
    entries = {
        "Date": time.strftime("%Y-%m-%d %H:%M"),
        "Device": device_name(trainer),
        "Precision": str(trainer.dtype).removeprefix("torch."),
        "CPU level": _C.cpu_isa(),
        "dynamic_moe": dynamic_moe.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "Training text": f"{len(corpus.train):,} bytes, {len(corpus.train_files)} files",
        "Validation text": f"{len(corpus.validation):,} bytes, {len(corpus.validation_files)} files",
    }
    if trainer.device.type != "cpu":
        del entries["CPU level"]
    return entries


def device_name(trainer: Trainer) -> str:
    """The device, as its user knows it."""
    if trainer.device.type == "cuda":
        return torch.cuda.get_device_name(trainer.device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} {'thread' if threads == 1 else 'threads'}"


def summary(outcome: Outcome) -> Table:
    """The final numbers, for people."""
    table = Table(show_header=False, title=outcome.settings.name, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("validation loss", f"{outcome.evaluation.bits_per_byte:.3f} bits per byte")
    table.add_row("training loss", f"{outcome.last_bits:.3f} bits per byte (began at {outcome.first_bits:.2f})")
    if outcome.routed:
        layers = "  ".join(f"{value:.2f}" for value in outcome.evaluation.experts_per_layer)
        table.add_row("experts per byte", f"{outcome.mean_experts:.2f} of {outcome.settings.num_experts}")
        table.add_row("layer by layer", layers)
    table.add_row("parameters", f"{millions(outcome.active_parameters)} active of {millions(outcome.total_parameters)}")
    table.add_row("trained on", f"{outcome.tokens:,} bytes in {outcome.steps:,} steps")
    table.add_row("time", f"{duration(outcome.seconds)} ({outcome.speed:,.0f} bytes/s)")
    return table


if __name__ == "__main__":
    sys.exit(main())
