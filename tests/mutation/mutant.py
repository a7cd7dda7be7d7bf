# SPDX-License-Identifier: Apache-2.0
"""What a mutant is: one line of the product replaced by a wrong one, and the tests that must notice.

``old`` must stand exactly once in the file. When a kernel changes, run.py says which mutants no longer apply: give them
the new text, or replace them by a mutant of the same kind.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # a folder of tests/cpp, cuda/ and a folder of tests/cuda, or what to give to pytest
    needs: str = "scalar"  # the lowest CPU level at which the fault can show
    sanitizer: str = ""  # with which the tests are built where nothing else notices: "thread"
    only: str = "*"  # GoogleTest's filter, where all tests would take too long

    @property
    def is_native(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def is_cuda(self) -> bool:
        return self.tests.startswith("cuda/")

    @property
    def folder(self) -> str:
        return self.tests.removeprefix("cuda/")

    @property
    def target(self) -> str:
        """What CMake builds."""
        return f"{self.folder}_simt_test" if self.is_cuda else f"{self.tests}_test"
