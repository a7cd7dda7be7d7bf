# SPDX-License-Identifier: Apache-2.0
"""The native extension ``dynamic_moe._C``, built through ``torch.utils.cpp_extension``.

One shared object holds the kernels, the operators (LibTorch stable ABI) and a pybind11 module. ``cpp_extension``
compiles every source with one set of flags, so the kernels of a CPU level (``*_cpu_<level>.cpp``) are compiled first,
each with the flags of its level, and handed to it as objects. Sources are found by name; a new kernel needs no change
here.

Environment variables: ``DYNAMIC_MOE_CUDA`` (0: never build CUDA code, 1: fail without nvcc, unset: build it where nvcc
is found), ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``, ``CXXFLAGS``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import ninja
import pybind11
from compile_flags import (
    CSRC,
    ROOT,
    base_flags,
    build_temp,
    compiled_levels,
    compiler,
    cuda_flags,
    flag_table,
    level_of,
)
from cuda_toolkit import cuda_architectures, cuda_toolkit, nvcc_version
from setuptools import Extension
from torch.utils import cpp_extension

TORCH_TARGET = (2, 13)

# cpp_extension and this file both look for ninja on PATH; pip puts it where PATH need not point.
os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def extension() -> Extension:
    """Describe ``dynamic_moe._C``: every source but those of the CPU levels, which `BuildNative` adds as objects."""
    toolkit = cuda_toolkit()
    cuda_sources = sorted(CSRC.rglob("*.cu")) if toolkit else []
    cpp_sources = [path for path in sorted(CSRC.rglob("*.cpp")) if level_of(path) is None]
    sources = [os.path.relpath(path, ROOT) for path in cpp_sources + cuda_sources]
    make = cpp_extension.CUDAExtension if cuda_sources else cpp_extension.CppExtension
    if toolkit and cuda_sources:
        cpp_extension.CUDA_HOME = str(toolkit)  # None there if torch is a CPU build
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # cpp_extension would ask a GPU
            os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(toolkit)
    elif os.environ.get("DYNAMIC_MOE_CUDA") == "1":
        print("warning: csrc/ holds no CUDA kernel, so this is a CPU build", file=sys.stderr)
    result = make(
        name="dynamic_moe._C",
        sources=sources,
        include_dirs=[str(CSRC), pybind11.get_include()],
        define_macros=list(macros(toolkit if cuda_sources else None)),
        extra_compile_args={"cxx": [*base_flags(), *header_flags()], "nvcc": cuda_flags()},
        extra_link_args=[f"-Wl,--version-script={CSRC / 'bindings' / 'exports.map'}"],
    )
    # Nothing but the stable ABI of libtorch_cpu is used, and the CUDA runtime is linked statically: the same file loads
    # on a CPU build and on a CUDA build of torch.
    result.libraries = ["torch_cpu", *(["cudart_static", "rt", "pthread", "dl"] if cuda_sources else [])]
    return result


class BuildNative(cpp_extension.BuildExtension):
    """`cpp_extension.BuildExtension` that compiles the kernels of the CPU levels first."""

    def finalize_options(self) -> None:
        """Keep the objects of editable builds, so that the next one compiles only what changed."""
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = str(build_temp())

    def build_extensions(self) -> None:
        """Compile the levels, all files at once, then everything else."""
        objects = compile_levels(Path(self.build_temp).resolve() / "levels")
        for ext in self.extensions:
            ext.extra_objects = [*ext.extra_objects, *map(str, objects)]
        super().build_extensions()


def compile_levels(folder: Path) -> list[Path]:
    """Compile every ``*_cpu_<level>.cpp`` with the flags of its level, in parallel; return the objects."""
    flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), "-std=c++20", f"-I{CSRC}", *base_flags()]
    rules = [
        "rule compile",
        f"  command = {shlex.join([*compiler(), *flags])} $level -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for source in sorted(CSRC.rglob("*.cpp")):
        level = level_of(source)
        if level not in compiled_levels():
            continue
        objects.append(folder / source.relative_to(CSRC).with_suffix(".o"))
        rules.append(f"build {ninja_path(objects[-1])}: compile {ninja_path(source)}")
        rules.append(f"  level = {shlex.join(flag_table()[level])}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run(["ninja", "-C", str(folder), *jobs], check=True)
    return objects


def ninja_path(path: Path) -> str:
    """Escape a path for a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def macros(toolkit: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the macros that tell the stable ABI its target and ``build_info()`` what was built."""
    major, minor = TORCH_TARGET
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield "TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"
    yield "DYNAMIC_MOE_VERSION", f'"{project["version"]}"'
    if toolkit is not None:
        yield "DYNAMIC_MOE_CUDA_TOOLKIT", f'"{nvcc_version(toolkit)}"'
        yield "DYNAMIC_MOE_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'


def header_flags() -> list[str]:
    """Return flags that keep torch's headers out of the warnings, and their place on this machine out of the binary."""
    torch = Path(cpp_extension.__file__).parent.parent
    return ["-isystem", str(torch / "include"), f"-ffile-prefix-map={torch}=torch"]
