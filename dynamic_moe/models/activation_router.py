# SPDX-License-Identifier: Apache-2.0
"""Top-p routing in the dtype of the activations, rounding where the released code rounds."""

import torch
from torch import Tensor
from torch.nn import functional

from dynamic_moe.routers import TopPRouter
from dynamic_moe.routers.base import warn_of_single_experts
from dynamic_moe.routing import Routing


class ActivationDtypeTopPRouter(TopPRouter):
    """:class:`~dynamic_moe.TopPRouter` whose logits, softmax and partial sums are rounded to the activations' dtype.

    The released code (Huang et al. 2024) routes so. In bfloat16 it gives some tokens other experts than float32
    arithmetic does, mostly more of them. It is for parity with that code, and it is plain PyTorch. In float32 it
    computes what :class:`~dynamic_moe.TopPRouter` does, up to the order of summation. Options are those of the base.
    """

    def logits(self, x_TH: Tensor) -> Tensor:
        """``[T, E]`` scores in the dtype of the input."""
        if x_TH.dtype in (torch.float32, torch.float64):
            return super().logits(x_TH)  # torch's own product may round float32, if it is told to
        return functional.linear(x_TH, self.weight.to(x_TH.dtype))

    def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Apply the rule to ``[T, E]`` logits, in their dtype."""
        probabilities_TE = (logits_TE / self.temperature).softmax(-1)
        weights_TE, ids_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
        mass_TE = weights_TE.cumsum(-1)
        p = self._p_tensor.to(mass_TE.device) if torch.compiler.is_compiling() else self.p  # see TopPRouter.select
        # PyTorch rounds a number that it compares with to the dtype of the tensor.
        threshold = p.to(mass_TE.dtype) if isinstance(p, Tensor) else p
        reached_TE = mass_TE > threshold if self.threshold_rule == "released" else mass_TE >= threshold
        reached_TE = reached_TE & (p != 1.0)  # the sum of all is 1 but for rounding
        # An expert is selected unless the mass before it has reached p.
        unused_TE = functional.pad(reached_TE[:, :-1], (1, 0), value=False)
        ids_TK = ids_TE.masked_fill(unused_TE, self.num_experts)[:, : self.max_experts]
        weights_TK = weights_TE.masked_fill(unused_TE, 0.0)[:, : self.max_experts]
        if self.renormalize:
            divided_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            if self.renormalize == "straight_through":
                divided_TK = divided_TK.detach() + (weights_TK - weights_TK.detach())
            weights_TK = divided_TK
        routing = Routing.from_selection(
            logits_TE, ids_TK, weights_TK, probabilities_TE=probabilities_TE, token_mask_T=token_mask_T
        )
        if self.renormalize is True:
            warn_of_single_experts(self, routing)
        return routing
