# SPDX-License-Identifier: Apache-2.0
"""Tasks of known difficulty, one problem a line: ``question=answer``. They are told apart by what they are written in.

==================  ===============  ==================================================
task                example          answer
==================  ===============  ==================================================
copy                ``gdbh=gdbh``    the letters again
count               ``#xyxxy=3``     how many x there are
sum, n operations   ``1+0+2+2=2``    the sum modulo 3, after n = 1, ..., 6 additions
==================  ===============  ==================================================

The sums are one task at a growing depth: they are made of the same bytes, and each asks for one digit. What differs is
how much must be computed for it. All digits of a sum matter, and none tells more than any other.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

MODULUS = 3
# More zeros than other digits: were they equally likely, no digit alone would tell anything about the answer, and a
# network would need far longer to find into the task.
SUM_DIGITS = "00012"
MOST_OPERATIONS = 6
COPY_LETTERS = "abcdefgh"
COPY_LENGTH = 4
COUNT_LENGTH = 5


@dataclass(frozen=True)
class Problem:
    """A line of a task: ``question=answer`` and a line end."""

    question: str
    answer: str

    @property
    def line(self) -> bytes:
        """The bytes of it."""
        return f"{self.question}={self.answer}\n".encode("ascii")


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    Attributes
    ----------
    name : str
        As in the tables.
    depth : int
        Operations of a sum; 0 for the other tasks.
    chance : float
        Share of the answers' bytes that the best constant guess gets right.
    draw : callable
        Makes a problem.
    """

    name: str
    depth: int
    chance: float
    draw: Callable[[random.Random], Problem]


def draw_copy(generator: random.Random) -> Problem:
    """Letters, to be repeated."""
    letters = "".join(generator.choice(COPY_LETTERS) for _ in range(COPY_LENGTH))
    return Problem(letters, letters)


def draw_count(generator: random.Random) -> Problem:
    """Letters x and y; the answer is the number of x."""
    letters = "".join(generator.choice("xy") for _ in range(COUNT_LENGTH))
    return Problem(f"#{letters}", str(letters.count("x")))


def draw_sum(operations: int, generator: random.Random) -> Problem:
    """Digits below `MODULUS`, to be added modulo that."""
    digits = [int(generator.choice(SUM_DIGITS)) for _ in range(operations + 1)]
    return Problem("+".join(map(str, digits)), str(sum(digits) % MODULUS))


def sum_chance(operations: int) -> float:
    """Probability of 0, which is the likeliest answer."""
    # Characters of the group: the transform of the digits is 1 at frequency 0 and 3/5 - 2/5 / 2 at the other two.
    return (1 + 2 * (3 / 5 - 1 / 5) ** (operations + 1)) / MODULUS


def _sum_task(operations: int) -> Task:
    name = f"sum, {operations} {'operation' if operations == 1 else 'operations'}"
    return Task(name, operations, sum_chance(operations), functools.partial(draw_sum, operations))


TASKS = (
    Task("copy", 0, 1 / len(COPY_LETTERS), draw_copy),
    Task("count", 0, math.comb(COUNT_LENGTH, COUNT_LENGTH // 2) / 2**COUNT_LENGTH, draw_count),
    *(_sum_task(operations) for operations in range(1, MOST_OPERATIONS + 1)),
)


@dataclass(frozen=True)
class Lines:
    """Lines of all tasks in random order.

    Attributes
    ----------
    content : bytes
        The lines.
    task : list of int
        For each byte, the index of its task.
    answer : list of bool
        For each byte, whether it belongs to an answer.
    start : list of int
        For each byte, where its line starts.
    """

    content: bytes
    task: list[int]
    answer: list[bool]
    start: list[int]


def draw_lines(size: int, seed: int) -> Lines:
    """Draw problems, every task equally likely, until they fill ``size`` bytes; the last one may be cut."""
    generator = random.Random(seed)
    content = bytearray()
    task: list[int] = []
    answer: list[bool] = []
    start: list[int] = []
    while len(content) < size:
        index = generator.randrange(len(TASKS))
        problem = TASKS[index].draw(generator)
        start += [len(content)] * len(problem.line)
        content += problem.line
        task += [index] * len(problem.line)
        answer += [False] * (len(problem.question) + 1) + [True] * len(problem.answer) + [False]
    return Lines(bytes(content[:size]), task[:size], answer[:size], start[:size])
