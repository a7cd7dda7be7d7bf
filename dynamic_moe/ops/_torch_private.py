# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that the package uses, and what it does without each.

A torch in which a name is missing still runs everything: operators through the path that `torch.library` registers,
the rest by public means that cost more or do less, as said at each fallback. The environment variable
``DYNAMIC_MOE_TORCH_PRIVATE`` forces the fallbacks when the package is imported: ``0`` all of them, a list of names from
`NAMES` with commas those alone.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynamic_moe import _C

if TYPE_CHECKING:
    from torch._ops import OpOverload as OpOverload
else:
    OpOverload = type(torch.ops.aten.add.Tensor)

_BELOW_AUTOGRAD = (
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._any_requires_grad",
    "torch.autograd.forward_ad._current_level",
)
_REGISTRATION = (
    "torch._C._after_autograd_keyset",
    "torch._C._functorch.TransformType",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.is_gradtrackingtensor",
    "torch._C._functorch.maybe_get_level",
    "torch._library.autograd.Info",
    "torch._library.autograd.make_autograd_impl",
)
_ERRORS = ("torch._C._dispatch_get_all_op_names", "torch.ops.aten.add.Tensor._op")
_TRANSFORMS = "torch._C._are_functorch_transforms_active"
_GRAPH_TASK = "torch._C._current_graph_task_id"
_COMPILER_CONFIG = "torch._dynamo.config"  # not looked up before torch.compile has imported it
NAMES = (*_BELOW_AUTOGRAD, *_REGISTRATION, *_ERRORS, _TRANSFORMS, _GRAPH_TASK, _COMPILER_CONFIG)


def _names_to_do_without(setting: str) -> set[str]:
    if setting in ("", "0", "1"):
        return set(NAMES) if setting == "0" else set()
    names = set(setting.split(","))
    if not names <= set(NAMES):
        raise ValueError(f"DYNAMIC_MOE_TORCH_PRIVATE must be 0, 1 or some of {', '.join(NAMES)}, got {setting!r}")
    return names


_missing = _names_to_do_without(os.environ.get("DYNAMIC_MOE_TORCH_PRIVATE", ""))


def _has(*names: str) -> bool:
    return all(_get(name) is not None for name in names)


def _get(name: str) -> Any:
    """Return what torch has under the name; None if it has nothing there, or the environment says to do without."""
    if name in _missing:
        return None
    try:
        return operator.attrgetter(name.removeprefix("torch."))(torch)
    except AttributeError:
        return None


# ---- errors ----------------------------------------------------------------------------------------------------------


def raise_value_errors() -> None:
    """Let an argument that an operator refuses be a ValueError on every torch.

    The kernels throw ``std::invalid_argument``. Up to torch 2.14 that is a ValueError in Python; from 2.15 on, whatever
    leaves a library that is built on the stable ABI is a RuntimeError. The call below every way into an operator
    (public functions, ``torch.ops``, compiled code, exported programs) is the one place where it is translated.
    Without the private names it stays a RuntimeError there.
    """
    if _torch_version() < (2, 15) or not _has(*_ERRORS):
        return
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dynamic_moe::"):
            packet = getattr(torch.ops.dynamic_moe, name.removeprefix("dynamic_moe::").partition(".")[0])
            for op in (packet, *(getattr(packet, overload) for overload in packet.overloads())):
                if not hasattr(op._op, "_dynamic_moe"):
                    op._op = _raising_value_errors(op._op)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _raising_value_errors(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            refusal = _C.take_argument_error()
            if refusal is None or refusal not in str(error):
                raise
            failure = ValueError(refusal)
        raise failure  # outside the handler: one error, not two

    call._dynamic_moe = True  # type: ignore[attr-defined]
    return call


# ---- gradients of operators ------------------------------------------------------------------------------------------

goes_below_autograd = _has(*_BELOW_AUTOGRAD)
raw_operators_refuse_tangents = goes_below_autograd and _has(*_REGISTRATION)

_library = torch.library.Library("dynamic_moe", "IMPL")  # type: ignore[no-untyped-call]
if goes_below_autograd:
    _any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
    _below_autograd: Any = torch._C._AutoDispatchBelowAutograd


def register_autograd(op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an operator's gradient as `torch.library.register_autograd` does, with two changes.

    Arguments that carry a forward-mode tangent are an error. torch lets an operator of a library without a forward-mode
    formula drop tangents: the derivative is silently zero. The check sees every call from Python, from compiled code
    and exported programs, and under ``torch.func.jvp``; only inference mode, which is above autograd, drops tangents as
    it does with torch's own operators.

    A call that needs no gradient, as all calls of compiled code, goes straight to the kernel.

    Without the private names it is torch's own function: ``torch.ops``, compiled code and exported programs drop
    tangents; the public functions still refuse them (`eager_call`).
    """
    if not raw_operators_refuse_tangents:
        torch.library.register_autograd(op, backward, setup_context=setup_context)
        return
    from torch._library.autograd import Info, make_autograd_impl

    differentiated = make_autograd_impl(op, Info(backward, setup_context))
    below = torch._C._after_autograd_keyset

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent_anywhere, (*args, *kwargs.values()))):
            raise RuntimeError(f"{_name(op)} has no forward-mode derivative: use reverse mode")
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return differentiated(keyset, *args, **kwargs)
        with _below_autograd():
            return op.redispatch(keyset & below, *args, **kwargs)

    _library.impl(op, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _has_tangent_anywhere(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    functorch = torch._C._functorch
    if functorch.is_gradtrackingtensor(value):  # its tangent is out of sight; its level tells which transform made it
        jvp = functorch.TransformType.Jvp
        levels = {each.level() for each in functorch.get_interpreter_stack() or () if each.key() == jvp}
        return functorch.maybe_get_level(value) in levels
    return _has_tangent(value)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def eager_call(op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function through which the public functions call an operator with a registered gradient.

    In eager mode it goes around what is registered: through an ``autograd.Function`` made of the same two halves, or
    straight to the kernel. Without the private names it calls the operator as registered, which takes longer. Either
    way a tensor that carries a forward-mode tangent is an error.
    """
    functorch_function = _functorch_function(op, setup_context, backward)
    if not goes_below_autograd:

        def registered_call(*args: Any) -> Any:
            if not torch.compiler.is_compiling() and (transforms_are_active() or any(map(_has_tangent, args))):
                return functorch_function.apply(*args)
            return op(*args)

        return registered_call
    function = _eager_function(op, setup_context, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if transforms_are_active():
            return functorch_function.apply(*args)
        # The Function raises where a tensor carries a forward-mode tangent; the kernel would drop it.
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return function.apply(*args)
        with _below_autograd():
            return op(*args)

    return call


def _eager_function(op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """Make the autograd.Function of eager mode, in the form that costs least to call."""

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    # The backward half must not run below autograd: unpacking the saved tensors recomputes a checkpointed region, and
    # that forward pass has to be recorded.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(_class_name(op), (torch.autograd.Function,), members)


def _functorch_function(op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """Make the autograd.Function that torch.func's transforms accept."""
    members = {
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type(f"{_class_name(op)}_functorch", (torch.autograd.Function,), members)


def _class_name(op: OpOverload) -> str:
    return _name(op).replace("::", "_").replace(".", "_")


def _name(op: OpOverload) -> str:
    return str(op.name())  # type: ignore[no-untyped-call]


# ---- what is running -------------------------------------------------------------------------------------------------


class _NoTransform(torch.autograd.Function):
    """A function that torch.func's transforms refuse, since it has no setup_context."""

    @staticmethod
    def forward(ctx: Any) -> None:
        """Do nothing."""


def _transforms_refuse() -> bool:
    try:
        _NoTransform.apply()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return False


# Whether a transform of torch.func is running, in code that is not being compiled.
transforms_are_active: Callable[[], bool] = _get(_TRANSFORMS) or _transforms_refuse

_BACKWARD_PASSES = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}


def _calling_backward_pass() -> int:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _BACKWARD_PASSES:
            return id(frame)
        frame = frame.f_back
    return -1


# A number of the backward pass that runs in this thread; -1 where none does. The fallback looks for it among the
# callers, so it does not see one on a thread of a CUDA device's own; the context there has no open blocks anyway.
current_backward_pass: Callable[[], int] = _get(_GRAPH_TASK) or _calling_backward_pass


def set_side_effects_in_checkpoints(value: bool | None) -> bool | None:
    """Let the compiler record inside a checkpointed region, once, and not again in the recomputation.

    Returns what the option was before; None where there is none. It belongs to the context, as the blocks of
    `collect_routing` do. Without the private name nothing is set, and torch.compile refuses to record there.
    """
    # Absent: nothing can have been compiled yet.
    config: Any = None if _COMPILER_CONFIG in _missing else sys.modules.get(_COMPILER_CONFIG)
    before: bool | None = getattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint", None)
    if before is not None and value is not None:
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = value
    return before
