# SPDX-License-Identifier: Apache-2.0
"""Modules that can keep a packed copy of their weights for inference, and notice when it is out of date."""

import operator
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dynamic_moe import ops
from dynamic_moe.experts._packable import is_plain, packable_parameter
from dynamic_moe.ops import PackedExperts
from dynamic_moe.ops._common import needs_grad
from dynamic_moe.ops._torch_private import transforms_are_active


class PackedCopy:
    """Expert weights packed for inference, and what they were made of.

    Parameters
    ----------
    module : Prepackable
        Whose weights to pack.
    """

    def __init__(self, module: "Prepackable") -> None:
        self.parameters = tuple(packable_parameter(module, name) for name in ("gate_up_proj", "down_proj"))
        self.experts: PackedExperts = ops.prepack_experts(*module._stacked_weights())
        # The detached tensor holds the memory that was read: no other tensor can get its address. The address is kept
        # beside it, as share_memory_() gives the very same storage other memory.
        self._sources = [
            (weight, weight.detach(), weight.data_ptr(), weight.shape, weight.stride(), weight._version)
            for weight in self.parameters
        ]
        self._module = weakref.ref(module)

    def __bool__(self) -> bool:
        """Tell whether the weights are what they were when they were packed, as far as torch counts changes."""
        for weight, _, address, shape, stride, version in self._sources:
            if weight.data_ptr() != address or weight._version != version:
                return False
            if weight.shape != shape or weight.stride() != stride:
                return False
        return True

    # torch.compile does not trace a property whose getter is a builtin function: every call of compiled code reads it,
    # as a guard.
    is_current = property(operator.truth)

    def is_of(self, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
        """Tell whether these are the tensors that were packed; functional_call may have put others in their place."""
        return gate_up_proj is self.parameters[0] and down_proj is self.parameters[1]

    def extents(self) -> list[tuple[int, int]]:
        """First address of each weight, and the one after its last."""
        return [_extent(memory) for _, memory, *_ in self._sources]

    def drop(self, what_happened: str) -> None:
        """Drop this copy from its module."""
        module = self._module()
        if module is not None and module._packed is self:
            module._drop_packed(what_happened)


class Prepackable(nn.Module):
    """Base of the modules that have ``prepack()``."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._packed: PackedCopy | None = None

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights as ``[E, 2I, H]`` and ``[E, H, I]``: views, not copies."""
        raise NotImplementedError

    def prepack(self) -> Self:
        """Pack a copy of the weights for inference on the CPU, in the order in which the kernels read them.

        From then on ``forward`` uses the copy wherever no gradient is needed and the product has the dtype of the
        weights; elsewhere it uses the weights themselves. Run inference under ``torch.no_grad()`` or
        ``torch.inference_mode()``, or freeze the weights (``requires_grad_(False)``): a pass that computes gradients of
        the weights ends the copy, see below. Results differ by rounding at most: see
        :func:`dynamic_moe.ops.expert_mlp_prepacked`.

        It pays where experts get many rows. Where each gets a few, as in decoding, the weights are read about once,
        and packed words can be wider than the weights (see below): on AVX2 such a pass of bfloat16 took up to 1.9
        times as long as the plain one, and of float32 up to 1.2 times. ``benchmarks/results`` shows both.

        The parameters and the state dict stay as they are, so memory for the weights doubles (float16, and bfloat16 on
        processors without AVX512-BF16: triples). Copies and pickles of the module are not packed.

        The copy is dropped, with a warning, and ``forward`` uses the weights until they are packed again:

        * when a pass computes gradients of the weights, compiled or not: training may follow;
        * when an optimizer of torch (any subclass of ``torch.optim.Optimizer``) that holds the weights makes a step;
        * when ``forward`` finds that the weights were replaced or changed in place, which torch counts
          (``Tensor._version``), and when they are loaded anew, moved or converted.

        ``train()`` drops it without a warning. A compiled ``forward`` notices all of this, too, and warns when it is
        compiled for it; only from within a checkpointed region nothing can be dropped, and ``fullgraph=True`` raises:
        call ``train()`` before. A program that ``torch.export`` made keeps what it was made with.

        What torch does not count is not noticed; call ``prepack()`` again after it: writes through
        ``parameter.data`` (adapters are merged so), NumPy arrays or the untyped storage; ``torch._fused_*`` functions
        and kernels of other libraries that are called outside an optimizer; files that are mapped into memory and
        rewritten; weights that FSDP has gathered, where ``prepack()`` is called inside a forward pass or with
        ``reshard_after_forward=False``.

        Returns
        -------
        Self
            This module.

        Raises
        ------
        ValueError
            If the weights are float64 or not on the CPU; or if they could change unseen: parametrized, pruned, or of a
            tensor subclass (quantized or sharded weights), sharded by FSDP or ZeRO, on the meta device (accelerate's
            offloading), inference tensors, or in memory shared with other processes. ``forward`` raises it if the CPU
            level was changed after packing.
        """
        self._packed = None  # first: two copies need not fit into memory
        packed = PackedCopy(self)
        _watch_optimizers(packed)
        self._packed = packed
        return self

    @property
    def is_prepacked(self) -> bool:
        """Whether there is a packed copy of the weights."""
        return self._packed is not None

    def _packed_for(self, x_TH: Tensor, weights_TK: Tensor) -> PackedExperts | None:
        """Return the packed copy if there is one that may be used for this call."""
        packed = self._packed
        if packed is None:
            return None
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
        if not self._may_use(packed, gate_up_proj, down_proj):
            return None
        if torch.is_grad_enabled() and (gate_up_proj.requires_grad or down_proj.requires_grad):
            if not torch.compiler.is_exporting():  # which runs nothing
                self._drop_packed(
                    "needed gradients in a pass",
                    "run inference under torch.no_grad() or torch.inference_mode(), and call prepack() again",
                )
            return None
        dtype = x_TH.dtype
        if torch.is_autocast_enabled(x_TH.device.type):
            dtype = torch.get_autocast_dtype(x_TH.device.type)
        return None if dtype != packed.experts.dtype or needs_grad(x_TH, weights_TK) else packed.experts

    def _may_use(self, packed: PackedCopy, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
        """Tell whether the weights of this call are those that were packed; drop the copy if they have changed."""
        if torch.compiler.is_exporting():
            return True  # it puts tensors of its own in the place of the weights
        if not torch.compiler.is_compiling() and transforms_are_active():
            return False  # tensors without an address may stand in the place of the weights
        if packed.is_of(gate_up_proj, down_proj) and packed.is_current:
            return True
        self._drop_packed("were changed")
        return False

    def _drop_packed(self, what_happened: str, advice: str = "call prepack() again") -> None:
        _warn_dropped(type(self).__name__, what_happened, advice)
        self._packed = None

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; training drops the packed copy."""
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._packed is not None and not (
            self._packed.is_of(self.gate_up_proj, self.down_proj) and self._packed.is_current
        ):
            self._drop_packed("were moved or converted")
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._packed is not None:
            self._drop_packed("were loaded")
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The packed copy belongs to this processor and to these very tensors.
        return {**self.__dict__, "_packed": None}


# torch.compile cannot trace a warning: it calls this function once, while it compiles.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_dropped(name: str, what_happened: str, advice: str) -> None:
    message = f"the weights of {name} {what_happened} after prepack(): the packed copy was dropped; {advice}"
    warnings.warn(message, stacklevel=5)


# ---- steps of optimizers: those that are fused do not raise Tensor._version -----------------------------------------

_live_copies: weakref.WeakSet[PackedCopy] = weakref.WeakSet()
_live_copies_lock = threading.Lock()
_optimizers_are_watched = False


def _watch_optimizers(packed: PackedCopy) -> None:
    """Drop the copy when an optimizer that holds its weights makes a step."""
    global _optimizers_are_watched
    with _live_copies_lock:
        _live_copies.add(packed)
        if not _optimizers_are_watched:
            # Disabled: a step that is compiled calls the hook all the same, and does not trace it.
            register_optimizer_step_post_hook(torch.compiler.disable(_drop_updated))  # type: ignore[no-untyped-call]
            _optimizers_are_watched = True


def _drop_updated(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Drop the packed copies of the weights that the optimizer holds."""
    with _live_copies_lock:
        copies = list(_live_copies)
    if not copies:
        return
    updated = sorted(
        _extent(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if is_plain(parameter)
        and parameter.device.type == "cpu"
        and parameter.layout == torch.strided
        and (parameter.requires_grad or parameter.grad is not None)  # the step leaves a frozen one as it is
    )
    starts = [start for start, _ in updated]
    ends = list(accumulate((end for _, end in updated), max))
    for packed in copies:
        for start, end in packed.extents():
            before = bisect_left(starts, end)
            if before > 0 and ends[before - 1] > start:
                packed.drop("were updated by an optimizer")
                break


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's values, and the one after the last: views of one storage need not overlap."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
