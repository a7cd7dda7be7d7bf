# SPDX-License-Identifier: Apache-2.0
"""Top-p routing."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dynamic_moe import ops
from dynamic_moe._checks import Renormalize, check_at_most, check_p, check_renormalize, check_temperature
from dynamic_moe.routers.base import Router, warn_of_single_experts
from dynamic_moe.routing import Routing


class TopPRouter(Router):
    r"""Routes each token to the fewest experts whose probabilities reach ``p`` (Huang et al. 2024, eq. 2-5).

    With :math:`P = \operatorname{softmax}(W_r x)` in descending order, the token gets the first
    :math:`k = \min\{k : \sum_{j \le k} P_j \ge p\}` experts, each weighted by its probability. Ties go to the lower
    index. The expert that crosses p is among them, so every token gets at least one.

    Parameters
    ----------
    hidden_size, num_experts : int
        H and E.
    p : float, default 0.4
        Mass to reach, in (0, 1]; 1 selects every expert.
    max_experts : int, optional
        Most experts that a token may get, K. Default E: no cap.
    renormalize : bool or "straight_through", default False
        Divide the weights of a token by their sum. The paper and its released code do not. A token with one expert, and
        that can be most of them, has weight 1 then whatever its logits are, and does not train the router through the
        output of the layer: there is a warning. With "straight_through" the weights are the same, and their gradient is
        that of the probabilities.
    threshold_rule : {"paper", "released"}, default "paper"
        Stop when the mass is at least p (the paper), or more than p (the released code). They differ only where a
        partial sum equals p.
    temperature : float, default 1.0
        Divides the logits before the softmax.
    init_std, device, dtype
        As in :class:`Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        p: float = 0.4,
        max_experts: int | None = None,
        renormalize: Renormalize = False,
        threshold_rule: Literal["paper", "released"] = "paper",
        temperature: float = 1.0,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, init_std=init_std, device=device, dtype=dtype)
        # On the CPU whatever the default device is, also where modules are built on the meta device: p is no weight.
        # Not a scalar: torch.compile takes a float64 scalar on the CPU for a number of Python, and traces all twice.
        with torch.inference_mode(False):  # an inference tensor could not be filled outside of that mode
            self._p_tensor = torch.empty(1, dtype=torch.float64, device="cpu")
        self._p: float
        self.p = p
        if max_experts is not None:
            max_experts = check_at_most("max_experts", max_experts, "num_experts", self.num_experts)
        if threshold_rule not in ("paper", "released"):
            raise ValueError(f"threshold_rule must be 'paper' or 'released', got {threshold_rule!r}")
        self.max_experts = max_experts
        self.renormalize = check_renormalize(renormalize)
        self.threshold_rule = threshold_rule
        self.temperature = check_temperature(temperature)

    @property
    def p(self) -> float:
        """Mass to reach, in (0, 1].

        Setting it, in every step if need be, compiles nothing anew. Set it outside of compiled functions: torch
        compiles these again for each new value of a Python number that they take.
        """
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_p(value)
        self._p_tensor.fill_(self._p)  # in place: a CUDA graph reads this very memory

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._p_tensor = self._p_tensor.clone()  # a copy, also a shallow one, has a p of its own

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.weight.is_meta:
            self._p_tensor = self._p_tensor.to(self.weight.device)  # the device of the weights, never their dtype
        return self

    def select(self, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Apply the rule to ``[T, E]`` logits."""
        gating = ops.top_p_gating(
            logits_TE,
            # A number that changes would be compiled anew each time; eager mode takes less time for a number.
            self._p_tensor if torch.compiler.is_compiling() else self._p,
            max_experts=self.max_experts,
            threshold_rule=self.threshold_rule,
            renormalize=self.renormalize,
            temperature=self.temperature,
            token_mask=token_mask_T,
        )
        routing = Routing.from_gating(gating, logits_TE, token_mask_T)
        if self.renormalize is True:
            warn_of_single_experts(self, routing)
        return routing

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{super().extra_repr()}, p={self.p}, max_experts={self.max_experts}, renormalize={self.renormalize!r}, "
            f"threshold_rule={self.threshold_rule!r}, temperature={self.temperature}"
        )
