# SPDX-License-Identifier: Apache-2.0
"""Turns a model that was trained with a fixed number of experts per token into a dynamic one, and back."""

import functools
import types
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynamic_moe._checks import check_p, check_positive
from dynamic_moe.integrations import saved_top_p
from dynamic_moe.integrations.experts import NAME
from dynamic_moe.integrations.routers import cap_of, convention_of, find_routers, select_top_p
from dynamic_moe.routers import TopPRouter

# A router while p is set: p and the cap. What compiled code looks at, and finds again in the next block, since other
# objects would have it compiled anew: the forward pass and p, a tensor; and the cap.
_STATE, _COMPILED, _CAP = "_dynamic_moe_top_p", "_dynamic_moe_compiled", "_dynamic_moe_max_experts"
# The configuration that says what runs the experts, if there is one.
_CONFIG = "_dynamic_moe_config"

_Setting = tuple[float, int | None]


class set_top_p:
    r"""Route each token to the fewest experts that reach ``p``, at most as many as the model was trained with.

    ::

        set_top_p(model, 0.5)          # until unset_top_p(model)
        with set_top_p(model, 0.5):    # inside the block only
            model.generate(...)

    The routers are changed in place: weights, state dict, classes and hooks stay, so ``output_router_logits``,
    ``generate`` and ``save_pretrained`` work as before. Each router keeps its own way of weighting experts:
    renormalized or not, scaled or not. Under ``torch.compile`` another p compiles nothing anew.

    p is kept in the model's configuration until :func:`unset_top_p` or the end of the block. A model that is saved with
    it and loaded, or built from such a configuration, routes as before where ``dynamic_moe.integrations`` is imported;
    elsewhere transformers refuses ``experts_implementation="dynamic_moe"``, which is saved too.

    For routers with a softmax (Mixtral, Qwen, OLMoE, gpt-oss) p is the paper's: a share of the probability over all
    experts. For routers that score experts by sigmoids, with groups and biases (DeepSeek-V3, GLM-4 and others), there
    is no such distribution; there p is a share of the weight of the k experts that the router itself selects. Either
    way ``p=1`` is the model as it was. The routers of :class:`~dynamic_moe.DynamicMoE` may be
    :class:`~dynamic_moe.TopPRouter`: then their p is set.

    Parameters
    ----------
    model : PreTrainedModel
        With routers of a kind named in ``dynamic_moe.integrations.routers.CONVENTIONS``.
    p : float or sequence of float, optional
        In (0, 1]; one for all layers, or one for each router, in the order of ``model.named_modules()``. Default: what
        the configuration of the model says, for a model that was built before this package was imported.
    max_experts : int, optional
        Most experts that a token may get. Default: the k of each router. More than k is possible with a softmax.
    experts_implementation : str, optional
        What to switch the experts to as long as p is set; None leaves them. ``"dynamic_moe"`` skips unused slots: they
        hold the id E. Others do not, so that theirs hold the id of the token's best expert, with weight 0.

    Raises
    ------
    ValueError
        If p or max_experts is out of bounds, the number of p is not that of the routers, no router is known, or there
        is no p, neither here nor in the configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float | Sequence[float] | None = None,
        *,
        max_experts: int | None = None,
        experts_implementation: str | None = NAME,
    ) -> None:
        routers = find_routers(model)
        if p is not None:
            settings = _settings(routers, p, max_experts)
        elif max_experts is not None:
            raise ValueError(f"max_experts must be None where p is: the configuration has both, got {max_experts}")
        elif not (settings := _saved(model)):
            raise ValueError(f"p must be given where config.{saved_top_p.KEY} is not set, got None")
        self._model = model
        self._before = [(router, _get(router)) for router in routers.values()]
        self._experts_before = _switch_experts(model, experts_implementation)
        saved_top_p.warn_of_shared_configurations(model)
        _set_all(model, settings)

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
        saved_top_p.write(self._model, _get)


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
        _forget(router)
    _restore_experts(model, model.__dict__.pop(_STATE, None))
    saved_top_p.write(model, _get)


def apply_saved_top_p(model: nn.Module) -> None:
    """Route as the configurations in the model say, where they say something; transformers chose the experts already.

    Raises
    ------
    ValueError
        If what they say does not fit the routers.
    """
    _set_all(model, _saved(model))


def _settings(
    routers: dict[str, nn.Module], p: float | Sequence[float], max_experts: int | None
) -> list[tuple[nn.Module, _Setting]]:
    """What each router shall have: a p and a cap."""
    p = p.tolist() if isinstance(p, Tensor) else p
    ps = list(p) if isinstance(p, Iterable) and not isinstance(p, str) else [p] * len(routers)
    if len(ps) != len(routers):
        raise ValueError(f"p must be one number or {len(routers)}, one for each router, got {len(ps)}")
    return [
        (router, (check_p(value, f" for {name}"), _check_cap(name, router, max_experts)))
        for (name, router), value in zip(routers.items(), ps, strict=True)
    ]


def _saved(model: nn.Module) -> list[tuple[nn.Module, _Setting]]:
    found = saved_top_p.read(model)
    return [(router, (check_p(p, f" for {name}"), _check_cap(name, router, cap))) for router, name, (p, cap) in found]


def _set_all(model: nn.Module, settings: list[tuple[nn.Module, _Setting]]) -> None:
    for owner, _, router in saved_top_p.routers_with_owners(model):
        router.__dict__[_CONFIG] = owner.config
    for router, setting in settings:
        _set(router, setting)
    saved_top_p.write(model, _get)


def _check_cap(name: str, router: Any, max_experts: int | None) -> int:
    k = _original_cap(router)
    convention = convention_of(router)
    assert convention is not None
    most = int(router.num_experts) if convention.mass == "probability" else k
    cap = k if max_experts is None else check_positive("max_experts", max_experts)
    if cap > most:
        raise ValueError(f"max_experts must be in [1, {most}] for {name} ({type(router).__name__}), got {cap}")
    return cap


def _original_cap(router: Any) -> int:
    original = router.__dict__.get(f"{_STATE}_original")
    return cap_of(router) if original is None else int(original[1] or router.num_experts)


def _get(router: Any) -> _Setting | None:
    """The p and the cap that were set; None where none were."""
    state: _Setting | None = router.__dict__.get(_STATE)
    return state


def _set(router: Any, state: _Setting | None) -> None:
    if isinstance(router, TopPRouter):
        _set_own(router, state)
    elif state is None:
        # Loading with a device map puts a forward of accelerate around the one that it keeps in _old_forward.
        if router.__dict__.pop(_STATE, None) is not None:
            router.__dict__.pop(_forward_name(router), None)
            if hasattr(router, "_hf_hook"):
                router._old_forward = types.MethodType(type(router).forward, router)
    else:
        if _COMPILED not in router.__dict__:
            router.__dict__[_COMPILED] = (functools.partial(_top_p_forward, router), _p_tensor(router))
        forward, p = router.__dict__[_COMPILED]
        p.fill_(state[0])  # in place: graphs read this very memory
        router.__dict__[_CAP] = state[1]
        if router.__dict__.get(_STATE) is None:
            setattr(router, _forward_name(router), forward)
        router.__dict__[_STATE] = state


def _forget(router: Any) -> None:
    """Unset p and leave no trace."""
    _set(router, None)
    for name in (_COMPILED, _CAP, _CONFIG):
        router.__dict__.pop(name, None)


def _p_tensor(router: Any) -> Tensor:
    # Models are built on the meta device, and the weights follow; then p is on the CPU, from where graphs read it too.
    device = "cpu" if router.weight.is_meta else router.weight.device
    with torch.inference_mode(False):  # else it could not be changed outside of it
        return torch.empty(1, dtype=torch.float64, device=device)  # no scalar, as in TopPRouter


def _set_own(router: TopPRouter, state: _Setting | None) -> None:
    original = router.__dict__.setdefault(f"{_STATE}_original", (router.p, router.max_experts))
    router.__dict__.pop(_STATE, None)
    if state is None:
        router.p, router.max_experts = router.__dict__.pop(f"{_STATE}_original", original)
    else:
        router.p, router.max_experts = state
        router.__dict__[_STATE] = state


def _forward_name(router: Any) -> str:
    return "_old_forward" if hasattr(router, "_hf_hook") else "forward"


def _top_p_forward(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # A number that changes would be compiled anew each time; eager mode takes less time for a number.
    p = router._dynamic_moe_compiled[1] if torch.compiler.is_compiling() else router._dynamic_moe_top_p[0]
    logits_TE, weights_TK, ids_TK = select_top_p(router, hidden_states, p, router._dynamic_moe_max_experts)
    if getattr(router.__dict__.get(_CONFIG), "_experts_implementation", None) != NAME:
        ids_TK = torch.where(ids_TK == router.num_experts, ids_TK[:, :1], ids_TK)
    return logits_TE, weights_TK, ids_TK


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


saved_top_p.on_construction(apply_saved_top_p)
