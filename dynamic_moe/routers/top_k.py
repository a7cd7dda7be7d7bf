# SPDX-License-Identifier: Apache-2.0
"""Top-k routing."""

import torch
from torch import Tensor

from dynamic_moe import ops
from dynamic_moe._checks import Renormalize, check_at_most, check_renormalize, check_temperature
from dynamic_moe.routers.base import Router, warn_of_single_experts
from dynamic_moe.routing import Routing


class TopKRouter(Router):
    r"""Routes each token to its ``k`` most probable experts (Shazeer et al. 2017; softmax before the selection).

    With :math:`P = \operatorname{softmax}(W_r x)` and S the k largest, an expert of S is weighted by
    :math:`P_i / \sum_{j \in S} P_j` if ``renormalize``, which equals a softmax over the selected logits (Mixtral),
    else by :math:`P_i` (Switch, Qwen1.5-MoE). Ties go to the lower index.

    Parameters
    ----------
    hidden_size, num_experts : int
        H and E.
    k : int, default 2
        Experts per token, at most E.
    renormalize : bool or "straight_through", default True
        Divide the weights of a token by their sum. With ``k = 1`` every weight is then 1 whatever the logits are, and
        the output of the layer does not train the router: there is a warning. With "straight_through" the weights are
        the same, and their gradient is that of the probabilities.
    temperature : float, default 1.0
        Divides the logits before the softmax.
    init_std, device, dtype
        As in :class:`Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        renormalize: Renormalize = True,
        temperature: float = 1.0,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, init_std=init_std, device=device, dtype=dtype)
        self.k = check_at_most("k", k, "num_experts", self.num_experts)
        self.renormalize = check_renormalize(renormalize)
        self.temperature = check_temperature(temperature)

    def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Apply the rule to ``[T, E]`` logits."""
        gating = ops.top_k_gating(
            logits_TE,
            self.k,
            renormalize=self.renormalize,
            temperature=self.temperature,
            token_mask=token_mask_T,
        )
        routing = Routing.from_gating(gating, logits_TE, token_mask_T)
        if self.k == 1 and self.renormalize is True:
            warn_of_single_experts(self, routing)
        return routing

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, k={self.k}, renormalize={self.renormalize!r}, temperature={self.temperature}"
