# SPDX-License-Identifier: Apache-2.0
"""Collects the routing of every layer that runs inside a ``with`` block."""

from __future__ import annotations

import operator
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, overload

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from dynamic_moe.ops._torch_private import current_backward_pass, set_side_effects_in_checkpoints
from dynamic_moe.routing import Routing, expects_gradient, mark_missing_gradient

# Wrappers put these into the names of modules; the name that the user wrote has none of them.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class CollectedRoutings(Sequence[Routing]):
    """The routings of one :class:`collect_routing` block, in the order in which the layers ran."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._layers: set[nn.Module] | None = None
        self._is_open = True
        self._grad_mode = torch.is_grad_enabled()
        self._has_warned = False
        # A linked list, newest first. torch.compile replays the store of a new head without having looked at the old
        # one. A Python list would be guarded on its length: every pass would recompile.
        self._newest: _Node | None = None

    def _records(self) -> list[tuple[nn.Module, Routing]]:
        records = []
        layers = self._layers_of_the_model()
        node = self._newest
        while node is not None:
            layer, routing, was_training, node = node
            if layers is None or layer in layers:
                if was_training and self._grad_mode and not torch.compiler.is_compiling():
                    routing = mark_missing_gradient(layer, routing)
                records.append((layer, routing))
        records.reverse()
        return records

    def _layers_of_the_model(self) -> set[nn.Module] | None:
        """The modules of the model, looked up when they are wanted: a pass whose routings nobody reads is spared it."""
        if self._model is None or self._layers is not None:
            return self._layers
        layers = set(self._model.modules())
        if not self._is_open:
            self._layers = layers
        return layers

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
            if layer in names:
                layers.setdefault(names[layer], []).append(routing)
        return layers


# Layer, routing, whether the layer was in training mode, older node.
_Node = tuple[nn.Module, Routing, bool, "_Node | None"]


class _Block:
    """An open block: where its records go, and from which passes."""

    def __init__(self, routings: CollectedRoutings) -> None:
        self.routings: CollectedRoutings | None = routings  # None once it is closed: contexts keep the block itself
        self.backward_pass = -1 if torch.compiler.is_compiling() else current_backward_pass()
        self.config: bool | None = None  # what to set the compiler's option to after the last block

    def __bool__(self) -> bool:
        # In another backward pass than the one the block was opened in, a layer only repeats a checkpointed forward
        # pass, which was recorded when it ran first.
        return self.routings is not None and current_backward_pass() == self.backward_pass

    # torch.compile does not trace a property whose getter is a builtin function: every call of compiled code reads it,
    # as a guard.
    is_recording = property(operator.truth)


_open_blocks: ContextVar[Any] = ContextVar("dynamic_moe_open_blocks")


class _Context:
    """What is open in the running thread and task."""

    # A tuple of blocks, outermost first; this object itself, the default of `get`, where there is none. A property for
    # torch.compile, see above: it cannot trace a ContextVar.
    blocks = property(_open_blocks.get)


class _TracedBlocks(threading.local):
    """Blocks that were opened by code which torch.compile traces: it can trace a list."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_context = _Context()
_traced = _TracedBlocks()


class collect_routing:
    """Context that collects the routing of every :class:`~dynamic_moe.DynamicMoE` layer that runs inside it.

    ::

        with collect_routing(model) as routings:
            logits = model(tokens)
        loss = task(logits) + 1e-2 * losses.load_balancing(routings)
        loss.backward()

    Open one block for each forward pass; several passes in one block are recorded one after the other, as are several
    calls of one layer. Blocks may be nested: each gets everything that runs while it is open, in whatever order they
    are closed.

    A block sees what runs in its own context (:mod:`contextvars`): in its thread and its asyncio task, and in tasks and
    ``asyncio.to_thread`` calls that are started while it is open. Code that a generator is suspended in runs in the
    context of its caller, so a block across a ``yield`` also sees what the caller runs meanwhile; give it its model.

    The routings carry gradients and keep their autograd graph alive; keep :meth:`Routing.detach` or
    :meth:`Routing.statistics` for longer.

    With ``torch.compile`` (also ``fullgraph=True``)
        The block may be opened around the call of a compiled model or inside the compiled function. Opening blocks
        again, and several passes in one block, do not recompile. With CUDA graphs the tensors are overwritten by
        the next pass, as all outputs are.
    With activation checkpointing
        Use ``use_reentrant=False``. The recomputation in the backward pass is not recorded again. Re-entrant
        checkpointing runs the forward pass without gradients, so what is collected in it has none: in training there
        is a warning.
    With both
        Checkpoint calls inside a compiled region need
        ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``. A block that is opened outside
        the compiled region sets it for as long as it is open; for one that is opened inside, set it yourself.

    ``layer(x, return_routing=True)`` returns the routing instead, and needs none of this.

    Parameters
    ----------
    model : Module, optional
        Collect only from layers of this model, compiled or not, and let :meth:`CollectedRoutings.by_layer` name them.
        Which layers it has is looked up when the routings are read. Default: from all layers, also those of other
        models that run meanwhile, such as a teacher in a hook.

    Raises
    ------
    ValueError
        If ``model`` is not a module.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
        self._model = model
        self._blocks: list[_Block] = []  # those that this object has open, in whatever contexts

    def __enter__(self) -> CollectedRoutings:
        routings = CollectedRoutings(self._model)
        block = _Block(routings)
        self._blocks.append(block)
        if torch.compiler.is_compiling():
            _traced.blocks.append(block)
        else:
            others = _blocks_here()
            block.config = others[0].config if others else set_side_effects_in_checkpoints(True)
            _open_blocks.set((*others, block))
        return routings

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            block = self._blocks.pop()
        else:
            block = self._innermost_here()
            self._blocks.remove(block)
        if block.routings is not None:
            block.routings._is_open = False
        if _traced.blocks:
            _traced.blocks[:] = [other for other in _traced.blocks if other is not block]
        if torch.compiler.is_compiling():
            block.routings = None
        else:
            _close(block)

    def _innermost_here(self) -> _Block:
        """The block to close, where several are open: another thread or task may have opened the last one."""
        here, blocks = _blocks_here(), tuple(self._blocks)
        return next((block for block in reversed(blocks) if block in here), blocks[-1])


def record_routing(layer: nn.Module, routing: Routing) -> None:
    """Hand a layer's routing to every open :class:`collect_routing` block; for layers that are not ``DynamicMoE``."""
    blocks = _context.blocks
    if blocks is not _context:
        for block in blocks:
            if block.is_recording:
                _record(block, layer, routing)
    for block in _traced.blocks:
        _record(block, layer, routing)


def _record(block: _Block, layer: nn.Module, routing: Routing) -> None:
    routings = block.routings
    assert routings is not None
    routings._newest = (layer, routing, layer.training, routings._newest)
    if not torch.compiler.is_compiling() and routings._grad_mode and layer.training and not torch.is_grad_enabled():
        _warn_of_reentrant_checkpointing(routings, layer)


def _blocks_here() -> list[_Block]:
    """The blocks that are open in this context, outermost first."""
    blocks = _context.blocks
    return [] if blocks is _context else [block for block in blocks if block.routings is not None]


def _close(block: _Block) -> None:
    was_here = block in _blocks_here()
    block.routings = None
    others = _blocks_here()
    _open_blocks.set(tuple(others) if others else _context)
    if was_here and not others:
        set_side_effects_in_checkpoints(block.config)


def _warn_of_reentrant_checkpointing(routings: CollectedRoutings, layer: nn.Module) -> None:
    """Warn if the pass has no gradients because an autograd.Function runs it, not because the user wants none."""
    if routings._has_warned or not expects_gradient(layer) or not _inside_autograd_function():
        return
    layers = routings._layers_of_the_model()
    if layers is None or layer in layers:
        routings._has_warned = True
        warnings.warn(
            "routings are collected from re-entrant activation checkpointing, which runs the forward pass without "
            "gradients: losses on them count in the number and do not train the router; checkpoint with "
            "use_reentrant=False",
            stacklevel=5,
        )


def _inside_autograd_function() -> bool:
    """Whether the forward half of an autograd.Function is running, as that of torch's checkpointing and of others."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        names = frame.f_code.co_varnames
        if names and isinstance(frame.f_locals.get(names[0]), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _plain_name(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = f"{name}.".replace(prefix, "").removesuffix(".")
    return name
