# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses of a router, from the sums that the gating operators already made.

Each takes the routing of one layer, or the routings of several layers, and returns a scalar to be scaled and added to
the loss of the task. Tokens that a mask holds back do not count. A batch without tokens gives 0, never NaN. A routing
without the scores of a softmax is a ValueError.

Huang et al. 2024 train on ``task + 1e-2 * load_balancing + 1e-4 * dynamic``. How they reduce over layers and tokens is
not stated; the options say what is done here, and the defaults (means) keep the coefficients independent of depth and
batch size.

In training there is a warning where a routing carries no gradient though its router should be trained by the loss, as
in re-entrant activation checkpointing. Compute figures that train nothing under ``torch.no_grad()``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dynamic_moe.routing import Routing, warn_of_missing_gradients

Reduction = Literal["mean", "sum"]

__all__ = ["dynamic", "load_balancing", "router_z"]


def load_balancing(
    routing: Routing | Sequence[Routing],
    *,
    fraction: Literal["tokens", "rows"] = "tokens",
    layers: Reduction = "mean",
) -> Tensor:
    r"""Load-balancing loss for a variable number of experts per token (Huang et al. 2024, :math:`Loss_b`).

    :math:`E \sum_i f_i Q_i`, with :math:`f_i` the fraction of the tokens that select expert i and :math:`Q_i` the mean
    probability of expert i over all tokens. The gradient flows through :math:`Q` alone.

    Parameters
    ----------
    routing : Routing or sequence of Routing
        One layer, or several.
    fraction : {"tokens", "rows"}, default "tokens"
        What :math:`f_i` is a fraction of. "tokens" is the paper's: :math:`\sum_i f_i` is the mean number of experts per
        token, and so is the loss under perfect balance. "rows" divides by the (token, expert) pairs instead, so that
        :math:`\sum_i f_i = 1` and perfect balance gives 1 whatever the number of experts per token, as in Fedus et al.
        2022, eq. 4-6.
    layers : {"mean", "sum"}, default "mean"
        Reduction over layers.

    Returns
    -------
    Tensor
        Scalar, float32 or float64.
    """
    _check_option("fraction", fraction, ("tokens", "rows"))

    def loss(layer: Routing) -> Tensor:
        num_tokens = layer.num_tokens.clamp(min=1)
        total = num_tokens if fraction == "tokens" else layer.tokens_per_expert.sum().clamp(min=1)
        probability_sum_E = layer.scores_for("losses.load_balancing").probability_sum
        fraction_E = layer.tokens_per_expert.to(probability_sum_E.dtype) / total
        return layer.num_experts * torch.dot(fraction_E, probability_sum_E / num_tokens)

    return _over_layers(loss, routing, layers)


def dynamic(
    routing: Routing | Sequence[Routing],
    *,
    tokens: Reduction = "mean",
    layers: Reduction = "mean",
    base: float = math.e,
) -> Tensor:
    r"""Entropy of the router (Huang et al. 2024, :math:`Loss_d`): keeps it from flattening out to select more experts.

    :math:`-\sum_i P_i \log P_i` over all experts, selected or not.

    Parameters
    ----------
    routing : Routing or sequence of Routing
        One layer, or several.
    tokens, layers : {"mean", "sum"}, default "mean"
        Reduction over the tokens of a layer, and over layers.
    base : float, default e
        Base of the logarithm, above 1: e for nats, 2 for bits, E for an entropy between 0 and 1.

    Returns
    -------
    Tensor
        Scalar, float32 or float64.
    """
    _check_option("tokens", tokens, ("mean", "sum"))
    if not base > 1.0:
        raise ValueError(f"base must be above 1, got {base!r}")
    scale = 1.0 / math.log(base)

    def loss(layer: Routing) -> Tensor:
        return scale * _over_tokens(layer.scores_for("losses.dynamic").entropy, layer, tokens)

    return _over_layers(loss, routing, layers)


def router_z(
    routing: Routing | Sequence[Routing],
    *,
    tokens: Reduction = "mean",
    layers: Reduction = "mean",
) -> Tensor:
    r"""Router z-loss (Zoph et al. 2022, eq. 5): keeps the logits small.

    :math:`(\log \sum_i \exp z_i)^2`, where :math:`z` are the logits divided by the router's temperature.

    Parameters
    ----------
    routing : Routing or sequence of Routing
        One layer, or several.
    tokens, layers : {"mean", "sum"}, default "mean"
        Reduction over the tokens of a layer, and over layers.

    Returns
    -------
    Tensor
        Scalar, float32 or float64.
    """
    _check_option("tokens", tokens, ("mean", "sum"))

    def loss(layer: Routing) -> Tensor:
        return _over_tokens(layer.scores_for("losses.router_z").logsumexp.square(), layer, tokens)

    return _over_layers(loss, routing, layers)


def _over_tokens(values_T: Tensor, layer: Routing, reduction: Reduction) -> Tensor:
    # Values of tokens that the mask holds back are 0.
    total = values_T.sum()
    return total / layer.num_tokens.clamp(min=1) if reduction == "mean" else total


def _over_layers(
    loss: Callable[[Routing], Tensor], routing: Routing | Sequence[Routing], reduction: Reduction
) -> Tensor:
    _check_option("layers", reduction, ("mean", "sum"))
    if not isinstance(routing, Iterable):
        raise ValueError(f"routing must be a Routing or a sequence of them, got {type(routing).__name__}")
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    if not routings:
        raise ValueError("routing must hold the routing of at least one layer, got an empty sequence")
    for layer in routings:
        if not isinstance(layer, Routing):
            raise ValueError(f"routing must be a Routing or a sequence of them, got one of {type(layer).__name__}")
    warn_of_missing_gradients(routings)
    total = loss(routings[0])
    for layer in routings[1:]:
        total = total + loss(layer).to(total.device)  # the layers of a split model live on different devices
    return total / len(routings) if reduction == "mean" else total


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
