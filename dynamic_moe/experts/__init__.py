# SPDX-License-Identifier: Apache-2.0
"""Kinds of experts, one file each."""

from dynamic_moe.experts.shared import SharedExpert
from dynamic_moe.experts.swiglu import SwiGLUExperts

__all__ = ["SharedExpert", "SwiGLUExperts"]
