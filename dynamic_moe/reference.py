# SPDX-License-Identifier: Apache-2.0
"""The operators in plain PyTorch: what the kernels are tested against.

The functions have the signatures and results of `dynamic_moe.ops`; torch differentiates them by itself. They are
written to be read, and run wherever torch runs. Arithmetic is float64 for float64 inputs and float32 otherwise; call
them on float64 inputs for an oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad, silu

from dynamic_moe._checks import Renormalize, check_renormalize
from dynamic_moe.ops import Gating, Permutation, checked_mode
from dynamic_moe.ops._common import accumulator_dtype
from dynamic_moe.ops._gating import ThresholdRule, check_count, check_gating, check_threshold


def top_p_gating(
    logits: Tensor,
    p: float | Tensor = 0.4,
    *,
    max_experts: int | None = None,
    threshold_rule: ThresholdRule = "paper",
    renormalize: Renormalize = False,
    temperature: float = 1.0,
    token_mask: Tensor | None = None,
    check_finite: bool | None = None,
) -> Gating:
    """See `dynamic_moe.ops.top_p_gating`."""
    num_experts = check_gating(logits, temperature, token_mask)
    check_threshold(p, threshold_rule, logits.device)
    if max_experts is None:
        max_experts = num_experts
    check_count("max_experts", max_experts, num_experts)

    def is_selected(sorted_probabilities: Tensor) -> Tensor:
        """An expert is selected unless the mass before it has reached p. The best one always is."""
        if p == 1:
            return torch.ones_like(sorted_probabilities, dtype=torch.bool)
        mass = sorted_probabilities.cumsum(1)
        reached = mass > p if threshold_rule == "released" else mass >= p
        return torch.cat([torch.ones_like(reached[:, :1]), ~reached[:, :-1]], dim=1)

    return _gating(logits, max_experts, is_selected, renormalize, temperature, token_mask, check_finite)


def top_k_gating(
    logits: Tensor,
    k: int = 2,
    *,
    renormalize: Renormalize = True,
    temperature: float = 1.0,
    token_mask: Tensor | None = None,
    check_finite: bool | None = None,
) -> Gating:
    """See `dynamic_moe.ops.top_k_gating`."""
    num_experts = check_gating(logits, temperature, token_mask)
    check_count("k", k, num_experts)

    def is_selected(sorted_probabilities: Tensor) -> Tensor:
        return torch.ones_like(sorted_probabilities, dtype=torch.bool)

    return _gating(logits, k, is_selected, renormalize, temperature, token_mask, check_finite)


def _gating(
    logits: Tensor,
    max_experts: int,
    is_selected: Callable[[Tensor], Tensor],
    renormalize: Renormalize,
    temperature: float,
    token_mask: Tensor | None,
    check_finite: bool | None,
) -> Gating:
    """Both rules. ``is_selected`` maps probabilities [T, E] in descending order to a bool [T, E]."""
    check_renormalize(renormalize)
    num_tokens, num_experts = logits.shape
    z = logits.to(accumulator_dtype(logits.dtype)) / temperature
    kept = torch.ones(num_tokens, dtype=torch.bool, device=z.device) if token_mask is None else token_mask
    largest = z.detach().amax(dim=1)  # NaN where the token has one
    faulty = kept & ~largest.isfinite()
    if (checked_mode() if check_finite is None else check_finite) and faulty.any():
        raise ValueError(f"logits must be finite, got faults in {int(faulty.sum())} of {num_tokens} tokens")

    # Zero logits stand in for the tokens left out, so that no NaN can reach another token or a gradient.
    sound = kept & ~faulty
    z = torch.where(sound[:, None], z, 0.0)
    probabilities = z.softmax(dim=1)
    log_probabilities = torch.where(probabilities > 0, probabilities, 1.0).log()  # 0 log 0 is 0
    entropy = -(probabilities * log_probabilities).sum(dim=1)
    logsumexp = z.logsumexp(dim=1)

    order = probabilities.detach().argsort(dim=1, descending=True, stable=True)  # stable: ties to the lower index
    sorted_probabilities = probabilities.gather(1, order)
    selected = (is_selected(sorted_probabilities.detach()) & sound[:, None])[:, :max_experts]
    expert_ids = torch.where(selected, order[:, :max_experts], num_experts)
    expert_weights = torch.where(selected, sorted_probabilities[:, :max_experts], 0.0)
    if renormalize:
        divided = expert_weights / torch.where(sound, expert_weights.sum(dim=1), 1.0)[:, None]
        if renormalize == "straight_through":
            divided = divided.detach() + (expert_weights - expert_weights.detach())
        expert_weights = divided

    # A faulty token goes to expert 0, alone, and shows NaN wherever it has a number of its own.
    nan = z.new_tensor(float("nan"))
    expert_ids[:, 0] = torch.where(faulty, 0, expert_ids[:, 0])
    first_slot = torch.arange(max_experts, device=z.device) == 0
    used = one_hot(expert_ids.flatten(), num_experts + 1)[:, :num_experts]
    return Gating(
        expert_ids=expert_ids.to(torch.int32),
        expert_weights=torch.where(faulty[:, None] & first_slot, nan, expert_weights),
        tokens_per_expert=used.sum(dim=0).to(torch.int32),
        probabilities=torch.where(faulty[:, None], nan, torch.where(kept[:, None], probabilities, 0.0)),
        probability_sum=torch.where(sound[:, None], probabilities, 0.0).sum(dim=0),
        entropy=torch.where(faulty, nan, torch.where(kept, entropy, 0.0)),
        logsumexp=torch.where(faulty, nan, torch.where(kept, logsumexp, 0.0)),
    )


def permute(
    expert_ids: Tensor, num_experts: int, *, row_capacity: int | None = None, static_rows: bool = False
) -> Permutation:
    """See `dynamic_moe.ops.permute`."""
    overflow = None
    if row_capacity is not None:
        expert_ids, overflow = _drop_overflow(expert_ids, num_experts, row_capacity)
    flat_ids = expert_ids.flatten()
    flat_ids = torch.where((flat_ids >= 0) & (flat_ids < num_experts), flat_ids, num_experts).long()
    tokens_per_expert = flat_ids.bincount(minlength=num_experts + 1)[:num_experts]
    expert_offsets = torch.cat([tokens_per_expert.new_zeros(1), tokens_per_expert.cumsum(0)])
    num_rows = int(expert_offsets[-1])
    row_slot = flat_ids.argsort(stable=True)[:num_rows]  # unused slots sort behind the last expert
    slot_row = torch.full_like(flat_ids, -1)
    slot_row[row_slot] = torch.arange(num_rows, device=row_slot.device)
    row_token = row_slot.div(max(expert_ids.shape[1], 1), rounding_mode="floor")
    if static_rows or row_capacity is not None:
        capacity = flat_ids.numel() if row_capacity is None else min(row_capacity, flat_ids.numel())
        unused = (0, capacity - num_rows)
        row_slot, row_token = pad(row_slot, unused), pad(row_token, unused)
    return Permutation(
        tokens_per_expert=tokens_per_expert.to(torch.int32),
        expert_offsets=expert_offsets.to(torch.int32),
        row_token=row_token.to(torch.int32),
        row_slot=row_slot.to(torch.int32),
        slot_row=slot_row.to(torch.int32).view(expert_ids.shape),
        overflow=overflow,
    )


def _drop_overflow(expert_ids: Tensor, num_experts: int, row_capacity: int) -> tuple[Tensor, Tensor]:
    expert_ids = expert_ids.clone()
    left = row_capacity
    for slot in range(expert_ids.shape[1]):
        for token, expert in enumerate(expert_ids[:, slot].tolist()):
            if 0 <= expert < num_experts:
                left -= 1
                expert_ids[token, slot] = num_experts if left < 0 else expert
    return expert_ids, torch.tensor(max(-left, 0), dtype=torch.int32)


def combine(rows: Tensor, weights: Tensor | None, slot_row: Tensor) -> Tensor:
    """See `dynamic_moe.ops.combine`."""
    acc = accumulator_dtype(rows.dtype)
    padded = torch.cat([rows.to(acc), rows.new_zeros((1, rows.shape[1]), dtype=acc)])  # -1 reads the zeros at the end
    slots = padded[slot_row.long()]  # [T, K, H]
    if weights is not None:
        slots = slots * torch.where(slot_row >= 0, weights.to(acc), 0.0)[..., None]
    return slots.sum(dim=1).to(rows.dtype)


def grouped_matmul(x: Tensor, weight: Tensor, expert_offsets: Tensor, row_token: Tensor | None = None) -> Tensor:
    """See `dynamic_moe.ops.grouped_matmul`."""
    acc = accumulator_dtype(x.dtype)
    rows = x if row_token is None else x[row_token.long()]
    first = expert_offsets.tolist()
    products = [
        rows[first[e] : first[e + 1]].to(acc) @ weight[e].to(acc).transpose(0, 1) for e in range(weight.shape[0])
    ]
    products.append(rows.new_zeros((rows.shape[0] - first[-1], weight.shape[1]), dtype=acc))  # rows that are not live
    return torch.cat(products).to(x.dtype)


def expert_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    permutation: Permutation | None = None,
    *,
    row_capacity: int | None = None,
    static_rows: bool = False,
) -> Tensor:
    """See `dynamic_moe.ops.expert_mlp`. Sums are rounded to the dtype of ``x`` once, at the end."""
    acc = accumulator_dtype(x.dtype)
    if permutation is None:
        permutation = permute(expert_ids, down_proj.shape[0], row_capacity=row_capacity, static_rows=static_rows)
    gate_up = grouped_matmul(x.to(acc), gate_up_proj.to(acc), permutation.expert_offsets, permutation.row_token)
    gate, up = gate_up.chunk(2, dim=1)
    rows = grouped_matmul(silu(gate) * up, down_proj.to(acc), permutation.expert_offsets)
    return combine(rows, expert_weights.to(acc), permutation.slot_row).to(x.dtype)
