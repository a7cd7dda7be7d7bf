# SPDX-License-Identifier: Apache-2.0
"""The routers of Hugging Face models: how each kind weights its experts, and what top-p means for it.

A router of transformers returns ``(logits [T, E], weights [T, K], ids [T, K])``. A :class:`Convention` says how those
came about, so that fewer experts can be selected and still be weighted as the model was trained to.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamic_moe import ops
from dynamic_moe.routers import TopPRouter


@dataclass(frozen=True)
class Convention:
    """How a kind of router scores and weights experts.

    Attributes
    ----------
    mass : {"probability", "selected"}
        What p is a share of. "probability": of the softmax over all E experts, as in the paper. "selected": of the
        weight that the router gives to the k experts it selects; for routers that score experts independently, choose
        by a biased score or choose within groups, where there is no distribution over all experts.
    renormalize : bool or None
        Whether weights are scaled to the same sum whatever is selected; None: as the router's ``norm_topk_prob`` says.
    float32_weights : bool
        Whether weights stay float32 instead of taking the dtype of the logits.
    """

    mass: Literal["probability", "selected"]
    renormalize: bool | None = None
    float32_weights: bool = False

    def renormalizes(self, router: Any) -> bool:
        """Whether this router keeps the sum of the weights."""
        return bool(router.norm_topk_prob) if self.renormalize is None else self.renormalize


_FLOAT32 = Convention("probability", renormalize=True, float32_weights=True)
_NORM_TOPK_PROB = Convention("probability")
_ALWAYS = Convention("probability", renormalize=True)
_SIGMOID = Convention("selected")

# By the name of the class, for transformers 5. Routers on one line compute the same.
CONVENTIONS = {
    **dict.fromkeys(("MixtralTopKRouter", "MiniMaxTopKRouter"), _FLOAT32),
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
        ),
        _NORM_TOPK_PROB,
    ),
    **dict.fromkeys(("Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter", "Qwen3OmniMoeTextTopKRouter"), _ALWAYS),
    # The softmax of the k best logits is the softmax over all, renormalized.
    "GptOssTopKRouter": _ALWAYS,
    **dict.fromkeys(
        (
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "KimiLinearTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        _SIGMOID,
    ),
}


def convention_of(router: nn.Module) -> Convention | None:
    """The convention of a router; None for what is no router that we know."""
    if isinstance(router, TopPRouter):
        return Convention("probability", renormalize=bool(router.renormalize), float32_weights=True)
    return next((CONVENTIONS[kind.__name__] for kind in type(router).__mro__ if kind.__name__ in CONVENTIONS), None)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by name, in order: those of :data:`CONVENTIONS`, and our own top-p routers.

    Raises
    ------
    ValueError
        If there is none; the message names the routers that are not known.
    """
    routers = {name: module for name, module in model.named_modules() if convention_of(module) is not None}
    if not routers:
        unknown = sorted({type(m).__name__ for m in model.modules() if "Router" in type(m).__name__})
        raise ValueError(
            f"model must have routers of a known kind, but {type(model).__name__} has "
            f"{', '.join(unknown) if unknown else 'no router'}; known: {', '.join(CONVENTIONS)}, TopPRouter"
        )
    return routers


def cap_of(router: Any) -> int:
    """Most experts that a token gets from the router as it was built."""
    if isinstance(router, TopPRouter):
        return router.max_experts or router.num_experts
    return int(router.top_k)


def select_top_p(
    router: Any, hidden_states: Tensor, p: float | Tensor, max_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by top-p what the router would route to k experts.

    Returns
    -------
    tuple of Tensor
        The router's logits ``[T, E]``; weights ``[T, K]`` by its own convention, 0 in unused slots; ids, int64
        ``[T, K]``, best first, E in unused slots.
    """
    convention = convention_of(router)
    assert convention is not None
    if convention.mass == "selected":
        return _shorten_selection(router, convention, hidden_states, p, max_experts)
    x_TH = hidden_states.reshape(-1, router.hidden_dim)
    logits_TE = functional.linear(x_TH, router.weight, getattr(router, "bias", None))
    renormalize = convention.renormalizes(router)
    gating = ops.top_p_gating(logits_TE, p, max_experts=max_experts, renormalize=renormalize)
    weights_TK = gating.expert_weights
    if not convention.float32_weights:
        weights_TK = weights_TK.to(logits_TE.dtype)
    return logits_TE, weights_TK, gating.expert_ids.long()


def _shorten_selection(
    router: Any, convention: Convention, hidden_states: Tensor, p: float | Tensor, max_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the fewest of the selected experts, by weight, that reach p of the weight of all of them."""
    logits_TE, weights_Tk, ids_Tk = type(router).forward(router, hidden_states)
    gating = ops.top_p_gating(_log_shares(weights_Tk), p, max_experts=max_experts)
    slots_TK = gating.expert_ids.long()
    unused_TK = slots_TK == weights_Tk.shape[1]
    slots_TK = slots_TK.masked_fill(unused_TK, 0)
    kept_TK = weights_Tk.gather(1, slots_TK).masked_fill(unused_TK, 0.0)
    if convention.renormalizes(router):
        kept_TK = kept_TK * (weights_Tk.sum(-1, keepdim=True) / kept_TK.sum(-1, keepdim=True))
    return logits_TE, kept_TK, ids_Tk.gather(1, slots_TK).masked_fill(unused_TK, router.num_experts)


def _log_shares(weights_Tk: Tensor) -> Tensor:
    """Logits whose softmax is each weight's share of a token's total."""
    weights_Tk = weights_Tk.detach()
    return weights_Tk.clamp(min=torch.finfo(weights_Tk.dtype).tiny).log()


def cumulative_mass(router: Any, hidden_states: Tensor, max_experts: int) -> Tensor:
    """``[T, K]``: the mass of a token's best 1, 2, ..., K experts. A token gets 1 + (how many of K - 1 are < p)."""
    convention = convention_of(router)
    assert convention is not None
    if isinstance(router, TopPRouter):
        logits = router.logits(hidden_states.reshape(-1, router.hidden_size)) / router.temperature
    elif convention.mass == "selected":
        logits = _log_shares(type(router).forward(router, hidden_states)[1])
    else:
        x_TH = hidden_states.reshape(-1, router.hidden_dim)
        logits = functional.linear(x_TH, router.weight, getattr(router, "bias", None))
    gating = ops.top_p_gating(logits, 1.0, max_experts=max_experts)
    return gating.expert_weights.cumsum(-1)
