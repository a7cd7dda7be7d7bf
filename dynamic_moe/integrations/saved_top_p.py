# SPDX-License-Identifier: Apache-2.0
"""p in the configuration of a model, so that a model that is saved and loaded again routes as before."""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dynamic_moe.integrations.experts import NAME
from dynamic_moe.integrations.routers import convention_of

KEY = "dynamic_moe_top_p"

Settings = tuple[float, int | None]

# The models of transformers that were built since this module was imported.
_models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def routers_with_owners(model: nn.Module) -> Iterator[tuple[PreTrainedModel, str, nn.Module]]:
    """Each router with the innermost model of transformers that holds it, and its name in there."""

    def visit(module: nn.Module, owner: Any, name: str) -> Iterator[tuple[PreTrainedModel, str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, PreTrainedModel):
            owner, name = module, ""
        if owner is not None and convention_of(module) is not None:
            yield owner, name, module
        for child, submodule in module.named_children():
            yield from visit(submodule, owner, f"{name}.{child}".lstrip("."))

    seen: set[nn.Module] = set()
    yield from visit(model, None, "")


def write(model: nn.Module, get: Callable[[Any], Settings | None]) -> None:
    """Put what ``get`` returns for each router into the configurations, or nothing where it returns None for all.

    The configuration of the whole model also gets the experts' implementation: transformers reads that field, so that
    it refuses to load the model where this package is not imported, instead of routing in another way.
    """
    configs: dict[int, tuple[Any, dict[str, Any]]] = {}
    for owner, name, router in routers_with_owners(model):
        settings = get(router)
        _, entries = configs.setdefault(id(owner.config), (owner.config, {}))
        if settings is not None:
            entries[_unwrapped(name)] = {"p": settings[0], "max_experts": settings[1]}
    for config, entries in configs.values():
        _put(config, KEY, entries or None)
        _put(config, "experts_implementation", None)  # of a part that was built before the whole
    is_set = any(entries for _, entries in configs.values())
    for outer in _outermost(model):
        uses_ours = is_set and NAME in outer.get_experts_implementation().values()
        _put(outer.config, "experts_implementation", NAME if uses_ours else None)


def read(model: nn.Module) -> list[tuple[nn.Module, str, Settings]]:
    """Return the routers of which a configuration says something, their names, and what it says.

    Raises
    ------
    ValueError
        If a configuration has p for other routers than its model has.
    """
    found = []
    for owner, name, router in routers_with_owners(model):
        entries = getattr(owner.config, KEY, None)
        if entries is None:
            continue
        entry = entries.get(_unwrapped(name))
        if entry is None:
            raise ValueError(
                f"config.{KEY} must have an entry for each router of {type(owner).__name__}, has none for {name}: "
                f"delete {KEY} from the configuration and call set_top_p"
            )
        found.append((router, name, (entry["p"], entry["max_experts"])))
    return found


def warn_of_shared_configurations(model: nn.Module) -> None:
    """Warn where another model has a configuration of this one: it would be saved with p, too, or without its own."""
    parts = set(model.modules())
    configs = {id(owner.config) for owner, _, _ in routers_with_owners(model)}
    for other in set(_models):
        if id(other.config) in configs and parts.isdisjoint(other.modules()):
            warnings.warn(
                f"{type(model).__name__} shares its configuration with another {type(other).__name__}: what is saved "
                "of the one's p is saved of the other's, too. Build each from a copy, copy.deepcopy(config)",
                stacklevel=3,
            )
            return


def on_construction(apply: Callable[[PreTrainedModel], None]) -> None:
    """Call ``apply`` with every model of transformers as soon as its modules are there, before weights are loaded."""
    # There is no hook for this. Every model ends its constructor with post_init, also within another model.
    original: Callable[[PreTrainedModel], None] = PreTrainedModel.post_init

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        _models.add(self)
        if _says_something(self.config):
            apply(self)

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def _outermost(model: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(model, PreTrainedModel):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child)


def _says_something(config: Any) -> bool:
    if getattr(config, KEY, None) is not None:
        return True
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return any(part is not None and _says_something(part) for part in parts)


def _put(config: Any, name: str, value: Any) -> None:
    if value is not None:
        setattr(config, name, value)
    elif name in config.__dict__:
        delattr(config, name)


def _unwrapped(name: str) -> str:
    """The name that a router has without the wrappers of PEFT, which a saved model has not."""
    parts = name.split(".")
    wrapped = {"base_layer", "original_module", "modules_to_save"}
    cut = next((i for i, part in enumerate(parts) if part in wrapped), len(parts))
    return ".".join(parts[:cut])
