# SPDX-License-Identifier: Apache-2.0
"""Trains the comparison and writes its page, docs/reproduction.md.

::

    python examples/reproduce/run.py            # train what has no result yet, then write the page
    python examples/reproduce/run.py --page     # only the page, from the results that are there
    python examples/reproduce/run.py --fresh    # ignore the results that come with the repository

Stop it as you like, even with ``kill -9``: the next call goes on from the last checkpoint, and what comes out is the
same to the bit. Results are JSON files in examples/reproduce/results/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script this folder is where Python looks for modules; its packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import byte_lm  # noqa: F401  before torch: it tells OpenMP how to wait

# isort: split
import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from byte_lm.corpus import Corpus
from byte_lm.training import Trainer
from reproduce import results as records
from reproduce.mixture import load_mixture
from reproduce.page import IMAGES, PAGE, write_page
from reproduce.plan import BASE, Run, plan
from reproduce.training import train_run

TRAIN_BYTES = 4_000_000
VALIDATION_BYTES = 200_000
MEASURED_SEQUENCES = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    runs = plan()
    try:
        if not options.page:
            train_all(runs, options, console)
        write_page(runs, options.results, PAGE, IMAGES)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"run.py: error: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(f"{PAGE} and its plots are written.", highlight=False, soft_wrap=True)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="Train the comparison and write docs/reproduction.md.")
    parser.add_argument("--page", action="store_true", help="train nothing: write the page from the results")
    parser.add_argument("--fresh", action="store_true", help="train runs again that have a result")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs/reproduce"), help="checkpoints (default: runs/reproduce)"
    )
    parser.add_argument("--results", type=Path, default=records.FOLDER, help="results (default: beside this file)")
    return parser.parse_args(arguments)


def train_all(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Train every run that has no result, one after the other."""
    missing = [run for run in runs if options.fresh or records.read_result(run, options.results) is None]
    console.print(f"{len(runs) - len(missing)} of {len(runs)} runs have a result.", highlight=False)
    if not missing:
        return
    corpus = load_mixture("", BASE["context"], TRAIN_BYTES, VALIDATION_BYTES)
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        overall = progress.add_task("all runs", total=len(missing), note="")
        for run in missing:
            result = train_shown(run, corpus, options, progress)
            progress.advance(overall)
            console.print(summary(result), highlight=False, soft_wrap=True)


def train_shown(run: Run, corpus: Corpus, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train a run under a bar of its own."""
    bar = progress.add_task(run.name, total=BASE["steps"], note="")

    def after_step(trainer: Trainer) -> bool:
        validation = trainer.history.eval_bits
        note = f"{validation[-1]:.3f} bits/byte" if validation else ""
        progress.update(bar, completed=trainer.step, note=note)
        return True

    result = train_run(run, BASE, corpus, options.runs_dir, options.results, after_step, MEASURED_SEQUENCES)
    assert result is not None  # nothing stops it
    progress.remove_task(bar)
    return result


def summary(result: dict[str, Any]) -> str:
    """One line about a finished run."""
    answers = ", ".join(f"{name} {figures['correct']:.0%}" for name, figures in result["measured"]["tasks"].items())
    return f"{result['run']}: {result['history']['validation_bits'][-1]:.3f} bits/byte; right: {answers}"


if __name__ == "__main__":
    sys.exit(main())
