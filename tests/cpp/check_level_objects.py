# SPDX-License-Identifier: Apache-2.0
"""Fails if an object file of a CPU level defines a weak symbol.

An inline function of a shared header, compiled with AVX-512 in such a file, is emitted as a weak symbol if the
compiler does not inline it. The linker keeps one definition for the whole program and may keep that one: then code
that was meant for any processor executes AVX-512.

Usage: python check_level_objects.py <nm> <object>...
"""

import subprocess
import sys


def weak_symbols(nm: str, path: str) -> list[str]:
    """Return the weak (W, V) and unique (u) symbols that an object file defines."""
    command = [nm, "--demangle", "--defined-only", "--format=posix", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # posix format: name, type, value, size; a demangled name may hold spaces.
    found = []
    for line in lines:
        name, kind, *_ = line.rsplit(maxsplit=3)
        if kind in "WVu":
            found.append(name)
    return found


def main(arguments: list[str]) -> int:
    nm, *objects = arguments
    if not objects:
        print("no object files given", file=sys.stderr)
        return 2
    failures = 0
    for path in objects:
        for symbol in weak_symbols(nm, path):
            failures += 1
            print(f"{path}: weak symbol {symbol}")
    print(f"{len(objects)} objects, {failures} weak symbols")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
