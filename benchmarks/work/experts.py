# SPDX-License-Identifier: Apache-2.0
"""The expert pass, by everybody who is there; each is checked against the Python loop in float32 before it is timed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import Case
from benchmarks.machine import available_memory
from benchmarks.peers import PEERS, Outputs, Peer, Step
from benchmarks.peers.base import is_padded
from benchmarks.peers.this_library import DynamicMoe
from benchmarks.peers.torch_loop import TorchLoop
from benchmarks.problem import Batch, Problem, make_problem
from benchmarks.shapes import Shape
from benchmarks.work.subject import Cost, Opened, Subject

SPARE_BYTES = 2e9
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative error of a whole tensor


def open_experts(case: Case, wanted: set[str] | None) -> Opened:
    """Build the problem, and prepare and check every peer.

    Parameters
    ----------
    case : Case
    wanted : set of str, optional
        Names of peers. Default: all.
    """
    problem = make_problem(case.shape, case.dtype, case.num_tokens, case.training)
    expected = _expected(problem)
    weights = _fingerprint(problem)
    opened = Opened(facts={"rows": problem.num_rows, "batches": len(problem.batches)})
    for peer_class in PEERS:
        if wanted is None or peer_class.name in wanted:
            _add_peer(opened, peer_class, problem, expected, _cost(case.shape, problem, case))
            if _fingerprint(problem) != weights:
                raise RuntimeError(f"{peer_class.name} changed the weights that all peers share")
    return opened


def _expected(problem: Problem) -> Outputs:
    """The first batch in float32: more exact, and without AVX-512 much faster, than bfloat16."""
    batch = problem.batches[0]
    batch = replace(
        batch, x=batch.x.float(), dy=batch.dy.float(), pair_x=batch.pair_x.float(), pair_dy=batch.pair_dy.float()
    )
    exact = replace(
        problem,
        dtype=torch.float32,
        gate_up_proj=problem.gate_up_proj.float(),
        down_proj=problem.down_proj.float(),
        batches=[batch],
    )
    return TorchLoop().prepare(exact)(batch)


def open_sweep(case: Case) -> Opened:
    """Several shapes by this library."""
    opened = Opened()
    for shape in case.shapes:
        problem = make_problem(shape, case.dtype, case.num_tokens, case.training)
        step = DynamicMoe().prepare(problem)
        opened.subjects.append(
            Subject(shape.name, partial(_call, step, problem), _cost(shape, problem, case), len(problem.batches))
        )
        opened.facts[f"rows, {shape.name}"] = problem.num_rows
    return opened


def _add_peer(opened: Opened, peer_class: type[Peer], problem: Problem, expected: Outputs, cost: Cost) -> None:
    reason = peer_class.missing() or peer_class.unable(problem) or _too_large(peer_class, problem)
    if reason is None:
        peer = peer_class()
        opened.on_close.append(peer.close)
        try:
            step = peer.prepare(problem)
            reason = _fault(step(problem.batches[0]), expected, problem)
            for batch in problem.batches[1:]:
                step(batch)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = f"failed: {str(error).splitlines()[0]}"
    if reason is None:
        call = partial(_call, step, problem)
        opened.subjects.append(Subject(peer_class.name, call, cost, len(problem.batches)))
    else:
        opened.absent[peer_class.name] = reason


def _fingerprint(problem: Problem) -> list[int]:
    """Changes with the weights."""
    bits = torch.int32 if problem.dtype == torch.float32 else torch.int16
    return [int(weight.view(bits).sum(dtype=torch.int64)) for weight in (problem.gate_up_proj, problem.down_proj)]


def _call(step: Step, problem: Problem, index: int) -> Outputs:
    return step(problem.batches[index])


def _cost(shape: Shape, problem: Problem, case: Case) -> Cost:
    flops = shape.flops(1, case.training) * problem.num_rows
    distinct = sum(batch.distinct_experts for batch in problem.batches) / len(problem.batches)
    values = distinct * shape.expert_values + 2 * case.num_tokens * shape.hidden_size
    # A forward pass reads the weights of the experts in use. Training also writes as much: there it is never the bound.
    return Cost(flops=flops, bytes=values * problem.gate_up_proj.element_size(), bandwidth="read")


def _too_large(peer_class: type[Peer], problem: Problem) -> str | None:
    copies = peer_class.weight_copies[problem.training]
    weights = problem.gate_up_proj.nbytes + problem.down_proj.nbytes
    needed = copies * weights + SPARE_BYTES
    if needed > available_memory():
        return f"not enough memory: {needed / 1e9:.1f} GB are needed"
    return None


def _fault(outputs: Outputs, expected: Outputs, problem: Problem) -> str | None:
    """What is wrong with the outputs of the first batch, or None."""
    batch = problem.batches[0]
    if is_padded(problem) and outputs.y.shape[0] == batch.num_rows != batch.x.shape[0]:
        outputs = _as_tokens(outputs, batch)
    for name, actual, wanted in zip(Outputs._fields, outputs, expected, strict=True):
        if actual is not None and wanted is not None:
            error = relative_error(actual, wanted)
            if not error < TOLERANCE[problem.dtype]:
                return f"wrong result: {name} is off by {error:.1e}"
    return None


def _as_tokens(outputs: Outputs, batch: Batch) -> Outputs:
    """Sum what was computed for pairs by token, as the user of such a peer would have to; this is not timed."""

    def sum_by_token(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(batch.x.shape).index_add_(0, batch.pair_token, rows.float())

    if outputs.dx is None or outputs.d_expert_weights is None:
        return Outputs(sum_by_token(outputs.y))
    d_weights = torch.zeros(batch.expert_weights.shape)
    d_weights[batch.expert_weights > 0] = outputs.d_expert_weights.flatten().float()
    return outputs._replace(y=sum_by_token(outputs.y), dx=sum_by_token(outputs.dx), d_expert_weights=d_weights)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of the expected, part by part to save memory."""
    difference = norm = 0.0
    for part, wanted in zip(actual, expected, strict=True):
        difference += float((part.float() - wanted.float()).square().sum(dtype=torch.float64))
        norm += float(wanted.float().square().sum(dtype=torch.float64))
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)
