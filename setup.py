# SPDX-License-Identifier: Apache-2.0
"""Adds the native extension to the package that pyproject.toml describes."""

import sys
from pathlib import Path

from setuptools import setup

COMPILING_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

options = {}
# Metadata and source distributions are made in environments without torch.
if COMPILING_COMMANDS & set(sys.argv):
    sys.path.insert(0, str(Path(__file__).resolve().parent / "build_support"))
    from native import BuildNative, extension

    options = {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildNative}}

setup(**options)
