# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools, built against the torch that is already installed.

Build isolation hides the installed packages, so a plain ``requires = ["torch"]`` would download a second torch (with
its CUDA libraries several GB) only to compile against its headers. The extension uses torch's stable ABI, so any
torch >= 2.13 is as good as another: the one in the environment that the package goes into is put on ``sys.path``,
behind everything of the isolated environment. Only where there is none, torch becomes a build requirement.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import build_meta

MINIMUM_TORCH = (2, 13)

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What the build needs beside ``build-system.requires``: nothing, or torch where none is installed."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if installed_torch() else [*requires, f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel against the installed torch."""
    use_installed_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel against the installed torch; the extension is put into the source tree."""
    use_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def use_installed_torch() -> None:
    """Make the installed torch importable; last on the path, so that it shadows nothing."""
    folder = installed_torch()
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))


def installed_torch() -> Path | None:
    """Return the site-packages folder of the target environment that holds a recent enough torch, if there is one."""
    for folder in candidate_folders():
        for distribution in metadata.distributions(name="torch", path=[str(folder)]):
            if release(distribution.version) >= MINIMUM_TORCH and (folder / "torch" / "include").is_dir():
                return folder
    return None


def candidate_folders() -> Iterator[Path]:
    """Yield the site-packages folders that the installed package will see, nearest first."""
    paths = sysconfig.get_paths()
    yield Path(paths["purelib"])
    yield Path(paths["platlib"])
    # pip isolates inside the target's own interpreter; other front ends make a virtual environment for the build.
    if active := os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield Path(active) / "lib" / version / "site-packages"
    if sys.prefix == sys.base_prefix or sees_system_packages(Path(sys.prefix)):
        yield from map(Path, site.getsitepackages([sys.base_prefix]))
        yield Path(site.getusersitepackages())


def sees_system_packages(environment: Path) -> bool:
    """Tell whether a virtual environment was made with ``--system-site-packages``."""
    try:
        text = (environment / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"^include-system-site-packages\s*=\s*true\s*$", text, re.MULTILINE | re.IGNORECASE) is not None


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``2.13.0+cpu`` -> ``(2, 13, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
