# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts layers with any number of experts per token, for training and inference."""

from importlib.metadata import version

from dynamic_moe import losses, ops
from dynamic_moe.collect import CollectedRoutings, collect_routing, record_routing
from dynamic_moe.experts import SharedExpert, SwiGLUExperts
from dynamic_moe.layer import DynamicMoE
from dynamic_moe.routers import Router, TopKRouter, TopPRouter
from dynamic_moe.routing import RouterScores, Routing, RoutingStatistics

__all__ = [
    "CollectedRoutings",
    "DynamicMoE",
    "Router",
    "RouterScores",
    "Routing",
    "RoutingStatistics",
    "SharedExpert",
    "SwiGLUExperts",
    "TopKRouter",
    "TopPRouter",
    "collect_routing",
    "losses",
    "ops",
    "record_routing",
]

__version__ = version("dynamic_moe")
