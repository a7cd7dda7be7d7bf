# SPDX-License-Identifier: Apache-2.0
"""Small native helpers of the benchmarks, compiled when they are first needed."""

import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD_FOLDER = HERE.parent / "build" / "benchmarks"


def compile_shared_library(source: Path, flags: list[str]) -> Path:
    """Compile one source file to a shared object.

    Parameters
    ----------
    source : Path
        A C or C++ file.
    flags : list of str
        Of the compiler, which is ``CXX`` or ``c++``.

    Returns
    -------
    Path
        The shared object; kept, and compiled anew when the source or the flags change.

    Raises
    ------
    RuntimeError
        If the compiler fails.
    """
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *flags, "-shared", "-fPIC", str(source)]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode() + cpu_flags()).hexdigest()[:12]
    library = BUILD_FOLDER / f"{source.stem}-{key}.so"
    if not library.exists():
        BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{compiler} could not compile {source.name}:\n{result.stderr}")
        unfinished.rename(library)  # in one step: another process may be looking
    return library


def cpu_flags() -> bytes:
    """The instruction sets of this CPU: -march=native means another thing on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return b""
    return next((line.encode() for line in lines if line.startswith(("flags", "Features"))), b"")
