# SPDX-License-Identifier: Apache-2.0
"""Fails if an AMX kernel reads staged memory before it was stored.

The tiles' configuration and the staging buffers lie on the stack; ordinary instructions store them, and LDTILECFG and
TILELOADD read them. A compiler that does not know that they do may drop the stores or move them behind the load, which
no test without a tile unit notices. This script follows every path through the machine code of each kernel: when a tile
is loaded from the stack, all that it reads must have been stored on all of them. A configuration may be a constant.

Usage: python check_tile_loads.py <objdump> <object>...
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

ROWS_TILE = 3  # the tile that is always loaded from a staging buffer; AmxTiles in amx_tile.h
WORD = 8  # what is stored is noted in pieces of so many bytes
UNKNOWN_LENGTH = 4096  # at most, of what a called function or a string instruction stores
TILE_LENGTH = 1024  # of what a loop stores through a pointer that moves on

FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+((?:rep[nz]* |lock |bnd |notrack |cs |data16 )*)([a-z]\S*)\s*(.*)$")
MEMORY = re.compile(r"^(?:%[a-z]s:)?(-?(?:0x)?[0-9a-f]+)?\((%\w+)?(?:,(%\w+),(\d))?\)$")
WIDTHS = {"z": 64, "y": 32, "x": 16}  # bytes of a vector register by the first letter of its name
PARAMETERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
NOT_KEPT_BY_CALLS = (*PARAMETERS, "rax", "r10", "r11")
WITHOUT_RESULT = ("cmp", "test", "j", "prefetch", "nop", "ret", "tile", "tdp", "ldtilecfg", "vzeroupper", "ud2")


class Instruction(NamedTuple):
    """``operands`` in the order of AT&T syntax: the result last."""

    address: int
    name: str
    operands: list[str]


class Value(NamedTuple):
    """What a register holds: a number, or an address so far from where the stack pointer was aligned, or beyond."""

    is_address: bool
    number: int
    is_beyond: bool = False


@dataclass
class State:
    """What is known on every path to an instruction."""

    values: dict[str | int, Value] = field(default_factory=dict)  # by register, or by place on the stack
    stored: set[int] = field(default_factory=set)  # pieces of the stack, by offset / WORD

    def copy(self) -> "State":
        return State(dict(self.values), set(self.stored))

    def meet(self, other: "State") -> bool:
        """Keep what both know; return whether that is less than before."""
        values = {}
        for key, value in self.values.items():
            met = common(value, other.values.get(key))
            if met is not None:
                values[key] = met
        stored = self.stored & other.stored
        changed = values != self.values or len(stored) < len(self.stored)
        self.values, self.stored = values, stored
        return changed

    def address(self, operand: str) -> Value | None:
        """Return the address on the stack that a memory operand names, if it is one that is known."""
        match = MEMORY.match(operand)
        if match is None or match[2] is None or match[3] is not None:
            return None
        base = self.values.get(register(match[2]))
        return base._replace(number=base.number + int(match[1] or "0", 16)) if base and base.is_address else None

    def store(self, place: Value, length: int) -> None:
        offset = place.number
        self.stored.update(range(-(-offset // WORD), (offset + (TILE_LENGTH if place.is_beyond else length)) // WORD))

    def is_stored(self, offset: int, length: int) -> bool:
        return all(piece in self.stored for piece in range(offset // WORD, -(-(offset + length) // WORD)))


def common(one: Value, other: Value | None) -> Value | None:
    """Return what holds of both: of two addresses, as a pointer has them that moves on in a loop, the first."""
    if other is None or one == other:
        return other
    if not (one.is_address and other.is_address) or (one.is_beyond and other.number < one.number):
        return None
    return Value(True, min(one.number, other.number), is_beyond=True)


def register(operand: str) -> str:
    """Return the name of the whole register: rax for eax, xmm3 for zmm3."""
    name = operand.removeprefix("%")
    if name[:3] in ("xmm", "ymm", "zmm"):
        return "xmm" + name[3:]
    if match := re.fullmatch(r"(r\d+)[dwb]?", name):
        return match[1]
    if match := re.fullmatch(r"[re]?([abcd])(?:x|l|h)|[re]?(si|di|bp|sp)l?", name):
        return f"r{match[1]}x" if match[1] else f"r{match[2]}"
    return name


def parse(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield the name and the code of each function of a disassembly."""
    name, code = None, []
    for line in text.splitlines():
        if function := FUNCTION.match(line):
            if name is not None:
                yield name, code
            name, code = function[2], []
        elif match := INSTRUCTION.match(line):
            operands = re.split(r",(?![^(]*\))", re.sub(r"\s*[#<].*", "", match[4])) if match[4] else []
            code.append(
                Instruction(int(match[1], 16), match[2].strip() + match[3], [each.strip() for each in operands])
            )
    if name is not None:
        yield name, code


def step(state: State, instruction: Instruction, written_by: dict[int, set[str]]) -> None:
    """Apply one instruction to what is known. `written_by`: the registers that each function of the object writes."""
    name, operands = instruction.name, instruction.operands
    if name.startswith("call"):
        for parameter in PARAMETERS:
            value = state.values.get(parameter)
            if value is not None and value.is_address:
                state.store(value, UNKNOWN_LENGTH)
        address = int(operands[0], 16) if re.fullmatch("[0-9a-f]+", operands[0]) else -1
        written = written_by.get(address, {*NOT_KEPT_BY_CALLS, *(f"xmm{number}" for number in range(32))})
        for key in written:
            state.values.pop(key, None)
    elif name.startswith("rep"):
        target = state.values.get("rdi")
        if target is not None and target.is_address:
            state.store(target, UNKNOWN_LENGTH)
        for key in ("rdi", "rsi", "rcx"):
            state.values.pop(key, None)
    elif name in ("push", "pop"):
        pointer = state.values.get("rsp")
        if pointer is not None:
            state.values["rsp"] = pointer._replace(number=pointer.number + (-8 if name == "push" else 8))
        if name == "pop":
            state.values.pop(register(operands[0]), None)
    elif operands and not name.startswith(WITHOUT_RESULT):
        write(state, name, operands)


def write(state: State, name: str, operands: list[str]) -> None:
    """Apply an instruction whose last operand is its result."""
    *inputs, target = operands
    if "(" in target:
        place = state.address(target)
        if place is None or not inputs:
            return
        is_whole = re.fullmatch(r"%(r\w+|[xyz]mm\d+)", inputs[-1]) is not None
        if (is_whole and name.lstrip("v").startswith("mov")) or name == "movq":
            state.store(place, 8 if name.endswith("movq") else WIDTHS.get(inputs[-1][1], 8))
        if not place.is_beyond:
            set_value(state, place.number, value_of(state, name, inputs))
        return
    if name == "and" and register(target) == "rsp":  # aligned: nothing is known of where older addresses lie now
        state.values, state.stored = {"rsp": Value(True, 0)}, set()
        return
    old = state.values.get(register(target))
    if name in ("add", "sub") and inputs[0].startswith("$") and old is not None:
        number = int(inputs[0][1:], 16)
        number -= (number >> 63) << 64
        set_value(state, register(target), old._replace(number=old.number + (number if name == "add" else -number)))
    else:
        set_value(state, register(target), value_of(state, name, inputs))


def registers_written(code: list[Instruction]) -> set[str]:
    """Return the registers that a function may change, as far as its caller sees: what it pushes it restores."""
    written = {register(each.operands[-1]) for each in code if each.operands and "(" not in each.operands[-1]}
    if any(each.name.startswith("call") for each in code):
        written.update(NOT_KEPT_BY_CALLS, (f"xmm{number}" for number in range(32)))
    if any(each.name.startswith("rep") for each in code):
        written.update(("rdi", "rsi", "rcx"))
    return written - {register(each.operands[0]) for each in code if each.name == "push"} - {"rsp"}


def set_value(state: State, key: str | int, value: Value | None) -> None:
    if value is None:
        state.values.pop(key, None)
    else:
        state.values[key] = value


def value_of(state: State, name: str, inputs: list[str]) -> Value | None:
    """Return what a move gives its target; None for anything else."""
    if len(inputs) != 1:
        return None
    if name == "lea":
        return state.address(inputs[0])
    if not re.fullmatch(r"v?mov(abs|q|dqa|l)?", name):
        return None
    if inputs[0].startswith("$"):
        return Value(False, int(inputs[0][1:], 16))
    if "(" in inputs[0]:
        place = state.address(inputs[0])
        return None if place is None or place.is_beyond else state.values.get(place.number)
    return state.values.get(register(inputs[0]))


def states(code: list[Instruction], written_by: dict[int, set[str]]) -> dict[int, State]:
    """Return what is known before each instruction that can be reached, by its index.

    First the values of registers, and only with these what was stored: a pointer that moves on is seen as one after the
    loop was followed once.
    """
    values = follow(code, written_by, {})
    return follow(code, written_by, {index: state.values for index, state in values.items()})


def follow(
    code: list[Instruction], written_by: dict[int, set[str]], values: dict[int, dict[str | int, Value]]
) -> dict[int, State]:
    """Follow all paths until nothing more is learned; `values` before each instruction where they are known."""
    index_of = {instruction.address: index for index, instruction in enumerate(code)}
    before = {0: State({"rsp": Value(True, 0)})}
    waiting = [0]
    while waiting:
        index = waiting.pop()
        instruction = code[index]
        state = before[index].copy()
        if index in values:
            state.values = dict(values[index])
        step(state, instruction, written_by)
        following = []
        if instruction.name.startswith("j"):
            target = instruction.operands[0].split()[0]
            if re.fullmatch(r"[0-9a-f]+", target) and int(target, 16) in index_of:
                following.append(index_of[int(target, 16)])
        if not instruction.name.startswith(("jmp", "ret", "ud2")) and index + 1 < len(code):
            following.append(index + 1)
        for each in following:
            if each not in before:
                before[each] = state.copy()
                waiting.append(each)
            elif before[each].meet(state):
                waiting.append(each)
    for index, known in values.items():
        before[index].values = known
    return before


def faults(name: str, code: list[Instruction], written_by: dict[int, set[str]]) -> list[str]:
    """Describe what a kernel reads from memory that was not stored before."""
    known = states(code, written_by)
    found = []
    staged_loads = 0
    for index, instruction in enumerate(code):
        if index not in known:
            continue
        where = f"{instruction.name} at {instruction.address:x}: "
        if instruction.name == "ldtilecfg":
            fault = fault_of_configuration(known[index], instruction.operands[0])
        elif instruction.name in ("tileloadd", "tileloaddt1"):
            tile = int(instruction.operands[1].removeprefix("%tmm"))
            staged_loads += tile == ROWS_TILE
            fault = fault_of_load(known[index], instruction.operands[0], tile, rows_of(name))
        else:
            continue
        found += [where + fault] if fault else []
    return found if staged_loads else [*found, f"tile {ROWS_TILE} is never loaded"]


def fault_of_configuration(state: State, operand: str) -> str:
    place = state.address(operand)
    is_stored = place is not None and not place.is_beyond and state.is_stored(place.number, 64)
    return "" if is_stored or "(%rip)" in operand else "the configuration is neither a constant nor stored before"


def fault_of_load(state: State, operand: str, tile: int, rows: int) -> str:
    match = MEMORY.match(operand)
    base = state.values.get(register(match[2])) if match and match[2] else None
    stride = state.values.get(register(match[3])) if match and match[3] else None
    if base is None or not base.is_address or base.is_beyond:
        return "cannot tell where the rows lie" if tile == ROWS_TILE else ""  # other tiles come from the heap, too
    if stride is None or stride.is_address:
        return "cannot tell how far apart the rows lie"
    number = rows if tile == ROWS_TILE else 16
    is_stored = all(state.is_stored(base.number + row * stride.number, 64) for row in range(number))
    return "" if is_stored else f"tile {tile} is loaded before its memory is stored"


def rows_of(name: str) -> int:
    """Return the rows of a kernel's tile, the last but one of its template's arguments."""
    match = re.search(r", (\d+), \d+>\(", name)
    return int(match[1]) if match else 16


def main(arguments: list[str]) -> int:
    objdump, *objects = arguments
    kernels = failures = 0
    for path in objects:
        command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = list(parse(text))
        written_by = {code[0].address: registers_written(code) for _, code in functions if code}
        for name, code in functions:
            if not any(instruction.name.startswith(("tileload", "ldtilecfg")) for instruction in code):
                continue
            kernels += 1
            for fault in faults(name, code, written_by):
                failures += 1
                print(f"{path}: {name}: {fault}")
    print(f"{len(objects)} objects, {kernels} kernels with tiles, {failures} faults")
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
