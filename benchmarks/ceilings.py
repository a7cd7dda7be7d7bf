# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: see ``ceilings.cpp``."""

import ctypes
import time
from dataclasses import asdict, dataclass
from functools import cache

from benchmarks.compile import HERE, compile_shared_library

MEBIBYTE = 1 << 20
# OpenMP's threads wait for the next region in a loop before they sleep, and would share the cores with what is
# measured: right after a matrix product two cores reached 44 of 80 GFLOP/s.
SPIN_SECONDS = 0.3
FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-Wno-psabi"]


@dataclass(frozen=True)
class Ceilings:
    """One measurement.

    Attributes
    ----------
    threads : int
    float32_flops : float
        Multiplies and adds per second in registers.
    bfloat16_flops : float
        The same by the bfloat16 dot product instruction; where there is none, `float32_flops`.
    read_bandwidth, copy_bandwidth : float
        Bytes per second, of a buffer much larger than the caches. A copied byte counts twice.
    """

    threads: int
    float32_flops: float
    bfloat16_flops: float
    read_bandwidth: float
    copy_bandwidth: float

    def flops(self, dtype: str) -> float:
        """Operations per second in ``dtype``, "float32" or "bfloat16"."""
        return {"float32": self.float32_flops, "bfloat16": self.bfloat16_flops}[dtype]

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure_ceilings(threads: int, seconds: float = 0.05) -> Ceilings:
    """Measure all ceilings once.

    Parameters
    ----------
    threads : int
    seconds : float, default 0.05
        Time for each of the two arithmetic ceilings. The other two take about 15 ms each at 40 GB/s.
    """
    library = _library()
    time.sleep(SPIN_SECONDS)
    float32 = library.multiply_add_rate(threads, seconds)
    bfloat16 = library.bfloat16_dot_rate(threads, seconds)
    return Ceilings(
        threads=threads,
        float32_flops=float32,
        bfloat16_flops=bfloat16 or float32,
        read_bandwidth=library.read_rate(threads, 256 * MEBIBYTE, 2),
        copy_bandwidth=library.copy_rate(threads, 256 * MEBIBYTE, 1),
    )


def measure_cache_read(threads: int, mebibytes: int = 8) -> float:
    """Bytes per second read from a buffer that fits into the last-level cache."""
    return float(_library().read_rate(threads, mebibytes * MEBIBYTE, 40))


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_shared_library(HERE / "ceilings.cpp", FLAGS)))
    for name in ("multiply_add_rate", "bfloat16_dot_rate"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int, ctypes.c_double]
        function.restype = ctypes.c_double
    for name in ("read_rate", "copy_rate"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
        function.restype = ctypes.c_double
    return library
