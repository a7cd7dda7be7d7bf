# SPDX-License-Identifier: Apache-2.0
"""Gating: from router logits to the experts of each token, with the statistics that the losses need."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamic_moe._checks import Renormalize, check_renormalize
from dynamic_moe.ops._common import (
    FLOAT_DTYPES,
    accumulator_dtype,
    as_int,
    check_cuda,
    check_device,
    check_tensor,
    checked_mode,
    differentiable,
    differentiable_once,
    raw,
    register_fake,
)

ThresholdRule = Literal["paper", "released"]


class Gating(NamedTuple):
    """What gating decided and measured. Floats are float32, float64 for float64 logits.

    Attributes
    ----------
    expert_ids : Tensor
        int32 [T, K]. The experts of each token, best first; E in unused slots.
    expert_weights : Tensor
        [T, K]. Weight of each of them in the token's output; 0 in unused slots. Differentiable.
    tokens_per_expert : Tensor
        int32 [E]. Number of tokens that each expert got.
    probabilities : Tensor
        [T, E]. ``softmax(logits / temperature)``. Differentiable.
    probability_sum : Tensor
        [E]. Sum of the probabilities over the tokens. Differentiable.
    entropy : Tensor
        [T]. Entropy of each token's probabilities in nats. Differentiable.
    logsumexp : Tensor
        [T]. Of ``logits / temperature``. Differentiable.
    """

    expert_ids: Tensor
    expert_weights: Tensor
    tokens_per_expert: Tensor
    probabilities: Tensor
    probability_sum: Tensor
    entropy: Tensor
    logsumexp: Tensor


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
    r"""Give each token the fewest experts whose probabilities reach ``p``.

    With :math:`P = \operatorname{softmax}(z / \text{temperature})` in descending order (ties: lower index first), a
    token gets the first :math:`k = \min\{k : \sum_{j \le k} P_j \ge p\}` experts, at least one and at most
    ``max_experts``. Source: Huang et al. 2024, "Harder Tasks Need More Experts", eq. 2-5.

    Parameters
    ----------
    logits : Tensor
        [T, E], float32, float64, bfloat16 or float16; the arithmetic is float32 (float64 for float64). A logit of
        -infinity disables the expert for the token.
    p : float or Tensor, default 0.4
        Mass to reach, in (0, 1]. 1 selects ``max_experts`` experts. As a tensor of one element, on the CPU or on the
        device of the logits, it may change from call to call without ``torch.compile`` compiling anew, and in a CUDA
        graph. It has no gradient. On a CUDA device its value is not checked: up to 0 (and NaN) it gives one expert,
        from 1 on ``max_experts``.
    max_experts : int, optional
        K, in [1, E]. Default: E, which is exact.
    threshold_rule : {"paper", "released"}, default "paper"
        Stop where the mass is >= p (the paper) or > p (the code that its authors released).
    renormalize : bool or "straight_through", default False
        Divide the weights by the selected mass, so that they sum to 1. The paper uses the raw probabilities. The weight
        of a token with one expert is then 1 whatever its logits are, and has no gradient. With "straight_through" the
        weights are the same, and their gradient is that of the raw probabilities.
    temperature : float, default 1.0
        Positive and finite.
    token_mask : Tensor, optional
        bool [T]. A token with False gets no expert, and enters no sum; its floats are 0.
    check_finite : bool, optional
        Raise if a token's logits hold NaN or +infinity, or are all -infinity. Default: `checked_mode`. Unchecked, such
        a token gets expert 0 with weight NaN and its own floats are NaN; no other token and no sum is touched.

    Returns
    -------
    Gating
        Its float fields are differentiable; the selection itself has no gradient.

    Raises
    ------
    ValueError
        If an argument is out of the bounds above.
    """
    num_experts = check_gating(logits, temperature, token_mask)
    check_threshold(p, threshold_rule, logits.device)
    check_renormalize(renormalize)
    if max_experts is None:
        max_experts = num_experts
    check_count("max_experts", max_experts, num_experts)
    strict = threshold_rule == "released"
    check_finite = checked_mode() if check_finite is None else check_finite
    call = _top_p
    if isinstance(p, Tensor):
        call, p = _top_p_tensor, p.detach().to(torch.float64).reshape(1)
    straight_through = renormalize == "straight_through"
    return Gating(
        *call(
            logits, p, max_experts, strict, bool(renormalize), temperature, token_mask, check_finite, straight_through
        )
    )


def top_k_gating(
    logits: Tensor,
    k: int = 2,
    *,
    renormalize: Renormalize = True,
    temperature: float = 1.0,
    token_mask: Tensor | None = None,
    check_finite: bool | None = None,
) -> Gating:
    """Give each token the ``k`` experts of highest probability, ties to the lower index.

    Source: Shazeer et al. 2017; renormalized weights as in Mixtral (Jiang et al. 2024).

    Parameters
    ----------
    logits : Tensor
        [T, E], float32, float64, bfloat16 or float16; the arithmetic is float32 (float64 for float64).
    k : int, default 2
        Experts of each token, in [1, E].
    renormalize : bool or "straight_through", default True
        Divide the weights by the selected mass, so that they sum to 1; see `top_p_gating` for a token with one expert.
    temperature, token_mask, check_finite
        As in `top_p_gating`.

    Returns
    -------
    Gating
        Its float fields are differentiable; the selection itself has no gradient.

    Raises
    ------
    ValueError
        If an argument is out of the bounds above.
    """
    num_experts = check_gating(logits, temperature, token_mask)
    check_count("k", k, num_experts)
    check_renormalize(renormalize)
    check_finite = checked_mode() if check_finite is None else check_finite
    straight_through = renormalize == "straight_through"
    return Gating(*_top_k(logits, k, bool(renormalize), temperature, token_mask, check_finite, straight_through))


def check_gating(logits: Tensor, temperature: float, token_mask: Tensor | None) -> int:
    """Check what both rules share. Returns E."""
    check_tensor("logits", logits, FLOAT_DTYPES, T=None, E=None)
    check_cuda("logits", logits)
    num_tokens, num_experts = logits.shape
    if num_experts < 1:
        raise ValueError(f"logits must have at least one expert, got shape {list(logits.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (torch.bool,), T=num_tokens)
        check_device(logits.device, token_mask=token_mask)
    return num_experts


def check_threshold(p: float | Tensor, threshold_rule: str, device: torch.device) -> None:
    """Check what the top-p rule alone has. What a tensor holds is the kernel's to check."""
    if isinstance(p, Tensor):
        if p.numel() != 1 or not p.is_floating_point():
            raise ValueError(
                f"p must be a number or a floating-point tensor of one element, got {p.dtype} {list(p.shape)}"
            )
        if p.device.type != "cpu" and p.device != device:
            raise ValueError(f"p must be on the CPU or on {device} like logits, got {p.device}")
    elif type(p) is not float and not isinstance(p, Real | torch.SymFloat):
        raise ValueError(f"p must be a number or a tensor, got {p!r}")
    elif not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p!r}")
    if threshold_rule not in ("paper", "released"):
        raise ValueError(f"threshold_rule must be 'paper' or 'released', got {threshold_rule!r}")


def check_count(name: str, count: int, num_experts: int) -> None:
    """Check a number of experts per token."""
    if type(count) is not int:
        count = as_int(name, count)
    if not 1 <= count <= num_experts:
        raise ValueError(f"{name} must be in [1, {num_experts}] with {num_experts} experts, got {count}")


def _fake_outputs(logits: Tensor, max_experts: int) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits.shape
    acc = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty((num_tokens, max_experts), dtype=torch.int32),
        logits.new_empty((num_tokens, max_experts), dtype=acc),
        logits.new_empty((num_experts,), dtype=torch.int32),
        logits.new_empty((num_tokens, num_experts), dtype=acc),
        logits.new_empty((num_experts,), dtype=acc),
        logits.new_empty((num_tokens,), dtype=acc),
        logits.new_empty((num_tokens,), dtype=acc),
    )


@register_fake(raw.top_p_gating.default)
def _top_p_fake(
    logits: Tensor,
    top_p: float,
    max_experts: int,
    strict: bool,
    renormalize: bool,
    temperature: float,
    token_mask: Tensor | None,
    check_finite: bool,
    straight_through: bool = False,
) -> tuple[Tensor, ...]:
    return _fake_outputs(logits, max_experts)


@register_fake(raw.top_p_gating.tensor)
def _top_p_tensor_fake(
    logits: Tensor,
    top_p: Tensor,
    max_experts: int,
    strict: bool,
    renormalize: bool,
    temperature: float,
    token_mask: Tensor | None,
    check_finite: bool,
    straight_through: bool = False,
) -> tuple[Tensor, ...]:
    return _fake_outputs(logits, max_experts)


@register_fake(raw.top_k_gating.default)
def _top_k_fake(
    logits: Tensor,
    k: int,
    renormalize: bool,
    temperature: float,
    token_mask: Tensor | None,
    check_finite: bool,
    straight_through: bool = False,
) -> tuple[Tensor, ...]:
    return _fake_outputs(logits, k)


@register_fake(raw.gating_backward.default)
def _backward_fake(probabilities: Tensor, *args: Any) -> Tensor:
    logits_dtype: torch.dtype = args[-1]
    return probabilities.new_empty(probabilities.shape, dtype=logits_dtype)


def _save_for_backward(
    ctx: Any, logits: Tensor, renormalize: bool, temperature: float, token_mask: Tensor | None, output: Any
) -> None:
    expert_ids, _, tokens_per_expert, probabilities, _, entropy, _ = output
    ctx.save_for_backward(probabilities, expert_ids, entropy, token_mask)
    ctx.mark_non_differentiable(expert_ids, tokens_per_expert)
    ctx.set_materialize_grads(False)
    ctx.renormalize = renormalize
    ctx.temperature = temperature
    ctx.logits_dtype = logits.dtype


def _logits_gradient(ctx: Any, grads: tuple[Tensor | None, ...]) -> Tensor | None:
    _, d_expert_weights, _, d_probabilities, d_probability_sum, d_entropy, d_logsumexp = grads
    floats = (d_expert_weights, d_probabilities, d_probability_sum, d_entropy, d_logsumexp)
    if all(grad is None for grad in floats):
        return None
    probabilities, expert_ids, entropy, token_mask = ctx.saved_tensors
    gradient: Tensor = _gating_backward(
        probabilities, expert_ids, entropy, token_mask, *floats, ctx.renormalize, ctx.temperature, ctx.logits_dtype
    )
    return gradient


def _top_p_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, _, _, renormalize, temperature, token_mask, _, straight_through = inputs
    _save_for_backward(ctx, logits, renormalize and not straight_through, temperature, token_mask, output)


def _top_p_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _logits_gradient(ctx, grads), None, None, None, None, None, None, None, None


def _top_k_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, renormalize, temperature, token_mask, _, straight_through = inputs
    _save_for_backward(ctx, logits, renormalize and not straight_through, temperature, token_mask, output)


def _top_k_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _logits_gradient(ctx, grads), None, None, None, None, None, None


_gating_backward = differentiable_once(raw.gating_backward.default)
_top_p = differentiable(raw.top_p_gating.default, _top_p_setup, _top_p_backward)
_top_p_tensor = differentiable(raw.top_p_gating.tensor, _top_p_setup, _top_p_backward)
_top_k = differentiable(raw.top_k_gating.default, _top_k_setup, _top_k_backward)


@register_flop_formula([raw.top_p_gating, raw.top_k_gating, raw.gating_backward])
def _no_flops(*args: Any, **kwargs: Any) -> int:
    """Return 0: torch counts matrix products alone."""
    return 0
