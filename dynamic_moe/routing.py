# SPDX-License-Identifier: Apache-2.0
"""What a router decided for a batch of tokens, and its statistics.

Suffixes of names: T tokens, K most experts of a token, E experts, R rows, that is (token, expert) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dynamic_moe._checks import check_dense, check_positive

if TYPE_CHECKING:
    from dynamic_moe.ops import Gating


class RouterScores(NamedTuple):
    """What a router with a softmax made its decision from: what losses and statistics of such routers read.

    Float fields are float32, or float64 where the router's input was. All carry a gradient. The floats of a token that
    the mask holds back are 0, except for its ``logits``.

    Attributes
    ----------
    probabilities : Tensor
        ``[T, E]``, the router's distribution over all experts.
    logits : Tensor
        ``[T, E]``, what the router computed before any temperature.
    probability_sum : Tensor
        ``[E]``, sum of ``probabilities`` over the tokens.
    entropy : Tensor
        ``[T]``, entropy of ``probabilities`` in nats.
    logsumexp : Tensor
        ``[T]``, log-sum-exp of the logits, after the temperature where the rule has one.
    """

    probabilities: Tensor
    logits: Tensor
    probability_sum: Tensor
    entropy: Tensor
    logsumexp: Tensor


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
    mean_entropy : Tensor or None
        float scalar, mean over tokens of the entropy of the probabilities, in nats; None where the routing has no
        scores.
    dropped_tokens : Tensor
        int64 scalar, tokens that the mask lets through and that got no expert.
    """

    num_tokens: Tensor
    mean_experts_per_token: Tensor
    experts_per_token_histogram: Tensor
    tokens_per_expert: Tensor
    load: Tensor
    mean_entropy: Tensor | None
    dropped_tokens: Tensor


class Routing(NamedTuple):
    """The decision of a router, in the form that every expert pass, loss and statistic reads.

    Which rule made it does not show. Tokens are flat, in row-major order of the leading dimensions of the input.
    Named tuples, so that ``torch.compile``, ``torch.export``, activation checkpointing, DDP and FSDP all see the
    tensors in them.

    The fields of ``scores`` are also attributes of the routing, under the names that they had before version 0.2; a
    later version drops them.

    Attributes
    ----------
    expert_ids : Tensor
        int32 ``[T, K]``, the selected experts of each token, best first. An unused slot, which may lie anywhere, holds
        E.
    expert_weights : Tensor
        float32 or float64 ``[T, K]``, weight of each selected expert in the token's output; 0 in unused slots. Carries
        a gradient.
    tokens_per_expert : Tensor
        int32 ``[E]``, rows that each expert gets.
    token_mask : Tensor or None
        bool ``[T]``. A token with False has no expert, and no sum counts it.
    scores : RouterScores or None
        What the decision was made from; None for rules without a softmax.
    """

    expert_ids: Tensor
    expert_weights: Tensor
    tokens_per_expert: Tensor
    token_mask: Tensor | None = None
    scores: RouterScores | None = None

    @classmethod
    def from_gating(cls, gating: Gating, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Wrap the result of a fused gating operator (:func:`dynamic_moe.ops.top_p_gating` and its siblings)."""
        scores = RouterScores(
            probabilities=gating.probabilities,
            logits=logits_TE,
            probability_sum=gating.probability_sum,
            entropy=gating.entropy,
            logsumexp=gating.logsumexp,
        )
        return cls(gating.expert_ids, gating.expert_weights, gating.tokens_per_expert, token_mask_T, scores)

    @classmethod
    def from_selection(
        cls,
        logits_TE: Tensor | None,
        expert_ids_TK: Tensor,
        expert_weights_TK: Tensor,
        *,
        num_experts: int | None = None,
        probabilities_TE: Tensor | None = None,
        token_mask_T: Tensor | None = None,
    ) -> Routing:
        """Build a routing from a selection that any PyTorch expression made; counts and statistics are added here.

        Parameters
        ----------
        logits_TE : Tensor or None
            ``[T, E]``, floating point. Its last dimension says how many experts there are. None for a rule without
            logits, whose routing has no scores.
        expert_ids_TK : Tensor
            int32 or int64 ``[T, K]``, different experts for each token, best first. Any id outside [0, E) marks an
            unused slot.
        expert_weights_TK : Tensor
            ``[T, K]``, floating point. What stands in an unused slot is ignored.
        num_experts : int, optional
            E, where no logits say it.
        probabilities_TE : Tensor, optional
            ``[T, E]``, the distribution that the losses should see, rows summing to 1. Default: softmax of the logits.
        token_mask_T : Tensor, optional
            bool ``[T]``; a token with False gets no expert, whatever its ids say.

        Raises
        ------
        ValueError
            If a shape or a dtype is not as above, or neither or both of ``logits_TE`` and ``num_experts`` are given.
        """
        num_experts = _check_num_experts(logits_TE, num_experts, probabilities_TE)
        num_tokens = None if logits_TE is None else logits_TE.shape[0]
        _check_selection(num_tokens, expert_ids_TK, expert_weights_TK, token_mask_T)
        scores = None
        weights_dtype = torch.promote_types(expert_weights_TK.dtype, torch.float32)
        if logits_TE is not None:
            scores = _scores(logits_TE, probabilities_TE, token_mask_T)
            weights_dtype = scores.logits.dtype
        used_TK = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts)
        if token_mask_T is not None:
            used_TK = used_TK & token_mask_T[:, None]
        return _from_slots(used_TK, expert_ids_TK, expert_weights_TK.to(weights_dtype), num_experts)._replace(
            token_mask=token_mask_T, scores=scores
        )

    def keep(self, mask_TK: Tensor) -> Routing:
        """The same routing without the (token, expert) pairs whose mask is False, counted anew.

        A pair that is dropped leaves its slot unused; the other weights stay as they are. The scores are those of the
        whole decision.

        Parameters
        ----------
        mask_TK : Tensor
            bool ``[T, K]``. What stands in an unused slot is ignored.

        Raises
        ------
        ValueError
            If the mask is not a bool tensor of that shape.
        """
        check_dense("mask_TK", mask_TK)
        if mask_TK.shape != self.expert_ids.shape or mask_TK.dtype != torch.bool:
            raise ValueError(
                f"mask_TK must be a bool {list(self.expert_ids.shape)} tensor like expert_ids, "
                f"got {mask_TK.dtype} {list(mask_TK.shape)}"
            )
        used_TK = mask_TK & (self.expert_ids < self.num_experts)
        kept = _from_slots(used_TK, self.expert_ids, self.expert_weights, self.num_experts)
        return kept._replace(token_mask=self.token_mask, scores=self.scores)

    def local(self, first: int, count: int) -> Routing:
        """The part of the routing that ``count`` experts from ``first`` on have, such as those of one rank or one kind.

        They are numbered from 0 on; slots of other experts are unused. The part has no scores: losses and statistics of
        the router belong to the whole routing.

        Parameters
        ----------
        first, count : int
            A range of experts that lies in [0, E].

        Raises
        ------
        ValueError
            If it does not.
        """
        for name, value, most in (("first", first, self.num_experts), ("count", count, self.num_experts)):
            if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= most:
                raise ValueError(f"{name} must be an integer in [0, {most}] with {most} experts, got {value!r}")
        if first + count > self.num_experts:
            raise ValueError(
                f"first + count must be at most {self.num_experts}, the number of experts, got {first} + {count}"
            )
        used_TK = (self.expert_ids >= first) & (self.expert_ids < first + count)
        return Routing(
            expert_ids=torch.where(used_TK, self.expert_ids - first, count),
            expert_weights=torch.where(used_TK, self.expert_weights, 0.0),
            tokens_per_expert=self.tokens_per_expert[first : first + count],
            token_mask=self.token_mask,
        )

    def scores_for(self, reader: str) -> RouterScores:
        """Return the scores.

        Raises
        ------
        ValueError
            If there are none; the message names the reader.
        """
        if self.scores is None:
            raise ValueError(f"{reader} reads the scores of a router with a softmax, but this routing has none")
        return self.scores

    @property
    def probabilities(self) -> Tensor:
        """``scores.probabilities``, by the name of versions before 0.2."""
        return self.scores_for("probabilities").probabilities

    @property
    def logits(self) -> Tensor:
        """``scores.logits``, by the name of versions before 0.2."""
        return self.scores_for("logits").logits

    @property
    def probability_sum(self) -> Tensor:
        """``scores.probability_sum``, by the name of versions before 0.2."""
        return self.scores_for("probability_sum").probability_sum

    @property
    def entropy(self) -> Tensor:
        """``scores.entropy``, by the name of versions before 0.2."""
        return self.scores_for("entropy").entropy

    @property
    def logsumexp(self) -> Tensor:
        """``scores.logsumexp``, by the name of versions before 0.2."""
        return self.scores_for("logsumexp").logsumexp

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
        return self.tokens_per_expert.sum().to(self.expert_weights.dtype) / self.num_tokens.clamp(min=1)

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
        return self.tokens_per_expert.to(self.expert_weights.dtype) / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def mean_entropy(self) -> Tensor:
        """Scalar: mean entropy of a token's probabilities, in nats; 0 for an empty batch. Carries a gradient."""
        return self.scores_for("mean_entropy").entropy.sum() / self.num_tokens.clamp(min=1)

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
            mean_entropy=None if routing.scores is None else routing.mean_entropy,
            dropped_tokens=routing.dropped_tokens,
        )

    def detach(self) -> Routing:
        """The same routing without its autograd graph; what to keep beyond a training step."""
        scores = None if self.scores is None else RouterScores._make(field.detach() for field in self.scores)
        return Routing(
            self.expert_ids.detach(),
            self.expert_weights.detach(),
            self.tokens_per_expert.detach(),
            None if self.token_mask is None else self.token_mask.detach(),
            scores,
        )


def expects_gradient(layer: nn.Module) -> bool:
    """Tell whether a layer's router is to be trained: the layer is in training mode, and a parameter is not frozen."""
    router = getattr(layer, "router", layer)
    return layer.training and any(parameter.requires_grad for parameter in router.parameters())


class _UntrainedRouting(Routing):
    """A routing that carries no gradient though it is a layer's in training. A type, so that compiled code keeps it."""

    __slots__ = ()


def mark_missing_gradient(layer: nn.Module, routing: Routing) -> Routing:
    """Return a routing such that losses warn of it if it carries no gradient though it is the layer's in training."""
    tensors = (routing.expert_weights, *(routing.scores or ()))
    if any(tensor.requires_grad for tensor in tensors) or not expects_gradient(layer):
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


def _from_slots(used_TK: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
    """The routing that has the marked slots alone; without a mask and scores."""
    ids_TK = torch.where(used_TK, ids_TK, num_experts).to(torch.int32)
    return Routing(
        expert_ids=ids_TK,
        expert_weights=torch.where(used_TK, weights_TK, 0.0),
        tokens_per_expert=_count(ids_TK.flatten(), num_experts + 1, torch.int32)[:num_experts],
    )


def _scores(logits_TE: Tensor, probabilities_TE: Tensor | None, token_mask_T: Tensor | None) -> RouterScores:
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    logits_TE = logits_TE.to(dtype)
    probabilities_TE = logits_TE.softmax(-1) if probabilities_TE is None else probabilities_TE.to(dtype)
    # The bound keeps the gradient of p log p finite where a disabled expert has probability 0.
    entropy_T = torch.special.entr(probabilities_TE.clamp(min=torch.finfo(dtype).tiny)).sum(-1)
    logsumexp_T = logits_TE.logsumexp(-1)
    if token_mask_T is not None:
        probabilities_TE = torch.where(token_mask_T[:, None], probabilities_TE, 0.0)
        entropy_T = torch.where(token_mask_T, entropy_T, 0.0)
        logsumexp_T = torch.where(token_mask_T, logsumexp_T, 0.0)
    return RouterScores(probabilities_TE, logits_TE, probabilities_TE.sum(0), entropy_T, logsumexp_T)


def _check_num_experts(logits_TE: Tensor | None, num_experts: int | None, probabilities_TE: Tensor | None) -> int:
    """Check logits and probabilities of a selection; return E."""
    if logits_TE is None:
        if probabilities_TE is not None:
            raise ValueError("probabilities_TE must be None where logits_TE is, got a Tensor")
        if num_experts is None:
            raise ValueError("num_experts must be given where logits_TE is None, got None")
        return check_positive("num_experts", num_experts)
    check_dense("logits_TE", logits_TE)
    if num_experts is not None:
        raise ValueError(f"num_experts must be None where logits_TE is given, got {num_experts!r}")
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(
            f"logits_TE must be a floating-point [T, E] tensor, got {logits_TE.dtype} {list(logits_TE.shape)}"
        )
    if probabilities_TE is not None:
        check_dense("probabilities_TE", probabilities_TE)
        if probabilities_TE.shape != logits_TE.shape:
            raise ValueError(
                f"probabilities_TE must have the shape of logits_TE, {list(logits_TE.shape)}, "
                f"got {list(probabilities_TE.shape)}"
            )
    return logits_TE.shape[1]


def _check_selection(num_tokens: int | None, ids_TK: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> None:
    check_dense("expert_ids_TK", ids_TK)
    check_dense("expert_weights_TK", weights_TK)
    tokens = "T" if num_tokens is None else num_tokens
    fits = ids_TK.dim() == 2 and ids_TK.shape[0] == (ids_TK.shape[0] if num_tokens is None else num_tokens)
    if not fits or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_ids_TK must be an int32 or int64 [{tokens}, K] tensor, got {ids_TK.dtype} {list(ids_TK.shape)}"
        )
    if weights_TK.shape != ids_TK.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"expert_weights_TK must be a floating-point {list(ids_TK.shape)} tensor like expert_ids_TK, "
            f"got {weights_TK.dtype} {list(weights_TK.shape)}"
        )
    if mask_T is None:
        return
    check_dense("token_mask_T", mask_T)
    num_tokens = ids_TK.shape[0]
    if mask_T.shape != (num_tokens,) or mask_T.dtype != torch.bool:
        raise ValueError(f"token_mask_T must be a bool [{num_tokens}] tensor, got {mask_T.dtype} {list(mask_T.shape)}")
