# SPDX-License-Identifier: Apache-2.0
"""Modules that can keep a packed copy of their weights for inference, and notice when it is out of date."""

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynamic_moe import ops
from dynamic_moe.ops import PackedExperts
from dynamic_moe.ops._common import needs_grad


class PackedCopy:
    """Expert weights packed for inference, and what they were made of.

    Parameters
    ----------
    gate_up_proj, down_proj : Tensor
        ``[E, 2I, H]`` and ``[E, H, I]``; see :func:`dynamic_moe.ops.prepack_experts`.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self.experts: PackedExperts = ops.prepack_experts(gate_up_proj, down_proj)
        # Holding the memory that was read, not only its address: another tensor cannot get that address.
        self._source = (gate_up_proj.detach(), down_proj.detach())
        self._versions = (_version(gate_up_proj), _version(down_proj))

    def is_of(self, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
        """Tell whether the weights still are what they were when they were packed."""
        return all(
            now.device == then.device
            and now.dtype == then.dtype
            and now.shape == then.shape
            and now.data_ptr() == then.data_ptr()
            and _version(now) == version
            for now, then, version in zip((gate_up_proj, down_proj), self._source, self._versions, strict=True)
        )


class Prepackable(nn.Module):
    """Base of the modules that have ``prepack()``."""

    def __init__(self) -> None:
        super().__init__()
        self._packed: PackedCopy | None = None

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights as ``[E, 2I, H]`` and ``[E, H, I]``: views, not copies."""
        raise NotImplementedError

    def prepack(self) -> Self:
        """Pack a copy of the weights for inference on the CPU, in the order in which the kernels read them.

        From then on ``forward`` uses the copy wherever no gradient is needed (under ``torch.no_grad()``, or where
        neither the weights nor the inputs require one) and the product has the dtype of the weights; elsewhere it uses
        the weights themselves. Results differ by rounding at most: see :func:`dynamic_moe.ops.expert_mlp_prepacked`.

        It pays where experts get many rows. Where each gets a few, as in decoding, the weights are read about once,
        and packed words can be wider than the weights (see below): on AVX2 such a pass of bfloat16 took up to 1.9
        times as long as the plain one, and of float32 up to 1.2 times. ``benchmarks/results`` shows both.

        The parameters and the state dict stay as they are, so memory for the weights doubles (float16, and bfloat16 on
        processors without AVX512-BF16: triples). When the weights are found to have changed, been replaced, loaded
        anew or moved since, the copy is dropped with a warning; pack them again. ``train()`` drops it too. Copies and
        pickles of the module are not packed.

        A compiled ``forward`` cannot look for changes in place: call ``prepack`` again after making some. Changes
        through ``parameter.data`` are not noticed anywhere.

        Returns
        -------
        Self
            This module.

        Raises
        ------
        ValueError
            If the weights are float64, or not on the CPU. ``forward`` raises it if the CPU level was changed after
            packing.
        """
        self._packed = None  # first: two copies need not fit into memory
        self._packed = PackedCopy(*self._stacked_weights())
        return self

    @property
    def is_prepacked(self) -> bool:
        """Whether there is a packed copy of the weights."""
        return self._packed is not None

    def _packed_for(self, x_TH: Tensor, weights_TK: Tensor) -> PackedExperts | None:
        """Return the packed copy if there is one that may be used for this call."""
        if self._packed is None:
            return None
        weights = self._stacked_weights()
        if not torch.compiler.is_compiling() and not self._packed.is_of(*weights):
            self._drop_packed("changed")
            return None
        packed = self._packed.experts
        dtype = x_TH.dtype
        if torch.is_autocast_enabled(x_TH.device.type):
            dtype = torch.get_autocast_dtype(x_TH.device.type)
        return None if dtype != packed.dtype or needs_grad(x_TH, weights_TK, *weights) else packed

    def _drop_packed(self, what_happened: str) -> None:
        self._packed = None
        warnings.warn(
            f"the weights of {type(self).__name__} were {what_happened} after prepack(): the packed copy was dropped; "
            "call prepack() again",
            stacklevel=4,
        )

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; training drops the packed copy."""
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._packed is not None and not self._packed.is_of(*self._stacked_weights()):
            self._drop_packed("moved or converted")
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._packed is not None:
            self._drop_packed("loaded")
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The packed copy belongs to this processor and to these very tensors.
        return {**self.__dict__, "_packed": None}


def _version(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
