# SPDX-License-Identifier: Apache-2.0
"""What must be installed beside torch, and what to say where it is not."""

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Raises
    ------
    ImportError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module}, which is not installed: pip install {module}") from error
