# SPDX-License-Identifier: Apache-2.0
"""What must be installed beside torch, what to say where it is not, and up to which version it was tested."""

import importlib
import warnings
from typing import Any

# The newest minor version of transformers that the tests run on. pyproject.toml's upper bound is the next one.
NEWEST_TRANSFORMERS = (5, 24)


def require(module: str, purpose: str) -> Any:
    """Import a module of an optional dependency.

    Raises
    ------
    ImportError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}, which cannot be imported: pip install {package}") from error


def warn_if_untested(version: str) -> None:
    """Warn of a version of transformers that is newer than those that were tested: minor versions rename arguments."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) > NEWEST_TRANSFORMERS:
        newest = ".".join(map(str, NEWEST_TRANSFORMERS))
        warnings.warn(
            f"dynamic_moe was tested with transformers up to {newest}; {version} may have changed what it builds on: "
            f"pip install 'transformers<{NEWEST_TRANSFORMERS[0]}.{NEWEST_TRANSFORMERS[1] + 1}'",
            stacklevel=2,
        )
