# SPDX-License-Identifier: Apache-2.0
"""Every measurement that the benchmarks make, as data. A case is found again by its name, also in another process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.shapes import SHAPES, Shape

Kind = Literal["experts", "sweep", "layer", "gating", "permute", "combine", "memory"]
Pass = Literal["forward", "forward+backward"]

DTYPES = ("float32", "bfloat16")
GATING_EXPERTS = (8, 16, 32, 64, 128, 256)
MANY_TOKENS = 16384


@dataclass(frozen=True)
class Case:
    """One measurement: the same work by several subjects, timed in turn.

    Attributes
    ----------
    name : str
        Unique.
    kind : str
        What the work is. "experts": the expert pass by everyone. "sweep": the expert pass by this library at several
        shapes, whose ratio counts. "layer": router, gating and experts. "memory" counts bytes and times nothing.
    passes : str
        "forward" (without a gradient to compute) or "forward+backward".
    dtype : str
        "float32" or "bfloat16".
    num_tokens : int
        T.
    shapes : tuple of Shape
        One, but for a sweep.
    quick : bool
        Whether ``--quick`` measures it.
    compare_allocators : bool
        Whether it is measured under the default allocator as well.
    """

    name: str
    kind: Kind
    passes: Pass
    dtype: str
    num_tokens: int
    shapes: tuple[Shape, ...]
    quick: bool = False
    compare_allocators: bool = False

    @property
    def shape(self) -> Shape:
        """The shape of a case that has one."""
        if len(self.shapes) != 1:
            raise ValueError(f"case {self.name} has {len(self.shapes)} shapes, expected one")
        return self.shapes[0]

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.passes == "forward+backward"


def all_cases() -> list[Case]:
    """Every case, in the order in which they are measured."""
    return [*_expert_cases(), *_sweep_cases(), *_layer_cases(), *_gating_cases(), *_movement_cases(), *_memory_cases()]


def case_named(name: str) -> Case:
    """The case of that name."""
    for case in all_cases():
        if case.name == name:
            return case
    raise ValueError(f"there is no case {name!r}")


def _expert_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for letter, many in (("A", 4096), ("B", 2048), ("C", 4096)):
            for passes in ("forward", "forward+backward"):
                yield _expert_case(
                    letter,
                    passes,
                    many,
                    dtype,
                    quick=letter == "C",
                    compare_allocators=(letter, passes) == ("A", "forward+backward"),
                )
        for letter, few in (("A", (512, 64, 8, 1)), ("B", (64, 8, 1))):
            for num_tokens in few:
                yield _expert_case(letter, "forward", num_tokens, dtype, quick=(letter, num_tokens) == ("A", 8))


def _expert_case(
    letter: str, passes: Pass, num_tokens: int, dtype: str, *, quick: bool, compare_allocators: bool = False
) -> Case:
    return Case(
        name=f"experts/{letter}/T{num_tokens}/{passes}/{dtype}",
        kind="experts",
        passes=passes,
        dtype=dtype,
        num_tokens=num_tokens,
        shapes=(SHAPES[letter],),
        quick=quick,
        compare_allocators=compare_allocators,
    )


def _sweep_cases() -> Iterator[Case]:
    """What dynamic routing saves, and what more experts cost at the same arithmetic: same rows, same H, same I."""
    dynamic = tuple(Shape(f"{mean:g} experts per token", 1024, 2816, 16, mean) for mean in (1.76, 2))
    growing = tuple(Shape(f"{experts} experts", 1024, 704, experts, 2) for experts in (8, 32, 128, 256))
    for dtype in DTYPES:
        for passes in ("forward", "forward+backward"):
            yield Case(f"dynamic/{passes}/{dtype}", "sweep", passes, dtype, 4096, dynamic)
            yield Case(f"growth/{passes}/{dtype}", "sweep", passes, dtype, MANY_TOKENS, growing)


def _layer_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for num_tokens in (4096, 1):
            name = f"layer/A/T{num_tokens}/forward/{dtype}"
            yield Case(name, "layer", "forward", dtype, num_tokens, (SHAPES["A"],))


def _gating_cases() -> Iterator[Case]:
    for num_experts in GATING_EXPERTS:
        shape = Shape("gating", 0, 0, num_experts, 1.8)
        for passes in ("forward", "forward+backward"):
            name = f"gating/E{num_experts}/{passes}"
            yield Case(name, "gating", passes, "float32", MANY_TOKENS, (shape,), quick=num_experts in (16, 128))


def _movement_cases() -> Iterator[Case]:
    yield Case("permute/E16", "permute", "forward", "float32", MANY_TOKENS, (SHAPES["A"],), quick=True)
    yield Case("permute/E128", "permute", "forward", "float32", MANY_TOKENS, (SHAPES["B"],))
    for dtype in DTYPES:
        for passes in ("forward", "forward+backward"):
            name = f"combine/{passes}/{dtype}"
            yield Case(name, "combine", passes, dtype, MANY_TOKENS, (SHAPES["A"],), quick=passes == "forward")


def _memory_cases() -> Iterator[Case]:
    for letter, num_tokens in (("A", 4096), ("C", 4096)):
        for dtype in DTYPES:
            name = f"memory/{letter}/{dtype}"
            quick = letter == "C"
            yield Case(name, "memory", "forward+backward", dtype, num_tokens, (SHAPES[letter],), quick=quick)
