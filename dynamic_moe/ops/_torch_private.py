# SPDX-License-Identifier: Apache-2.0
"""What only private names of torch give, in one place. Tested on the oldest and the newest torch that we support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._library.autograd import Info, make_autograd_impl
from torch._ops import OpOverload
from torch.autograd import forward_ad

from dynamic_moe import _C

_library = torch.library.Library("dynamic_moe", "IMPL")  # type: ignore[no-untyped-call]


def raise_value_errors() -> None:
    """Let an argument that an operator refuses be a ValueError on every torch.

    The kernels throw ``std::invalid_argument``. Up to torch 2.14 that is a ValueError in Python; from 2.15 on, whatever
    leaves a library that is built on the stable ABI is a RuntimeError. The call below every way into an operator
    (public functions, ``torch.ops``, compiled code, exported programs) is the one place where it is translated.
    """
    if _version() < (2, 15):
        return
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dynamic_moe::"):
            packet = getattr(torch.ops.dynamic_moe, name.removeprefix("dynamic_moe::").partition(".")[0])
            for op in (packet, *(getattr(packet, overload) for overload in packet.overloads())):
                if not hasattr(op._op, "_dynamic_moe"):
                    op._op = _raising_value_errors(op._op)


def _version() -> tuple[int, int]:
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


def register_autograd(op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an operator's gradient as `torch.library.register_autograd` does, with two changes.

    Arguments that carry a forward-mode tangent are an error. torch lets an operator of a library without a forward-mode
    formula drop tangents: the derivative is silently zero. The check sees every call from Python, from compiled code
    and exported programs, and under ``torch.func.jvp``; only inference mode, which is above autograd, drops tangents as
    it does with torch's own operators.

    A call that needs no gradient, as all calls of compiled code, goes straight to the kernel.
    """
    differentiated = make_autograd_impl(op, Info(backward, setup_context))
    below = torch._C._after_autograd_keyset

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, (*args, *kwargs.values()))):
            raise RuntimeError(f"{op._name} has no forward-mode derivative: use reverse mode")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiated(keyset, *args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args, **kwargs)

    _library.impl(op, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _has_tangent(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    functorch = torch._C._functorch
    if functorch.is_gradtrackingtensor(value):  # its tangent is out of sight; its level tells which transform made it
        levels = {each.level() for each in functorch.get_interpreter_stack() or () if each.key() == TransformType.Jvp}
        return functorch.maybe_get_level(value) in levels
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]
