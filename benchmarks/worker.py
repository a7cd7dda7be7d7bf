# SPDX-License-Identifier: Apache-2.0
"""A process that holds the subjects of a case and times them on request.

One worker has this library and all peers, so that they are timed in one process, in turn. Others differ in what must be
known when a process starts: the allocator, and what MKL is told about the CPU.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.ceilings import Ceilings, measure_cache_read, measure_ceilings
from benchmarks.compile import BUILD_FOLDER
from benchmarks.preload import Setting, jemalloc_purge, worker_environment
from benchmarks.work.subject import Cost

PAUSE = 0.005  # seconds; the threads of the last subject's pool stop spinning meanwhile


@dataclass(frozen=True)
class SubjectInfo:
    """A subject, for the other side.

    Attributes
    ----------
    name : str
    cost : Cost
    value : float or None
        Its count, where the case counts.
    seconds : float
        What one sample takes if it goes through the batches once.
    """

    name: str
    cost: Cost
    value: float | None
    seconds: float


@dataclass(frozen=True)
class OpenedInfo:
    """An opened case, for the other side."""

    subjects: list[SubjectInfo]
    absent: dict[str, str]
    facts: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One timing.

    Attributes
    ----------
    seconds : float
        Per call.
    """

    seconds: float


class Worker:
    """The near side: a process under a setting, and calls into it.

    Parameters
    ----------
    setting : Setting
    threads : int
    """

    def __init__(self, setting: Setting, threads: int) -> None:
        self.setting = setting
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno()), str(threads)]
        # What a peer prints must not spoil the table, but is worth seeing when it goes wrong.
        BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
        log = (BUILD_FOLDER / f"worker-{setting.name}.log").open("w")
        self._process = subprocess.Popen(
            command,
            env=worker_environment(setting),
            pass_fds=[theirs.fileno()],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        log.close()
        self._connection: Connection[Any, Any] = Connection(ours.detach())

    def open(self, case: str, wanted: set[str] | None) -> OpenedInfo:
        """Build and check a case."""
        info: OpenedInfo = self._ask("open", case, wanted)
        return info

    def time(self, index: int, loops: int) -> Sample:
        """Time a subject of the open case."""
        sample: Sample = self._ask("time", index, loops)
        return sample

    def ceilings(self, threads: int) -> Ceilings:
        """Measure the ceilings."""
        ceilings: Ceilings = self._ask("ceilings", threads)
        return ceilings

    def cache_read(self, threads: int) -> float:
        """Measure reading from the last-level cache."""
        return float(self._ask("cache_read", threads))

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        return float(self._ask("cpu_seconds"))

    def close_case(self) -> None:
        """Free the open case."""
        self._ask("close_case")

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, name: str, *arguments: object) -> Any:
        try:
            self._connection.send((name, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError):  # it is gone: while it worked, or before it was asked
            status = self._process.wait()
            raise RuntimeError(f"the worker with the {self.setting.name} setting ended with status {status}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Server:
    """The far side."""

    def __init__(self, threads: int) -> None:
        import torch

        from benchmarks.work.subject import Opened

        torch.set_num_threads(threads)
        self._opened = Opened()

    def open(self, name: str, wanted: set[str] | None) -> OpenedInfo:
        from benchmarks.cases import case_named
        from benchmarks.work import open_case

        self._opened = opened = open_case(case_named(name), wanted)
        infos = [
            SubjectInfo(subject.name, subject.cost, subject.value, self._sample(index, 1) * subject.num_batches)
            for index, subject in enumerate(opened.subjects)
        ]
        gc.collect()
        return OpenedInfo(infos, opened.absent, opened.facts)

    def time(self, index: int, loops: int) -> Sample:
        time.sleep(PAUSE)
        if loops > 1:
            self._sample(index, 1)
        return Sample(self._sample(index, loops))

    def _sample(self, index: int, loops: int) -> float:
        """Seconds per call."""
        subject = self._opened.subjects[index]
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        for _ in range(loops):
            for batch in range(subject.num_batches):
                subject.call(batch)
        elapsed = time.perf_counter() - start
        gc.enable()
        return elapsed / (loops * subject.num_batches)

    def ceilings(self, threads: int) -> Ceilings:
        time.sleep(PAUSE)
        return measure_ceilings(threads)

    def cache_read(self, threads: int) -> float:
        return measure_cache_read(threads)

    def cpu_seconds(self) -> float:
        times = os.times()
        return times.user + times.system

    def close_case(self) -> None:
        self._opened.close()
        gc.collect()
        jemalloc_purge()


def serve(descriptor: int, threads: int) -> None:
    """Answer calls until the other side is gone."""
    connection: Connection[Any, Any] = Connection(descriptor)
    server = _Server(threads)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(server, name)(*arguments)
        except Exception as error:  # the other side raises it again
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    # Pickled classes must be known by their module's name, not as __main__.
    from benchmarks import worker

    worker.serve(int(sys.argv[1]), int(sys.argv[2]))
