# SPDX-License-Identifier: Apache-2.0
"""Reads disassembled CUDA kernels, as ``nvdisasm -c`` prints them,
and finds what fast ones must not have, or must.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+),")
LABEL = re.compile(r"^(\.L_x_\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L_x_\w+)\)")

TENSOR = ("HMMA", "IMMA", "DMMA")


@dataclass(frozen=True)
class Instruction:
    """An opcode with its modifiers, such as ``LDG.E.128``, and what follows it."""

    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """The modifiers."""
        return self.opcode.split(".")[1:]


@dataclass(frozen=True)
class Kernel:
    """A kernel's code; ``labels`` maps a label to the index of the instruction behind it."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[range]:
        """Return the indices of every loop, that is from the target of a backward branch to the branch."""
        loops = []
        for index, instruction in enumerate(self.instructions):
            target = TARGET.search(instruction.operands)
            begin = self.labels.get(target[1]) if target and instruction.name == "BRA" else None
            # ptxas ends a kernel with a branch to itself, which nothing reaches.
            if begin is not None and begin < index:
                loops.append(range(begin, index + 1))
        return loops

    def hot_loop(self, *names: str) -> list[Instruction]:
        """Return the loop with the most instructions of these names among those around no other such loop, or []."""
        loops = [loop for loop in self.loops() if count(self._code(loop), *names)]
        innermost = [
            loop
            for loop in loops
            if not any(other != loop and other.start >= loop.start and other.stop <= loop.stop for other in loops)
        ]
        return max(map(self._code, innermost), key=lambda code: count(code, *names), default=[])

    def _code(self, span: range) -> list[Instruction]:
        return self.instructions[span.start : span.stop]


def parse(text: str) -> Iterator[Kernel]:
    """Yield the kernels of a disassembly."""
    name, instructions, labels = None, [], {}
    for line in text.splitlines():
        if section := SECTION.match(line):
            if name is not None:
                yield Kernel(name, instructions, labels)
            name, instructions, labels = section[1], [], {}
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(Instruction(instruction[1], instruction[2].strip()))
    if name is not None:
        yield Kernel(name, instructions, labels)


def count(code: list[Instruction], *names: str) -> int:
    """Count the instructions of these names."""
    return sum(instruction.name in names for instruction in code)


def has_async_copy_of_16_bytes(code: list[Instruction]) -> bool:
    """Tell whether there is a 16-byte copy from global to shared memory that passes by the registers."""
    return any(each.name == "LDGSTS" and "128" in each.modifiers for each in code)


def local_memory_accesses(kernel: Kernel) -> list[str]:
    """Describe reads and writes of local memory: spilled registers, or arrays that are indexed at run time."""
    counts = Counter(each.name for each in kernel.instructions if each.name in ("LDL", "STL"))
    return [f"{number} {name} (local memory)" for name, number in sorted(counts.items())]


def narrow_stores(kernel: Kernel) -> list[str]:
    """Describe global stores of one or two bytes."""
    widths = {"U8", "S8", "U16", "S16", "8", "16"}
    narrow = [each.opcode for each in kernel.instructions if each.name == "STG" and widths & set(each.modifiers)]
    return [f"{number} {opcode} (narrow global store)" for opcode, number in sorted(Counter(narrow).items())]


def missing_from_hot_loop(kernel: Kernel) -> list[str]:
    """Describe what the hot loop of a tensor-core matmul must have, and lacks."""
    loop = kernel.hot_loop(*TENSOR)
    if not loop:
        return ["no loop with HMMA"]
    missing = []
    if not count(loop, "LDSM"):
        missing.append("no LDSM in the hot loop")
    if not has_async_copy_of_16_bytes(loop):
        missing.append("no 16-byte LDGSTS in the hot loop")
    return missing
