# SPDX-License-Identifier: Apache-2.0
"""What a router decided for a batch of tokens, and its statistics.

Suffixes of names: T tokens, K most experts of a token, E experts, R rows, that is (token, expert) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dynamic_moe._checks import check_dense

if TYPE_CHECKING:
    from dynamic_moe.ops import Gating


class RoutingStatistics(NamedTuple):
    """Figures for logging. Tensors on the routing's device, without a gradient; reading one is what synchronizes.

    Attributes
    ----------
    num_tokens : Tensor
        int64 scalar, tokens that the mask lets through.
    mean_experts_per_token : Tensor
        float scalar, R / num_tokens.
    experts_per_token_histogram : Tensor
        int64 ``[K + 1]``, how many tokens got 0, 1, ..., K experts.
    tokens_per_expert : Tensor
        int32 ``[E]``.
    load : Tensor
        float ``[E]``, share of the R rows that each expert gets; sums to 1.
    mean_entropy : Tensor
        float scalar, mean over tokens of the entropy of the probabilities, in nats.
    dropped_tokens : Tensor
        int64 scalar, tokens that the mask lets through and that got no expert.
    """

    num_tokens: Tensor
    mean_experts_per_token: Tensor
    experts_per_token_histogram: Tensor
    tokens_per_expert: Tensor
    load: Tensor
    mean_entropy: Tensor
    dropped_tokens: Tensor


class Routing(NamedTuple):
    """The decision of a router, in the form that every expert pass, loss and statistic reads.

    Which rule made it does not show. Tokens are flat, in row-major order of the leading dimensions of the input.
    Float fields are float32, or float64 where the router's input was. A named tuple, so that ``torch.compile``,
    ``torch.export``, activation checkpointing, DDP and FSDP all see the tensors in it.

    Attributes
    ----------
    expert_ids : Tensor
        int32 ``[T, K]``, the selected experts of each token, best first. An unused slot holds E.
    expert_weights : Tensor
        ``[T, K]``, weight of each selected expert in the token's output; 0 in unused slots. Carries a gradient.
    tokens_per_expert : Tensor
        int32 ``[E]``, rows that each expert gets.
    probabilities : Tensor
        ``[T, E]``, the router's distribution over all experts. Carries a gradient.
    logits : Tensor
        ``[T, E]``, what the router computed before any temperature. Carries a gradient.
    probability_sum : Tensor
        ``[E]``, sum of ``probabilities`` over the tokens. Carries a gradient.
    entropy : Tensor
        ``[T]``, entropy of ``probabilities`` in nats. Carries a gradient.
    logsumexp : Tensor
        ``[T]``, log-sum-exp of the logits, after the temperature where the rule has one. Carries a gradient.
    token_mask : Tensor or None
        bool ``[T]``. A token with False has no expert, its floats other than ``logits`` are 0, and no sum counts it.
    """

    expert_ids: Tensor
    expert_weights: Tensor
    tokens_per_expert: Tensor
    probabilities: Tensor
    logits: Tensor
    probability_sum: Tensor
    entropy: Tensor
    logsumexp: Tensor
    token_mask: Tensor | None = None

    @classmethod
    def from_gating(cls, gating: Gating, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Wrap the result of a fused gating operator (:func:`dynamic_moe.ops.top_p_gating` and its siblings)."""
        return cls(
            expert_ids=gating.expert_ids,
            expert_weights=gating.expert_weights,
            tokens_per_expert=gating.tokens_per_expert,
            probabilities=gating.probabilities,
            logits=logits_TE,
            probability_sum=gating.probability_sum,
            entropy=gating.entropy,
            logsumexp=gating.logsumexp,
            token_mask=token_mask_T,
        )

    @classmethod
    def from_selection(
        cls,
        logits_TE: Tensor,
        expert_ids_TK: Tensor,
        expert_weights_TK: Tensor,
        *,
        probabilities_TE: Tensor | None = None,
        token_mask_T: Tensor | None = None,
    ) -> Routing:
        """Build a routing from a selection that any PyTorch expression made; counts and statistics are added here.

        Parameters
        ----------
        logits_TE : Tensor
            ``[T, E]``, floating point. Its last dimension says how many experts there are.
        expert_ids_TK : Tensor
            int32 or int64 ``[T, K]``, different experts for each token, best first. Any id outside [0, E) marks an
            unused slot.
        expert_weights_TK : Tensor
            ``[T, K]``, floating point. What stands in an unused slot is ignored.
        probabilities_TE : Tensor, optional
            ``[T, E]``, the distribution that the losses should see, rows summing to 1. Default: softmax of the logits.
        token_mask_T : Tensor, optional
            bool ``[T]``; a token with False gets no expert, whatever its ids say.

        Raises
        ------
        ValueError
            If a shape or a dtype is not as above.
        """
        _check_selection(logits_TE, expert_ids_TK, expert_weights_TK, probabilities_TE, token_mask_T)
        num_experts = logits_TE.shape[1]
        dtype = torch.promote_types(logits_TE.dtype, torch.float32)
        logits_TE = logits_TE.to(dtype)
        probabilities_TE = logits_TE.softmax(-1) if probabilities_TE is None else probabilities_TE.to(dtype)

        used_TK = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts)
        # The bound keeps the gradient of p log p finite where a disabled expert has probability 0.
        entropy_T = torch.special.entr(probabilities_TE.clamp(min=torch.finfo(dtype).tiny)).sum(-1)
        logsumexp_T = logits_TE.logsumexp(-1)
        if token_mask_T is not None:
            used_TK = used_TK & token_mask_T[:, None]
            probabilities_TE = torch.where(token_mask_T[:, None], probabilities_TE, 0.0)
            entropy_T = torch.where(token_mask_T, entropy_T, 0.0)
            logsumexp_T = torch.where(token_mask_T, logsumexp_T, 0.0)
        ids_TK = torch.where(used_TK, expert_ids_TK, num_experts).to(torch.int32)
        return cls(
            expert_ids=ids_TK,
            expert_weights=torch.where(used_TK, expert_weights_TK.to(dtype), 0.0),
            tokens_per_expert=_count(ids_TK.flatten(), num_experts + 1, torch.int32)[:num_experts],
            probabilities=probabilities_TE,
            logits=logits_TE,
            probability_sum=probabilities_TE.sum(0),
            entropy=entropy_T,
            logsumexp=logsumexp_T,
            token_mask=token_mask_T,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """int64 scalar: tokens that the mask lets through."""
        if self.token_mask is not None:
            return self.token_mask.sum()
        return self.tokens_per_expert.new_full((), self.expert_ids.shape[0], dtype=torch.int64)

    @property
    def experts_per_token(self) -> Tensor:
        """int64 ``[T]``: experts that each token got; 0 for a token that the mask holds back."""
        return (self.expert_ids < self.num_experts).sum(-1)

    @property
    def mean_experts_per_token(self) -> Tensor:
        """Scalar: rows divided by tokens; 0 for an empty batch."""
        return self.tokens_per_expert.sum().to(self.probability_sum.dtype) / self.num_tokens.clamp(min=1)

    @property
    def experts_per_token_histogram(self) -> Tensor:
        """int64 ``[K + 1]``: how many tokens got 0, 1, ..., K experts. Tokens that the mask holds back do not count."""
        bins = self.expert_ids.shape[1] + 1
        experts_T = self.experts_per_token
        if self.token_mask is not None:
            experts_T = torch.where(self.token_mask, experts_T, bins)
        return _count(experts_T, bins + 1, torch.int64)[:bins]

    @property
    def load(self) -> Tensor:
        """``[E]``: share of the rows that each expert gets. Sums to 1, or to 0 where there is no row."""
        return self.tokens_per_expert.to(self.probability_sum.dtype) / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def mean_entropy(self) -> Tensor:
        """Scalar: mean entropy of a token's probabilities, in nats; 0 for an empty batch. Carries a gradient."""
        return self.entropy.sum() / self.num_tokens.clamp(min=1)

    @property
    def dropped_tokens(self) -> Tensor:
        """int64 scalar: tokens that the mask lets through and that got no expert."""
        dropped_T = self.experts_per_token == 0
        if self.token_mask is not None:
            dropped_T = dropped_T & self.token_mask
        return dropped_T.sum()

    def statistics(self) -> RoutingStatistics:
        """All figures at once, detached, computed without waiting for the device."""
        routing = self.detach()
        return RoutingStatistics(
            num_tokens=routing.num_tokens,
            mean_experts_per_token=routing.mean_experts_per_token,
            experts_per_token_histogram=routing.experts_per_token_histogram,
            tokens_per_expert=routing.tokens_per_expert,
            load=routing.load,
            mean_entropy=routing.mean_entropy,
            dropped_tokens=routing.dropped_tokens,
        )

    def detach(self) -> Routing:
        """The same routing without its autograd graph; what to keep beyond a training step."""
        return Routing._make(None if field is None else field.detach() for field in self)


def expects_gradient(layer: nn.Module) -> bool:
    """Tell whether a layer's router is to be trained: the layer is in training mode, and a parameter is not frozen."""
    router = getattr(layer, "router", layer)
    return layer.training and any(parameter.requires_grad for parameter in router.parameters())


class _UntrainedRouting(Routing):
    """A routing that carries no gradient though it is a layer's in training. A type, so that compiled code keeps it."""

    __slots__ = ()


def mark_missing_gradient(layer: nn.Module, routing: Routing) -> Routing:
    """Return a routing such that losses warn of it if it carries no gradient though it is the layer's in training."""
    if any(field is not None and field.requires_grad for field in routing) or not expects_gradient(layer):
        return routing
    return _UntrainedRouting(*routing)


def warn_of_missing_gradients(routings: Iterable[Routing]) -> None:
    """Warn where a loss is computed from routings that :func:`mark_missing_gradient` marked."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if any(isinstance(routing, _UntrainedRouting) for routing in routings):
        warnings.warn(
            "a loss is computed from a routing without a gradient, though its layer is in training mode: it counts in "
            "the number and does not train the router. The layer ran without gradients, as it does in re-entrant "
            "activation checkpointing (use use_reentrant=False), or its router cut them off. For figures that train "
            "nothing, compute the loss under torch.no_grad()",
            stacklevel=4,
        )


def _count(values: Tensor, bins: int, dtype: torch.dtype) -> Tensor:
    """``[bins]``: how often each of 0 .. bins - 1 occurs. Unlike ``bincount`` it never synchronizes."""
    ones = torch.ones_like(values, dtype=dtype)
    return torch.zeros(bins, dtype=dtype, device=values.device).scatter_add(0, values.long(), ones)


def _check_selection(
    logits_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, probabilities_TE: Tensor | None, mask_T: Tensor | None
) -> None:
    check_dense("logits_TE", logits_TE)
    check_dense("expert_ids_TK", ids_TK)
    check_dense("expert_weights_TK", weights_TK)
    for name, optional in (("probabilities_TE", probabilities_TE), ("token_mask_T", mask_T)):
        if optional is not None:
            check_dense(name, optional)
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(
            f"logits_TE must be a floating-point [T, E] tensor, got {logits_TE.dtype} {list(logits_TE.shape)}"
        )
    num_tokens = logits_TE.shape[0]
    if ids_TK.dim() != 2 or ids_TK.shape[0] != num_tokens or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_ids_TK must be an int32 or int64 [{num_tokens}, K] tensor, got {ids_TK.dtype} {list(ids_TK.shape)}"
        )
    if weights_TK.shape != ids_TK.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"expert_weights_TK must be a floating-point {list(ids_TK.shape)} tensor like expert_ids_TK, "
            f"got {weights_TK.dtype} {list(weights_TK.shape)}"
        )
    if probabilities_TE is not None and probabilities_TE.shape != logits_TE.shape:
        raise ValueError(
            f"probabilities_TE must have the shape of logits_TE, {list(logits_TE.shape)}, "
            f"got {list(probabilities_TE.shape)}"
        )
    if mask_T is not None and (mask_T.shape != (num_tokens,) or mask_T.dtype != torch.bool):
        raise ValueError(f"token_mask_T must be a bool [{num_tokens}] tensor, got {mask_T.dtype} {list(mask_T.shape)}")
