# SPDX-License-Identifier: Apache-2.0
"""What is to be reached (``targets.json``), and whether a run reached it.

An entry names a case and one of these measures: "fraction" of the roofline, at least; "lead", how many times faster
than the best peer, at least; "ratio" of the times of two subjects, at most; "memory", bytes kept over the least, at
most. Beside its bound every timed expert pass is to be ahead of every peer; the report shows that in a column of its
own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import case_named
from benchmarks.results import CaseResult, Results

FILE = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Target:
    """One entry of the file."""

    work: str
    case: str
    measure: str
    bound: float
    of: tuple[str, ...] = ()

    @property
    def is_floor(self) -> bool:
        """Whether more is better."""
        return self.measure in ("fraction", "lead")


@dataclass(frozen=True)
class Verdict:
    """A target and what was reached.

    Attributes
    ----------
    target : Target
    reached : float or None
        None if it was not measured.
    subject : str
        Which of our rows it is.
    lead : float or None
        Time of the best peer over ours, where there are peers.
    best_peer : str
        Its title.
    """

    target: Target
    reached: float | None
    subject: str = ""
    lead: float | None = None
    best_peer: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the bound holds."""
        if self.reached is None:
            return False
        return self.reached >= self.target.bound if self.target.is_floor else self.reached <= self.target.bound

    @property
    def is_ahead(self) -> bool:
        """Whether no peer is faster."""
        return self.lead is None or self.lead >= 1


def load_targets() -> list[Target]:
    """All entries, in the order of the file.

    Raises
    ------
    ValueError
        If an entry names a case that does not exist.
    """
    targets = [Target(**(entry | {"of": tuple(entry.get("of", ()))})) for entry in json.loads(FILE.read_text())]
    for target in targets:
        case_named(target.case)
    return targets


def judge(results: Results) -> list[Verdict]:
    """Every target against a run."""
    return [_judge(target, results.case(target.case)) for target in load_targets()]


def _judge(target: Target, result: CaseResult | None) -> Verdict:
    if result is None:
        return Verdict(target, None)
    match target.measure:
        case "ratio":
            slow, fast = (result.spread(result.row(name)).median for name in target.of)
            return Verdict(target, slow / fast, "dynamic_moe")
        case "memory":
            return Verdict(target, (result.row("dynamic_moe").value or 0) / result.facts["least"], "dynamic_moe")
        case _:
            return _judge_time(target, result)


def _judge_time(target: Target, result: CaseResult) -> Verdict:
    ours, peer = result.best(ours=True), result.best(ours=False)
    if ours is None:
        return Verdict(target, None)
    lead = result.spread(peer).median / result.spread(ours).median if peer else None
    reached = result.fraction(ours) if target.measure == "fraction" else lead
    return Verdict(target, reached, ours.subject, lead, peer.title if peer else "")
