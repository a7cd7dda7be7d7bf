# SPDX-License-Identifier: Apache-2.0
"""Trains one run of the plan, from its checkpoint where there is one, and writes its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byte_lm.corpus import Corpus
from byte_lm.training import CHECKPOINT, Trainer, load_checkpoint
from reproduce.measure import measure
from reproduce.mixture import fingerprint
from reproduce.plan import Run
from reproduce.results import make_result, write_result

# What may differ between a checkpoint and the plan: where things lie.
PLACES = ("runs_dir", "name", "resume")


def train_run(
    run: Run,
    base: dict[str, Any],
    corpus: Corpus,
    runs_dir: Path,
    results: Path,
    after_step: Callable[[Trainer], bool],
    measured_sequences: int,
) -> dict[str, Any] | None:
    """Train a run to its end and write its result.

    Checkpoints are written at every evaluation. A run that was killed goes on from the last one and ends bit for bit as
    if it had not been.

    Parameters
    ----------
    run, base
        What to train; see `reproduce.plan`.
    corpus : Corpus
        See `reproduce.mixture`.
    runs_dir, results : Path
        Folders of checkpoints and of results.
    after_step : callable
        Called after each step; False stops the run after it writes a checkpoint.
    measured_sequences : int
        Of `reproduce.measure.measure`.

    Returns
    -------
    dict or None
        The result; None if ``after_step`` stopped the run.

    Raises
    ------
    ValueError
        If the checkpoint in the folder of the run is of other settings or data.
    """
    settings = run.settings(base, str(runs_dir))
    folder = runs_dir / run.name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(folder) if (folder / CHECKPOINT).exists() else None
    data = folder / "data.txt"
    if checkpoint is None:
        data.write_text(fingerprint(corpus))
    elif data.read_text() != fingerprint(corpus):
        raise ValueError(f"the data must be that of the checkpoint in {folder}; remove that folder to train again")
    if checkpoint is not None:
        _check_settings(dataclasses.asdict(settings), checkpoint["settings"], folder)
    trainer = Trainer(settings, corpus, folder, checkpoint)
    trainer.run(after_step)
    if trainer.progress < 1:
        trainer.save()
        return None
    result = make_result(run, trainer, measure(trainer, measured_sequences))
    write_result(result, results)
    return result


def _check_settings(planned: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    for name, value in planned.items():
        if name not in PLACES and saved[name] != value:
            raise ValueError(
                f"{name} must be {value!r} as planned, but the checkpoint in {folder} has {saved[name]!r}; "
                "remove that folder to train the run again"
            )
