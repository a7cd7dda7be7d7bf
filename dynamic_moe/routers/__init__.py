# SPDX-License-Identifier: Apache-2.0
"""Routing rules, one file each."""

from dynamic_moe.routers.base import Router
from dynamic_moe.routers.top_k import TopKRouter
from dynamic_moe.routers.top_p import TopPRouter

__all__ = ["Router", "TopKRouter", "TopPRouter"]
