# SPDX-License-Identifier: Apache-2.0
"""kt-kernel, the CPU side of KTransformers: the only other one with compiled backward kernels for experts."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from benchmarks.peers.base import Outputs, Peer, Step, is_padded
from benchmarks.peers.vllm_cpu import INSTALL
from benchmarks.problem import Batch, Problem


class KtKernel(Peer):
    """Its bfloat16 fine-tuning kernels, with the gradients of the full weights."""

    name = "kt-kernel"
    dtypes = (torch.bfloat16,)
    trains = True
    prepacked = True
    weight_copies = (4, 5)

    def __init__(self) -> None:
        self._experts: Any = None

    @classmethod
    @cache
    def missing(cls) -> str | None:
        """Whether its fine-tuning kernels import."""
        if importlib.util.find_spec("kt_kernel") is None:
            return INSTALL
        try:
            module = importlib.import_module("kt_kernel.sft.amx")
        except (ImportError, OSError, RuntimeError) as error:
            return f"does not import with torch {torch.__version__}: {error}"
        return None if module._HAS_AMX_SFT_SUPPORT else "its build for this CPU has no fine-tuning kernels"

    def prepare(self, problem: Problem) -> Step:
        """Hand over the weights, which are copied and packed."""
        pairs = is_padded(problem)
        self._experts = experts = self._build(problem, pairs)

        def step(batch: Batch) -> Outputs:
            x = batch.pair_x if pairs else batch.x
            ids = batch.pair_ids if pairs else batch.expert_ids
            weights = batch.pair_weights if pairs else batch.expert_weights
            y = experts.forward(x, ids, weights, save_for_backward=problem.training)
            if not problem.training:
                return Outputs(y)
            dx, d_weights = experts.backward(batch.pair_dy if pairs else batch.dy)
            # The projections' gradients stay in its own buffers, gate and up apart, as its optimizer reads them.
            return Outputs(y, dx, None, experts.grad_down_proj_buf, d_weights)

        return step

    @staticmethod
    def _build(problem: Problem, pairs: bool) -> Any:
        shape = problem.shape
        rows = max((batch.pair_x if pairs else batch.x).shape[0] for batch in problem.batches)
        experts = importlib.import_module("kt_kernel.sft.amx").AMXSFTMoEWrapper(
            layer_idx=0,
            num_experts=shape.num_experts,
            num_experts_per_tok=1 if pairs else int(shape.mean_experts),
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            num_gpu_experts=0,
            cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1,
            weight_path="",
            chunked_prefill_size=rows,
            lora_rank=0,
            method="AMXBF16_SFT",
            full_weight_grad=True,
        )
        gate, up = (half.contiguous() for half in problem.gate_up_proj.chunk(2, dim=1))
        experts.init_full_weight_grad_buffers(gate, up, problem.down_proj)
        experts.load_weights_from_tensors(gate, up, problem.down_proj, torch.arange(shape.num_experts))
        return experts

    def close(self) -> None:
        """Free its weights and its buffers, which it keeps by the number of tokens."""
        if self._experts is not None:
            self._experts = None
            importlib.import_module("kt_kernel.sft.base").KExpertsSFTBuffer.clear_cache()
