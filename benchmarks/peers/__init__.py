# SPDX-License-Identifier: Apache-2.0
"""Everybody who can do the expert pass: this library first, then what it is measured against."""

from benchmarks.peers.base import Outputs, Peer, Step
from benchmarks.peers.hugging_face import HuggingFaceEager, HuggingFaceGroupedMm
from benchmarks.peers.kt_kernel import KtKernel
from benchmarks.peers.this_library import DynamicMoe, DynamicMoePrepacked
from benchmarks.peers.torch_grouped_mm import TorchGroupedMm
from benchmarks.peers.torch_loop import TorchLoop
from benchmarks.peers.vllm_cpu import SglangCpu, VllmCpu
from benchmarks.peers.zentorch import Zentorch

PEERS: tuple[type[Peer], ...] = (
    DynamicMoe,
    DynamicMoePrepacked,
    TorchLoop,
    HuggingFaceEager,
    HuggingFaceGroupedMm,
    TorchGroupedMm,
    VllmCpu,
    SglangCpu,
    Zentorch,
    KtKernel,
)

__all__ = ["PEERS", "Outputs", "Peer", "Step"]
