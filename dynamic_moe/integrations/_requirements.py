# SPDX-License-Identifier: Apache-2.0
"""What must be installed beside torch, and what to say where it is not."""

import importlib
from typing import Any


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
