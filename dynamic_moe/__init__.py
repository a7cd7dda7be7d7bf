# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts layers with any number of experts per token."""

import torch  # noqa: F401  loads the libraries that the extension needs

from . import _C  # noqa: F401
