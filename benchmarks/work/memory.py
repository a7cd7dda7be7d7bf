# SPDX-License-Identifier: Apache-2.0
"""Bytes that the expert pass keeps for its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import PEERS
from benchmarks.peers.base import Peer
from benchmarks.problem import Problem, make_problem
from benchmarks.work.subject import Cost, Opened, Subject


def open_memory(case: Case, wanted: set[str] | None) -> Opened:
    """Count for every peer whose backward pass is torch's to see."""
    problem = make_problem(case.shape, case.dtype, case.num_tokens, training=True)
    opened = Opened(facts={"least": least_bytes(case, problem), "rows": problem.num_rows})
    for peer_class in PEERS:
        if wanted is not None and peer_class.name not in wanted:
            continue
        reason = peer_class.missing() or peer_class.unable(problem) or _not_autograd(peer_class)
        if reason is None:
            kept = saved_bytes(peer_class(), problem)
            opened.subjects.append(Subject(peer_class.name, lambda _: None, Cost(), value=kept))
        else:
            opened.absent[peer_class.name] = reason
    return opened


def least_bytes(case: Case, problem: Problem) -> float:
    """X [T, H] and the pre-activation [R, 2I], and nothing else."""
    values = case.num_tokens * case.shape.hidden_size + problem.num_rows * 2 * case.shape.intermediate_size
    return float(values * problem.gate_up_proj.element_size())


def saved_bytes(peer: Peer, problem: Problem) -> float:
    """Bytes of the storages that autograd keeps, the weights left out, each counted once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (problem.gate_up_proj, problem.down_proj)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    step = peer.prepare(problem)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(problem.batches[0])
    peer.close()
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _not_autograd(peer_class: type[Peer]) -> str | None:
    return "keeps its tensors in buffers of its own" if peer_class.name == "kt-kernel" else None
