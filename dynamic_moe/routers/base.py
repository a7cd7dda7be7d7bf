# SPDX-License-Identifier: Apache-2.0
"""What routing rules share: a linear score per expert, in float32, and a selection that the rule defines."""

import warnings

import torch
from torch import Tensor, nn

from dynamic_moe._checks import check_positive, check_std, check_weight_dtype, flatten_mask, flatten_tokens
from dynamic_moe.float32_linear import float32_linear, without_autocast
from dynamic_moe.routing import Routing


class Router(nn.Module):
    r"""Base of routing rules: logits :math:`W_r x`, then :meth:`select`, which a rule overrides.

    A rule is a subclass with one method, written with any PyTorch expressions::

        class ThresholdRouter(Router):
            '''Routes each token to the experts whose probability is at least 1 / E.'''

            def select(self, logits_TE, token_mask_T=None):
                probabilities_TE = logits_TE.softmax(-1)
                weights_TE, ids_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
                ids_TE = ids_TE.masked_fill(weights_TE < 1 / self.num_experts, self.num_experts)
                return Routing.from_selection(logits_TE, ids_TE, weights_TE, token_mask_T=token_mask_T)

    :class:`~dynamic_moe.DynamicMoE` takes any module as its router whose ``forward(x, token_mask)`` returns a
    :class:`~dynamic_moe.Routing`, so a rule that does not start from a linear map needs no base class.

    Parameters
    ----------
    hidden_size, num_experts : int
        H and E.
    init_std : float, default 0.02
        The weight starts as N(0, init_std^2).
    device, dtype : optional
        Of the weight. The arithmetic is float32 whatever the dtype (float64 for float64), also under autocast.

    Attributes
    ----------
    weight : Parameter
        ``[E, H]``; no bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.num_experts = check_positive("num_experts", num_experts)
        self.init_std = check_std(init_std)
        check_weight_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=self.init_std)

    def logits(self, x_TH: Tensor) -> Tensor:
        """``[T, E]`` scores in float32 (float64 if the input or the weight is)."""
        return float32_linear(x_TH, self.weight)

    def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Choose the experts of each token. Runs outside autocast.

        Parameters
        ----------
        logits_TE : Tensor
            float32 or float64 ``[T, E]``.
        token_mask_T : Tensor, optional
            bool ``[T]``; a token with False must get no expert.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(logits_TE, token_mask_T)")

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        """Route every token of ``x``.

        Parameters
        ----------
        x : Tensor
            ``[..., H]``, floating point.
        token_mask : Tensor, optional
            bool ``[...]``, the leading shape of x. A token with False gets no expert, and enters no statistic and no
            loss.

        Raises
        ------
        ValueError
            If x is not a dense floating-point tensor of width H, or the mask does not fit.
        """
        x_TH = flatten_tokens(x, self.hidden_size)
        token_mask_T = flatten_mask(token_mask, x)
        with without_autocast(x.device.type):
            return self.select(self.logits(x_TH), token_mask_T)

    def extra_repr(self) -> str:
        """Sizes; a rule appends its own options."""
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}"


_has_warned_of_single_experts = False


def warn_of_single_experts(router: Router, routing: Routing) -> None:
    """Warn, once in a process, where renormalized weights leave tokens in training without a gradient.

    For rules with ``renormalize=True``. The number of experts is looked at on the CPU alone: elsewhere it would be a
    wait for the device.
    """
    global _has_warned_of_single_experts
    if _has_warned_of_single_experts or torch.compiler.is_compiling():
        return
    if not (router.training and routing.expert_weights.requires_grad and routing.expert_ids.device.type == "cpu"):
        return
    single = int((routing.experts_per_token == 1).sum())
    if single:
        _has_warned_of_single_experts = True
        warnings.warn(
            f"{type(router).__name__}(renormalize=True): {single} of {routing.expert_ids.shape[0]} tokens have one "
            "expert. Its weight is 1 whatever the logits are, so these tokens do not train the router through the "
            "output; renormalize='straight_through' keeps the weights and lets the gradient through",
            stacklevel=2,
        )
