# SPDX-License-Identifier: Apache-2.0
"""What the operators share: argument checks, the autocast rule, and how a raw operator gets its gradient."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynamic_moe._gpu_record import warn_unless_confirmed
from dynamic_moe.ops._torch_private import (
    OpOverload,
    eager_call,
    raise_value_errors,
    register_autograd,
    transforms_are_active,
)

raw = torch.ops.dynamic_moe
raise_value_errors()

Fake = TypeVar("Fake", bound=Callable[..., Any])

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_checked = os.environ.get("DYNAMIC_MOE_CHECKED", "0") not in ("", "0")


def checked_mode() -> bool:
    """Tell whether gating raises on NaN or infinite logits unless a call says otherwise.

    Off by default; on if the environment variable ``DYNAMIC_MOE_CHECKED`` is 1 at import, or after
    `set_checked_mode`.
    """
    return _checked


def set_checked_mode(enabled: bool) -> None:
    """Switch checked mode on or off in this process.

    Parameters
    ----------
    enabled : bool
        Whether ``check_finite=None`` shall mean ``check_finite=True``.
    """
    global _checked
    _checked = bool(enabled)


def sac_save_ops() -> list[OpOverload]:
    """Return the operators whose results selective activation checkpointing should keep.

    They are the routing decision, which is small, and the matrix products, which are the work. Everything else in a
    Mixture-of-Experts layer is cheap to compute again.

    Returns
    -------
    list of OpOverload
        To be given to ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
    """
    return [
        raw.top_p_gating.default,
        raw.top_p_gating.tensor,
        raw.top_k_gating.default,
        raw.permute.default,
        raw.grouped_matmul.default,
        raw.expert_mlp.default,
    ]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gate weights, statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], **sizes: int | None) -> None:
    """Check type, dtype and shape of an argument.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    tensor : Tensor
        The argument.
    dtypes : tuple of torch.dtype
        The dtypes allowed.
    **sizes : int or None
        The name and the size of every dimension in order; None where any size will do. Sizes that depend on data
        (R) must be left None: comparing them would break a graph under torch.compile. The kernels check them.

    Raises
    ------
    TypeError
        If it is not a tensor.
    ValueError
        If dtype or shape differ.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    shape = tensor.shape
    if len(shape) == len(sizes):
        for want, size in zip(sizes.values(), shape):  # noqa: B905  equally long, and strict= costs time in every call
            if want is not None and want != size:
                break
        else:
            return
    wanted = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in sizes.items())
    raise ValueError(f"{name} must have shape [{wanted}], got {list(shape)}")


def as_int(name: str, value: Any) -> int:
    """Return an integer of another type (NumPy's, a symbolic one) as torch takes it; a ValueError for what is none."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or isinstance(value, torch.SymInt):  # torch takes both as an int
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Check that tensors are on a device.

    Raises
    ------
    ValueError
        If one is not; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}")


def check_cuda(name: str, tensor: Tensor) -> None:
    """Check that an argument is not float64 on CUDA, where no kernel computes in it; warn if no GPU has run those yet.

    Raises
    ------
    ValueError
        If it is.
    """
    if tensor.is_cuda:
        if tensor.dtype == torch.float64:
            raise ValueError(f"{name} must be float32, bfloat16 or float16 on CUDA, got float64")
        warn_unless_confirmed()


def allow_tf32(x: Tensor) -> bool:
    """Tell whether a matrix product of x may round its inputs to TF32: as torch's own may, for float32 on CUDA."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and _torch_allows_tf32()


# A compiled graph guards on torch's setting, and is made anew if that changes.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _torch_allows_tf32() -> bool:
    # The setting that covers both of torch's: the one for all of CUDA, and the older torch.backends...allow_tf32.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the operands of a matrix product as ``torch.autocast`` asks; float64 stays, as in torch's own rule."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # there is no autocast for meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether autograd will differentiate an operator applied to these tensors."""
    if not torch.is_grad_enabled():
        return False
    # Inside torch.func.grad the tensors are wrappers whose flag need not tell.
    return any(tensor is not None and tensor.requires_grad for tensor in tensors) or (
        not torch.compiler.is_compiling() and transforms_are_active()
    )


def register_fake(op: OpOverload) -> Callable[[Fake], Fake]:
    """Decorate the function that tells shapes and dtypes of an operator's results (`torch.library.register_fake`)."""
    decorate: Callable[[Fake], Fake] = torch.library.register_fake(op)
    return decorate


def differentiable(
    op: OpOverload, setup_context: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give a raw operator its gradient, and return the function through which the public functions call it.

    The gradient is registered with the operator, so that whoever calls ``torch.ops.dynamic_moe`` directly, an exported
    program and ``torch.compile`` have it. In eager mode that registered path costs several times what a small operator
    itself does, also where no gradient is needed; the returned function goes around it (`eager_call`).

    Neither path has a forward-mode derivative: a tensor that carries a tangent is an error, never a tangent of zero.

    Parameters
    ----------
    op : OpOverload
        The raw operator.
    setup_context : callable
        ``setup_context(ctx, inputs, output)``: keeps what the backward pass needs.
    backward : callable
        ``backward(ctx, *grads)``: one gradient or None for each input. What it calls must be differentiable again, or
        made by `differentiable_once`: a gradient must not lose what it depends on without an error.

    Returns
    -------
    callable
        Takes the operator's arguments by position and returns its results.
    """
    register_autograd(op, setup_context, backward)
    return eager_call(op, setup_context, backward)


def differentiable_once(op: OpOverload) -> Callable[..., Any]:
    """Return the function through which a backward pass calls the raw operator of its gradients.

    The result is a node of the graph wherever one of the arguments requires a gradient (``create_graph=True``,
    ``torch.func.grad`` of ``grad``), and differentiating it raises. ``once_differentiable`` of torch would not do: it
    looks at incoming gradients alone and leaves its node without a way to the saved tensors, so that a Hessian is
    silently zero.

    Parameters
    ----------
    op : OpOverload
        The raw operator.

    Returns
    -------
    callable
        Takes the operator's arguments by position and returns its results.
    """
    return differentiable(op, _keep_nothing, _no_second_derivative)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "a second derivative was asked for: gating, permutation and expert products of dynamic_moe have a first "
        "derivative only; dynamic_moe.reference holds the same functions in PyTorch, differentiable any number of times"
    )
