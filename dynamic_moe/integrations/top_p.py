# SPDX-License-Identifier: Apache-2.0
"""Turns a model that was trained with a fixed number of experts per token into a dynamic one, and back."""

import types
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from dynamic_moe.integrations.experts import NAME
from dynamic_moe.integrations.routers import cap_of, convention_of, find_routers, select_top_p
from dynamic_moe.routers import TopPRouter

_STATE = "_dynamic_moe_top_p"


class set_top_p:
    r"""Route each token to the fewest experts that reach ``p``, at most as many as the model was trained with.

    ::

        set_top_p(model, 0.5)          # until unset_top_p(model)
        with set_top_p(model, 0.5):    # inside the block only
            model.generate(...)

    The routers are changed in place: weights, state dict, classes and hooks stay, so ``output_router_logits``,
    ``generate`` and ``save_pretrained`` work as before (p is not saved). Each router keeps its own way of weighting
    experts: renormalized or not, scaled or not.

    For routers with a softmax (Mixtral, Qwen, OLMoE, gpt-oss) p is the paper's: a share of the probability over all
    experts. For routers that score experts by sigmoids, with groups and biases (DeepSeek-V3, GLM-4 and others), there
    is no such distribution; there p is a share of the weight of the k experts that the router itself selects. Either
    way ``p=1`` is the model as it was. The routers of :class:`~dynamic_moe.DynamicMoE` may be
    :class:`~dynamic_moe.TopPRouter`: then their p is set.

    Parameters
    ----------
    model : PreTrainedModel
        With routers of a kind named in ``dynamic_moe.integrations.routers.CONVENTIONS``.
    p : float or sequence of float
        In (0, 1]; one for all layers, or one for each router, in the order of ``model.named_modules()``.
    max_experts : int, optional
        Most experts that a token may get. Default: the k of each router. More than k is possible with a softmax.
    experts_implementation : str, optional
        What to switch the experts to as long as p is set; None leaves them. Unused slots hold the id E, which
        ``"dynamic_moe"`` skips; ``"eager"`` does too, but for gpt-oss, and ``"batched_mm"`` raises an IndexError.

    Raises
    ------
    ValueError
        If p or max_experts is out of bounds, the number of p is not that of the routers, or no router is known.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float | Sequence[float],
        *,
        max_experts: int | None = None,
        experts_implementation: str | None = NAME,
    ) -> None:
        routers = find_routers(model)
        ps = [float(p)] * len(routers) if isinstance(p, int | float) else [float(value) for value in p]
        if len(ps) != len(routers):
            raise ValueError(f"p must be one number or {len(routers)}, one for each router, got {len(ps)}")
        caps = [
            _check(name, router, value, max_experts) for (name, router), value in zip(routers.items(), ps, strict=True)
        ]
        self._model = model
        self._before = [(router, _get(router)) for router in routers.values()]
        self._experts_before = _switch_experts(model, experts_implementation)
        for router, value, cap in zip(routers.values(), ps, caps, strict=True):
            _set(router, (value, cap))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for router, state in self._before:
            _set(router, state)
        _restore_experts(self._model, self._experts_before)
        if all(state is None for _, state in self._before):
            self._model.__dict__.pop(_STATE, None)


def unset_top_p(model: nn.Module) -> None:
    """Undo :func:`set_top_p`: the model routes, and runs its experts, as it did before the first call.

    Parameters
    ----------
    model : PreTrainedModel
        A model; one without top-p stays as it is.

    Raises
    ------
    ValueError
        If it has no router of a known kind.
    """
    for router in find_routers(model).values():
        _set(router, None)
    _restore_experts(model, model.__dict__.pop(_STATE, None))


def _check(name: str, router: Any, p: float, max_experts: int | None) -> int:
    if not 0.0 < p <= 1.0:
        raise ValueError(f"p must be in (0, 1], got {p!r} for {name}")
    k = _original_cap(router)
    convention = convention_of(router)
    assert convention is not None
    most = int(router.num_experts) if convention.mass == "probability" else k
    cap = k if max_experts is None else max_experts
    if not 1 <= cap <= most:
        raise ValueError(f"max_experts must be in [1, {most}] for {name} ({type(router).__name__}), got {cap}")
    return cap


def _original_cap(router: Any) -> int:
    original = router.__dict__.get(f"{_STATE}_original")
    return cap_of(router) if original is None else int(original[1] or router.num_experts)


def _get(router: Any) -> tuple[float, int] | None:
    """The p and the cap that were set; None where none were."""
    state: tuple[float, int] | None = router.__dict__.get(_STATE)
    return state


def _set(router: Any, state: tuple[float, int] | None) -> None:
    if isinstance(router, TopPRouter):
        _set_own(router, state)
    elif state is None:
        # Loading with a device map puts a forward of accelerate around the one that it keeps in _old_forward.
        if router.__dict__.pop(_STATE, None) is not None:
            router.__dict__.pop(_forward_name(router), None)
            if hasattr(router, "_hf_hook"):
                router._old_forward = types.MethodType(type(router).forward, router)
    else:
        router.__dict__[_STATE] = state
        setattr(router, _forward_name(router), types.MethodType(_top_p_forward, router))


def _set_own(router: TopPRouter, state: tuple[float, int] | None) -> None:
    original = router.__dict__.setdefault(f"{_STATE}_original", (router.p, router.max_experts))
    router.__dict__.pop(_STATE, None)
    if state is None:
        router.p, router.max_experts = router.__dict__.pop(f"{_STATE}_original", original)
    else:
        router.p, router.max_experts = state
        router.__dict__[_STATE] = state


def _forward_name(router: Any) -> str:
    return "_old_forward" if hasattr(router, "_hf_hook") else "forward"


def _top_p_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, max_experts = self._dynamic_moe_top_p
    return select_top_p(self, hidden_states, p, max_experts)


def _switch_experts(model: Any, name: str | None) -> Any:
    """Switch the experts where the model lets us; returns what they were, for the model without top-p too."""
    if name is None or not hasattr(model, "get_experts_implementation"):
        return None
    before = model.get_experts_implementation()
    model.__dict__.setdefault(_STATE, before)
    model.set_experts_implementation(name)
    return before


def _restore_experts(model: Any, before: Any) -> None:
    if before is not None:
        model.set_experts_implementation(before)
