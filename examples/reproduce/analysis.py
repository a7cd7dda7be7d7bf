# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison over seeds, with what is known of their means. Every number of the page comes from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from reproduce.measure import TEXT
from reproduce.plan import DENSE, DYNAMIC, PAPER_P, Run, Variant
from reproduce.results import read_result
from reproduce.tasks import TASKS

CONFIDENCE = 0.95
SUMS = tuple(task for task in TASKS if task.depth)

Result = dict[str, Any]
Figure = Callable[[Result], float]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the t-interval around it, which a single seed does not have (NaN)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and the interval that holds the true one with probability `CONFIDENCE`.

    Raises
    ------
    ValueError
        If there are no values.
    """
    if not values:
        raise ValueError("values must hold at least one value, got none")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


class Comparison:
    """The results that are there, by variant and seed."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)

    @classmethod
    def read(cls, runs: Sequence[Run], folder: Path) -> Comparison:
        """Read the results of the runs that have one.

        Raises
        ------
        ValueError
            If none has, or they were trained with different settings.
        """
        found = [result for run in runs if (result := read_result(run, folder)) is not None]
        if not found:
            raise ValueError(f"results must hold at least one result, found none in {folder}")
        for name in ("steps", "tokens", "corpus"):
            if any(result[name] != found[0][name] for result in found):
                raise ValueError(f"{name} must be the same in all results in {folder}: train them again with --fresh")
        return cls(found)

    def of(self, variant: Variant) -> list[Result]:
        """The results of a variant at the threshold of the paper, in order of seeds."""
        chosen = [each for each in self.results if each["variant"] == variant.name and each["top_p"] in (None, PAPER_P)]
        return sorted(chosen, key=lambda each: int(each["seed"]))

    def sweep(self) -> list[Result]:
        """The dynamic results of the first seed, in order of thresholds."""
        chosen = [each for each in self.results if each["variant"] == DYNAMIC.name]
        seed = min((each["seed"] for each in chosen), default=0)
        return sorted((each for each in chosen if each["seed"] == seed), key=lambda each: float(each["top_p"]))

    def interval(self, variant: Variant, figure: Figure) -> Interval:
        """A figure over the seeds of a variant."""
        return t_interval([figure(result) for result in self.of(variant)])

    def difference(self, first: Variant, second: Variant, figure: Figure) -> Interval:
        """First minus second, seed by seed: the same seed is the same order of the training data."""
        others = {result["seed"]: figure(result) for result in self.of(second)}
        return t_interval([figure(each) - others[each["seed"]] for each in self.of(first) if each["seed"] in others])


def validation_bits(result: Result) -> float:
    """Loss on the validation mixture, in bits per byte."""
    return float(result["measured"]["validation_bits"])


def text_bits(result: Result) -> float:
    """Loss on the validation text alone, in bits per byte."""
    return float(result["measured"]["tasks"][TEXT]["bits"])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def experts(result: Result) -> float:
    """Experts per token and layer on the validation mixture; 0 in a dense model."""
    layers = result["measured"]["validation_experts"]
    return mean(layers) if layers else 0.0


def task_experts(name: str) -> Figure:
    """Experts per token and layer at the answers of a task, or over the text."""
    return lambda result: mean(result["measured"]["tasks"][name]["experts"])


def line_experts(name: str) -> Figure:
    """Experts per token and layer over whole lines of a task."""
    return lambda result: mean(result["measured"]["tasks"][name]["line_experts"])


def task_correct(name: str) -> Figure:
    """Share of the bytes of the answers (of the text) that are right."""
    return lambda result: float(result["measured"]["tasks"][name]["correct"])


def layer_experts(layer: int) -> Figure:
    """Experts per token in a layer, on the validation mixture."""
    return lambda result: float(result["measured"]["validation_experts"][layer])


def answers_correct(result: Result) -> float:
    """Mean of `task_correct` over the tasks, text left out."""
    return mean([task_correct(task.name)(result) for task in TASKS])


def training_experts(result: Result) -> float:
    """Experts per token and layer over the training as a whole: every step counts alike, as every step costs alike."""
    return mean([mean(layers) for layers in result["history"]["train_experts"]])


def expert_parameters(result: Result) -> float:
    """Parameters of the experts that a token meets on average; of the feed-forward layers in a dense model."""
    parameters = result["parameters"]
    if result["variant"] == DENSE.name:
        return float(parameters["total"] - parameters["shared"])
    return experts(result) * parameters["expert"] * parameters["layers"]


def active_parameters(result: Result) -> float:
    """All parameters that a token meets on average, embedding and router included."""
    return float(result["parameters"]["shared"]) + expert_parameters(result)


def depth_slope(result: Result) -> float:
    """Experts per token that each further operation of a sum adds at the ``=``, by least squares."""
    depths = [task.depth for task in SUMS]
    return float(stats.linregress(depths, [task_experts(task.name)(result) for task in SUMS]).slope)


def difficulty_correlation(result: Result) -> float:
    """Spearman's correlation, over the tasks, of an answer's cost with its experts; 0 where they are constant."""
    tasks = [result["measured"]["tasks"][task.name] for task in TASKS]
    counts = [mean(each["experts"]) for each in tasks]
    if min(counts) == max(counts):
        return 0.0
    return float(stats.spearmanr([each["bits"] for each in tasks], counts).statistic)


def token_correlation(result: Result) -> float:
    """Spearman's correlation, over the text, of the next byte's cost with the experts; 0 where they are constant."""
    return float(result["measured"]["experts_and_bits"] or 0)
