# SPDX-License-Identifier: Apache-2.0
"""All that is known about a run when it ends, for the table, the report, and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byte_lm.corpus import TextFile
from byte_lm.evaluation import Evaluation
from byte_lm.settings import Settings
from byte_lm.training import History

EXCERPT_BYTES = 2800


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes
    ----------
    settings, history
        Of the run.
    source : str
        What it learned.
    evaluation : Evaluation
        Of the validation text, at the end.
    excerpt, trace : TextFile, Evaluation
        Validation text to show, and what the model made of it.
    prompt, sample : str
        What the model was given to continue, and its continuation.
    total_parameters, active_parameters : int
        Of the model, and those that a byte meets on average.
    tokens : int
        Bytes trained on.
    seconds : float
        Time of training, evaluations included.
    finished : bool
        Whether the run went to its end.
    facts : dict
        Names and values of the machine and the versions.
    """

    settings: Settings
    history: History
    source: str
    evaluation: Evaluation
    excerpt: TextFile
    trace: Evaluation
    prompt: str
    sample: str
    total_parameters: int
    active_parameters: int
    tokens: int
    seconds: float
    finished: bool
    facts: dict[str, str]

    @property
    def routed(self) -> bool:
        """Whether the model has experts."""
        return self.evaluation.experts.numel() > 0

    @property
    def mean_experts(self) -> float:
        """Mean number of experts of a byte and layer."""
        return self.evaluation.mean_experts

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.history.step)

    @property
    def first_bits(self) -> float:
        """Cost of the first batch, in bits per byte."""
        return self.history.bits[0] if self.history.bits else float("nan")

    @property
    def last_bits(self) -> float:
        """Mean cost of the last 30 batches, in bits per byte."""
        recent = self.history.bits[-30:]
        return sum(recent) / len(recent) if recent else float("nan")

    @property
    def speed(self) -> float:
        """Bytes per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The final numbers, for programs."""
        return {
            "name": self.settings.name,
            "router": self.settings.router,
            "finished": self.finished,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "validation_bits_per_byte": self.evaluation.bits_per_byte,
            "mean_experts_per_byte": self.mean_experts if self.routed else None,
            "experts_per_layer": self.evaluation.experts_per_layer,
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
        }


def choose_excerpt(files: Sequence[TextFile]) -> TextFile:
    """Return the beginning of the file of middle size, cut at the end of a line."""
    file = sorted(files, key=lambda file: (len(file.content), file.name))[len(files) // 2]
    content = file.content[:EXCERPT_BYTES]
    if len(content) < len(file.content):
        content = content[: content.rfind(b"\n") + 1] or content
    return TextFile(file.name, content)


def millions(count: float) -> str:
    """Write a large number."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,.0f}"


def duration(seconds: float) -> str:
    """Write a time."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
