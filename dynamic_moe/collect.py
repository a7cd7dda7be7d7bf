# SPDX-License-Identifier: Apache-2.0
"""Collects the routing of every layer that runs inside a ``with`` block."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import overload

import torch
from torch import nn

from dynamic_moe.routing import Routing

# Wrappers put these into the names of modules; the name that the user wrote has none of them.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class CollectedRoutings(Sequence[Routing]):
    """The routings of one :class:`collect_routing` block, in the order in which the layers ran."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._layers = None if model is None else set(model.modules())
        # A linked list, newest first: (layer, routing, older). torch.compile replays the store of a new head without
        # having looked at the old one. A Python list would be guarded on its length: every pass would recompile.
        self._newest: _Node | None = None

    def _records(self) -> list[tuple[nn.Module, Routing]]:
        records = []
        node = self._newest
        while node is not None:
            layer, routing, node = node
            if self._layers is None or layer in self._layers:
                records.append((layer, routing))
        records.reverse()
        return records

    def __len__(self) -> int:
        return len(self._records())

    def __iter__(self) -> Iterator[Routing]:
        return iter([routing for _, routing in self._records()])

    @overload
    def __getitem__(self, index: int) -> Routing: ...

    @overload
    def __getitem__(self, index: slice) -> list[Routing]: ...

    def __getitem__(self, index: int | slice) -> Routing | list[Routing]:
        return [routing for _, routing in self._records()][index]

    def by_layer(self) -> dict[str, list[Routing]]:
        """The routings of each layer that ran, under the name it has in the model; a layer that ran twice has two.

        Raises
        ------
        ValueError
            If the block was opened without a model, so that layers have no names.
        """
        if self._model is None:
            raise ValueError("model must be given to collect_routing for layers to have names, got None")
        names = {module: _plain_name(name) for name, module in self._model.named_modules()}
        layers: dict[str, list[Routing]] = {}
        for layer, routing in self._records():
            layers.setdefault(names[layer], []).append(routing)
        return layers


_Node = tuple[nn.Module, Routing, "_Node | None"]


class _ActiveCollections(threading.local):
    """The open blocks of this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[CollectedRoutings] = []


_active = _ActiveCollections()


class collect_routing:
    """Context that collects the routing of every :class:`~dynamic_moe.DynamicMoE` layer that runs inside it.

    ::

        with collect_routing(model) as routings:
            logits = model(tokens)
        loss = task(logits) + 1e-2 * losses.load_balancing(routings)
        loss.backward()

    Open one block for each forward pass; several passes in one block are recorded one after the other. Blocks may be
    nested: each gets everything that runs inside it. A block sees the layers that run in its own thread.

    The routings carry gradients and keep their autograd graph alive; keep :meth:`Routing.detach` or
    :meth:`Routing.statistics` for longer.

    With ``torch.compile`` (also ``fullgraph=True``)
        The block may be opened around the call of a compiled model or inside the compiled function. Opening blocks
        again, and several passes in one block, do not recompile. With CUDA graphs the tensors are overwritten by
        the next pass, as all outputs are.
    With activation checkpointing
        Use ``use_reentrant=False``. The recomputation in the backward pass is not recorded again. (Re-entrant
        checkpointing runs the forward pass without gradients, so what is collected in it has none.)
    With both
        Checkpoint calls inside a compiled region need
        ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``. A block that is opened outside
        the compiled region sets it for as long as it is open; for one that is opened inside, set it yourself. Where
        compiled code lies inside an eager checkpoint, close the block before the backward pass.

    ``layer(x, return_routing=True)`` returns the routing instead, and needs none of this.

    Parameters
    ----------
    model : Module, optional
        Collect only from layers of this model, compiled or not, and let :meth:`CollectedRoutings.by_layer` name them.
        Default: from all layers.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._config = contextlib.ExitStack()

    def __enter__(self) -> CollectedRoutings:
        routings = CollectedRoutings(self._model)
        if not torch.compiler.is_compiling():
            self._config.enter_context(_side_effects_in_compiled_checkpoints())
        _active.stack.append(routings)
        return routings

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _active.stack.pop()
        if not torch.compiler.is_compiling():
            self._config.close()


def record_routing(layer: nn.Module, routing: Routing) -> None:
    """Hand a layer's routing to every open :class:`collect_routing` block; for layers that are not ``DynamicMoE``."""
    if _in_backward():
        return
    for routings in _active.stack:
        routings._newest = (layer, routing, routings._newest)


def _in_backward() -> bool:
    """Whether autograd is running us: then this is the recomputation of a checkpoint, recorded in the forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _side_effects_in_compiled_checkpoints() -> contextlib.AbstractContextManager[object]:
    """Let the compiler record inside a checkpointed region, once, and not again in the recomputation."""
    config = sys.modules.get("torch._dynamo.config")  # absent: nothing can have been compiled yet
    if config is None or not hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        return contextlib.nullcontext()
    patch: contextlib.AbstractContextManager[object] = config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    return patch


def _plain_name(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = f"{name}.".replace(prefix, "").removesuffix(".")
    return name
