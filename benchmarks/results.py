# SPDX-License-Identifier: Apache-2.0
"""What was measured: as Python, and as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.work.subject import Cost

OUR_NAMES = ("dynamic_moe", "dynamic_moe, prepacked")
TITLE_SUFFIX = {"warm": "", "default": " (default allocator)", "mkl": " (MKL, fast path)"}  # of a setting


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, lower, upper)


@dataclass
class Row:
    """One subject under one setting.

    Attributes
    ----------
    subject, setting : str
    cost : Cost
        Of one call.
    seconds : list of float
        Per call, one entry for each round.
    value : float or None
        The count, where the case counts.
    """

    subject: str
    setting: str
    cost: Cost
    seconds: list[float] = field(default_factory=list)
    value: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this library."""
        return self.subject in OUR_NAMES

    @property
    def title(self) -> str:
        """Subject and setting, for people."""
        return self.subject + TITLE_SUFFIX[self.setting]


@dataclass
class CaseResult:
    """All rows of a case.

    Attributes
    ----------
    case : str
        Its name.
    kind, passes, dtype : str
        Of the case.
    rows : list of Row
    absent : dict
        Name of a peer: why it is not here.
    facts : dict
    ceilings : list of dict
        One for each round.
    others : list of float
        Fraction of the machine's CPU time that other programs took, for each round.
    date, commit : str
    """

    case: str
    kind: str
    passes: str
    dtype: str
    rows: list[Row]
    absent: dict[str, str]
    facts: dict[str, float]
    ceilings: list[dict[str, float]]
    others: list[float]
    date: str
    commit: str

    def quiet_rounds(self) -> list[int]:
        """The rounds to judge by: those in which nothing else ran, or all if there are not three of them."""
        quiet = [index for index, taken in enumerate(self.others) if taken <= QUIET]
        return quiet if len(quiet) >= 3 else list(range(len(self.others)))

    @property
    def disturbed(self) -> bool:
        """Whether other programs ran in the rounds that count."""
        return any(self.others[index] > QUIET for index in self.quiet_rounds())

    def spread(self, row: Row) -> Spread:
        """Seconds per call."""
        return Spread.of([row.seconds[index] for index in self.quiet_rounds()])

    def ceiling(self, name: str) -> float:
        """Median of a ceiling over the rounds that count."""
        return statistics.median(self.ceilings[index][name] for index in self.quiet_rounds())

    def bound(self, cost: Cost) -> float:
        """Seconds that the work takes at the ceilings: the roofline."""
        arithmetic = cost.flops / self.ceiling(f"{self.dtype}_flops")
        return max(arithmetic, cost.bytes / self.ceiling(f"{cost.bandwidth}_bandwidth"))

    def fraction(self, row: Row) -> float:
        """Of the roofline, that the row reaches."""
        return self.bound(row.cost) / self.spread(row).median

    def bound_name(self, cost: Cost) -> str:
        """What the work is bound by at the ceilings."""
        arithmetic = cost.flops / self.ceiling(f"{self.dtype}_flops")
        is_arithmetic = arithmetic >= cost.bytes / self.ceiling(f"{cost.bandwidth}_bandwidth")
        return f"{self.dtype} arithmetic" if is_arithmetic else f"{cost.bandwidth} bandwidth"

    def best(self, *, ours: bool) -> Row | None:
        """The fastest row of this library, or of all others."""
        rows = [row for row in self.rows if row.is_ours == ours and row.seconds]
        return min(rows, key=lambda row: self.spread(row).median, default=None)

    def row(self, subject: str) -> Row:
        """A subject's row under the warm setting."""
        for row in self.rows:
            if row.subject == subject and row.setting == "warm":
                return row
        raise KeyError(f"case {self.case} has no row of {subject!r}")


QUIET = 0.08


@dataclass
class Results:
    """A run of the benchmarks.

    Attributes
    ----------
    machine : dict
        See `benchmarks.machine.describe_machine`.
    ceilings : list of Ceilings
        Medians at the start of the run, with one thread and with all.
    cache_read : dict
        Threads: bytes per second from the last-level cache.
    allocators : dict
        Setting: allocator.
    cases : list of CaseResult
    """

    machine: dict[str, Any]
    ceilings: list[Ceilings]
    cache_read: dict[str, float]
    allocators: dict[str, str]
    cases: list[CaseResult] = field(default_factory=list)

    def case(self, name: str) -> CaseResult | None:
        """The result of a case, or None if it was not measured."""
        return next((result for result in self.cases if result.case == name), None)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Results:
        """From JSON."""
        data = json.loads(path.read_text())
        data["ceilings"] = [Ceilings(**ceilings) for ceilings in data["ceilings"]]
        data["cases"] = [_case_from_json(case) for case in data["cases"]]
        return Results(**data)

    def merge(self, older: Results) -> None:
        """Take over the cases of an older run that this one did not measure."""
        measured = {result.case for result in self.cases}
        self.cases += [result for result in older.cases if result.case not in measured]


def _case_from_json(data: dict[str, Any]) -> CaseResult:
    rows = [Row(**(row | {"cost": Cost(**row["cost"])})) for row in data["rows"]]
    return CaseResult(**(data | {"rows": rows}))


def _rounded(value: Any) -> Any:
    """Five digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
