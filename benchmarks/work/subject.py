# SPDX-License-Identifier: Apache-2.0
"""What a worker holds open while a case is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cost:
    """The least that one call must do.

    Attributes
    ----------
    flops : float
        Multiplies and adds.
    bytes : float
        To and from memory.
    bandwidth : str
        Which ceiling holds for the bytes: "read" or "copy".
    """

    flops: float = 0.0
    bytes: float = 0.0
    bandwidth: str = "read"


@dataclass(frozen=True)
class Subject:
    """Somebody who does the work of a case.

    Attributes
    ----------
    name : str
    call : callable
        ``call(i)`` does the work on batch i.
    cost : Cost
        Of one call, on average over the batches.
    num_batches : int
        A sample goes through all of them.
    value : float or None
        For a case that counts instead of timing: the count.
    """

    name: str
    call: Callable[[int], object]
    cost: Cost
    num_batches: int = 1
    value: float | None = None


@dataclass
class Opened:
    """The subjects of a case, and why others are absent.

    Attributes
    ----------
    subjects : list of Subject
    absent : dict
        Name of a peer: reason.
    facts : dict
        What else is worth writing down, such as the number of rows.
    on_close : list of callable
        To be called when the case is done.
    """

    subjects: list[Subject] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Free everything."""
        for function in self.on_close:
            function()
        self.on_close.clear()
        self.subjects.clear()
