# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves behind: one small JSON file, from which every number of the page comes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import dynamic_moe
from byte_lm.model import moe_layers, parameter_counts
from byte_lm.training import History, Trainer
from dynamic_moe import _C
from dynamic_moe.info import processor_name
from reproduce.mixture import fingerprint
from reproduce.plan import Run

FOLDER = Path(__file__).resolve().parent / "results"
FORMAT = 1
DIGITS = 6  # significant, of every float in a file


def make_result(run: Run, trainer: Trainer, measured: dict[str, Any]) -> dict[str, Any]:
    """Gather a finished run.

    Parameters
    ----------
    measured : dict
        What `reproduce.measure.measure` returned.
    """
    total, shared = parameter_counts(trainer.model, 0)
    layers = moe_layers(trainer.model)
    settings = dataclasses.asdict(trainer.settings)
    for place in ("runs_dir", "name", "resume"):
        del settings[place]
    return {
        "format": FORMAT,
        "run": run.name,
        "variant": run.variant.name,
        "seed": run.seed,
        "top_p": run.top_p,
        "settings": settings,
        "corpus": {
            "text": trainer.corpus.source,
            "bytes": len(trainer.corpus.train),
            "fingerprint": fingerprint(trainer.corpus),
        },
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "parameters": {
            "total": total,
            "shared": shared if layers else total - _dense_feed_forward(trainer),
            "expert": sum(p.numel() for p in layers[0].experts.parameters()) // layers[0].num_experts if layers else 0,
            "layers": len(layers),
        },
        "history": history_of(trainer.history, trainer.settings.eval_interval),
        "measured": measured,
        "environment": environment(),
    }


def _dense_feed_forward(trainer: Trainer) -> int:
    """Parameters of the feed-forward layers of a dense model."""
    return sum(p.numel() for name, p in trainer.model.named_parameters() if ".feed_forward." in name)


def history_of(history: History, interval: int) -> dict[str, Any]:
    """Thin a history to one row per ``interval`` steps: the validation at its end, and means of training over it."""
    rows: dict[str, list[Any]] = {"step": [], "validation_bits": [], "train_bits": [], "train_experts": []}
    for step, bits in zip(history.eval_step, history.eval_bits, strict=True):
        begin = max(0, step - interval)
        experts = torch.tensor(history.experts[begin:step], dtype=torch.float64)
        rows["step"].append(step)
        rows["validation_bits"].append(bits)
        rows["train_bits"].append(sum(history.bits[begin:step]) / (step - begin))
        rows["train_experts"].append(experts.mean(0).tolist())
    return rows


def environment() -> dict[str, str]:
    """The machine and the versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "cpu_level": _C.cpu_isa(),
        "dynamic_moe": dynamic_moe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Write a result; a file that is there is replaced only by a complete one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['run']}.json"
    incomplete = path.with_suffix(".part")
    incomplete.write_text(json.dumps(rounded(result), indent=1) + "\n")
    os.replace(incomplete, path)
    return path


def rounded(value: Any) -> Any:
    """Round every float in nested lists and dicts to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run, or None if it has not finished.

    Raises
    ------
    ValueError
        If another version of this program wrote it.
    """
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {result.get('format')!r}")
    return result
