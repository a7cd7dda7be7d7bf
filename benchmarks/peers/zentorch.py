# SPDX-License-Identifier: Apache-2.0
"""zentorch: AMD's plugin for PyTorch on EPYC."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from benchmarks.peers.base import Outputs, Peer, Step, is_padded
from benchmarks.peers.vllm_cpu import INSTALL
from benchmarks.problem import Batch, Problem


class Zentorch(Peer):
    """``zentorch_fused_moe``, which packs the weights at its first call, in place, and knows them by their address."""

    name = "zentorch"
    prepacked = True
    weight_copies = (1, 1)

    @classmethod
    @cache
    def missing(cls) -> str | None:
        """Whether its operator loads."""
        if importlib.util.find_spec("zentorch") is None:
            return INSTALL
        try:
            importlib.import_module("zentorch")
        except (ImportError, OSError, RuntimeError) as error:
            return f"does not import with torch {torch.__version__}: {error}"
        if not hasattr(torch.ops.zentorch, "zentorch_fused_moe"):
            return "the installed zentorch has no operator zentorch_fused_moe"
        return None

    def prepare(self, problem: Problem) -> Step:
        """Copy the weights for it to pack; the first call is not timed."""
        gate_up, down = problem.gate_up_proj.clone(), problem.down_proj.clone()
        pairs = is_padded(problem)

        def step(batch: Batch) -> Outputs:
            x = batch.pair_x if pairs else batch.x
            ids = batch.pair_ids if pairs else batch.expert_ids
            weights = batch.pair_weights if pairs else batch.expert_weights
            y = torch.empty_like(x)
            torch.ops.zentorch.zentorch_fused_moe(y, x, gate_up, down, None, None, weights, ids, False, "silu")
            return Outputs(y)

        return step

    def close(self) -> None:
        """Forget the packed weights: they are known by their address, which the next problem may get."""
        flush = getattr(torch.ops.zentorch, "zentorch_flush_moe_weight_cache", None)
        if flush is not None:
            flush()
