# SPDX-License-Identifier: Apache-2.0
"""Times the subjects of a case in turn, round by round, with the machine's ceilings in every round."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.machine import CpuTime, commit, describe_machine, taken_by_others
from benchmarks.preload import settings
from benchmarks.results import QUIET, TITLE_SUFFIX, CaseResult, Row
from benchmarks.worker import OpenedInfo, Sample, Worker

SAMPLE_SECONDS = 0.04  # calls are repeated until a sample takes so long
MKL_PEERS = {"Python loop over experts", "Hugging Face grouped_mm", "F.grouped_mm composition"}
ALLOCATOR_PEERS = {"dynamic_moe", "Hugging Face grouped_mm", "F.grouped_mm composition"}


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes
    ----------
    rounds : int
        Undisturbed rounds that are wanted.
    seconds : float
        Time per case after which no further round is begun, once there are ``least_rounds``.
    least_rounds, most_rounds : int
        Rounds in all, disturbed ones included.
    """

    rounds: int
    seconds: float
    least_rounds: int
    most_rounds: int


@dataclass(frozen=True)
class _Entry:
    """A subject in a worker."""

    worker: Worker
    index: int
    loops: int
    row: Row

    def sample(self) -> Sample:
        return self.worker.time(self.index, self.loops)


class WorkerPool:
    """Workers by setting, started when first needed.

    Parameters
    ----------
    threads : int
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.settings = settings(threads)
        self._workers: dict[str, Worker] = {}

    def __getitem__(self, setting: str) -> Worker:
        if setting not in self._workers:
            self._workers[setting] = Worker(self.settings[setting], self.threads)
        return self._workers[setting]

    def cpu_seconds(self) -> float:
        """CPU time of all workers and of this process."""
        times = os.times()
        return times.user + times.system + sum(worker.cpu_seconds() for worker in self._workers.values())

    def stop(self) -> None:
        """End them; a worker that is asked for afterwards is a new one."""
        while self._workers:
            self._workers.popitem()[1].stop()


def settings_of(case: Case, pool: WorkerPool, wanted: set[str] | None) -> dict[str, set[str] | None]:
    """Under which settings a case is measured, and which peers under each (None: all)."""
    found: dict[str, set[str] | None] = {"warm": wanted}
    if case.kind != "experts":
        return found
    if case.dtype == "float32" and "mkl" in pool.settings:
        found["mkl"] = MKL_PEERS if wanted is None else MKL_PEERS & wanted
    if case.compare_allocators:
        found["default"] = ALLOCATOR_PEERS if wanted is None else ALLOCATOR_PEERS & wanted
    return {setting: peers for setting, peers in found.items() if peers is None or peers}


def measure_case(
    case: Case, pool: WorkerPool, plan: Plan, wanted: set[str] | None, tell: Callable[[str], None]
) -> CaseResult:
    """Measure a case.

    Parameters
    ----------
    case : Case
    pool : WorkerPool
    plan : Plan
    wanted : set of str, optional
        Names of peers. Default: all.
    tell : callable
        Told what is going on, for the display.
    """
    entries: list[_Entry] = []
    opened: dict[str, OpenedInfo] = {}
    for setting, peers in settings_of(case, pool, wanted).items():
        tell(f"preparing ({setting})")
        opened[setting] = pool[setting].open(case.name, peers)
        entries += _entries(opened[setting], pool[setting])
    result = CaseResult(
        case=case.name,
        kind=case.kind,
        passes=case.passes,
        dtype=case.dtype,
        rows=[entry.row for entry in entries],
        absent={
            peer + TITLE_SUFFIX[setting]: reason
            for setting, info in opened.items()
            for peer, reason in info.absent.items()
        },
        facts=opened["warm"].facts,
        ceilings=[],
        others=[],
        date=str(describe_machine(pool.threads)["date"]),
        commit=commit(),
    )
    if case.kind != "memory":
        _measure_rounds(result, entries, pool, plan, tell)
    for setting in opened:
        pool[setting].close_case()
    return result


def _entries(opened: OpenedInfo, worker: Worker) -> list[_Entry]:
    entries = []
    for index, subject in enumerate(opened.subjects):
        loops = max(1, math.ceil(SAMPLE_SECONDS / max(subject.seconds, 1e-7)))
        row = Row(subject.name, worker.setting.name, subject.cost, value=subject.value)
        entries.append(_Entry(worker, index, loops, row))
    return entries


def _measure_rounds(
    result: CaseResult, entries: list[_Entry], pool: WorkerPool, plan: Plan, tell: Callable[[str], None]
) -> None:
    start = time.monotonic()
    while not _is_enough(result.others, time.monotonic() - start, plan):
        number = len(result.others)
        tell(f"round {number + 1}")
        clock, own = CpuTime.now(), pool.cpu_seconds()
        result.ceilings.append(pool["warm"].ceilings(pool.threads).as_dict())
        # Each round begins with another subject, so that none always follows the same one.
        for position in range(len(entries)):
            entry = entries[(position + number) % len(entries)]
            entry.row.seconds.append(entry.sample().seconds)
        result.others.append(taken_by_others(clock, CpuTime.now(), pool.cpu_seconds() - own))


def _is_enough(others: list[float], elapsed: float, plan: Plan) -> bool:
    quiet = sum(taken <= QUIET for taken in others)
    if quiet >= plan.rounds or len(others) >= plan.most_rounds:
        return True
    return len(others) >= plan.least_rounds and elapsed > plan.seconds
