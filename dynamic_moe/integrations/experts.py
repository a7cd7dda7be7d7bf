# SPDX-License-Identifier: Apache-2.0
"""The experts of Hugging Face models on our kernels: ``experts_implementation="dynamic_moe"``."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from dynamic_moe import ops

NAME = "dynamic_moe"

_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def register() -> None:
    """Make ``experts_implementation="dynamic_moe"`` known to transformers; importing the package has done it."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass of an experts module that follows transformers' ``use_experts_implementation``.

    SwiGLU experts without biases run on the fused operator, :func:`dynamic_moe.ops.expert_mlp`. All others (another
    activation or gate, no gate, biases, transposed or interleaved weights, a norm behind the experts) run on
    :func:`dynamic_moe.ops.grouped_matmul` and :func:`dynamic_moe.ops.combine`, with what lies between in PyTorch;
    transposed weights are copied on the way.

    Parameters
    ----------
    self : Module
        The experts module: its weights, ``num_experts`` and the flags that the decorator sets.
    hidden_states : Tensor
        ``[T, H]``.
    top_k_index : Tensor
        int32 or int64 ``[T, K]``. An id outside ``[0, num_experts)`` marks an unused slot or, under expert parallelism,
        an expert of another rank: it costs nothing, adds nothing, and its weight has a gradient of 0.
    top_k_weights : Tensor
        ``[T, K]``, or ``[T, E]``: the weight of every expert.

    Returns
    -------
    Tensor
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises
    ------
    ValueError
        If the weights are missing, quantized, sharded, sparse or offloaded, or a shape does not fit.
    """
    up_proj = _weight(self, "gate_up_proj" if self.has_gate else "up_proj", hidden_states)
    down_proj = _weight(self, "down_proj", hidden_states)
    x = hidden_states
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(up_proj.dtype)  # as transformers' own grouped_mm does: norms may hand over float32
    weights_TK = _slot_weights(top_k_index, top_k_weights, self.num_experts)
    if _is_plain_swiglu(self):
        y = ops.expert_mlp(x, up_proj, down_proj, top_k_index, weights_TK)
    else:
        y = _general(self, x, up_proj, down_proj, top_k_index, weights_TK)
    return y.to(hidden_states.dtype)


def _weight(experts: Any, name: str, x: Tensor) -> Tensor:
    """Read a weight, once: it may be computed anew each time, as that of a LoRA adapter is.

    Raises
    ------
    ValueError
        If it is anything but a dense floating-point tensor for all experts, where x is.
    """
    try:
        weight = getattr(experts, name)
    except AttributeError:  # a default, or hasattr, makes torch.compile look at a property that is none yet
        weight = None
    wanted, advice = "", "use another experts_implementation"
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        wanted, got = "one tensor for all experts", type(weight).__name__
    elif hasattr(weight, "__tensor_flatten__"):
        wanted, got = "a plain tensor", f"{type(weight).__name__} (quantized or sharded)"
        advice = "load the model without quantization and without tensor parallelism, or " + advice
    elif weight.layout != torch.strided:
        wanted, got = "a dense tensor", f"layout {weight.layout}"
    elif weight.dtype not in _FLOAT_DTYPES:
        wanted = "float32, float64, bfloat16 or float16"
        got = str(weight.dtype).removeprefix("torch.")
        advice = "load the model without quantization, or " + advice
    elif weight.device.type == "meta" and x.device.type != "meta":
        wanted, got = f"on {x.device}", "the meta device, where it has no data"
        advice = "load it, or run the model with the hooks of accelerate that bring offloaded weights back"
    if wanted:
        where = f"{type(experts).__name__}.{name}"
        raise ValueError(f"{where} must be {wanted} with experts_implementation={NAME!r}, got {got}: {advice}")
    assert isinstance(weight, Tensor)
    return weight


def _slot_weights(ids_TK: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """``[T, K]`` weights, also where the router gave one for every expert."""
    if weights.shape == ids_TK.shape:
        return weights
    if weights.shape == (ids_TK.shape[0], num_experts):
        return weights.gather(1, ids_TK.long().clamp(0, num_experts - 1))
    raise ValueError(
        f"top_k_weights must have shape {list(ids_TK.shape)} like top_k_index, or "
        f"{[ids_TK.shape[0], num_experts]}, a weight for every expert; got {list(weights.shape)}"
    )


def _is_plain_swiglu(experts: Any) -> bool:
    return (
        experts.has_gate
        and experts.is_concatenated
        and not experts.is_transposed
        and not experts.has_bias
        and not experts.has_post_expert_norm
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(getattr(experts, "act_fn", None), SiLUActivation | nn.SiLU)
    )


def _general(
    experts: Any, x_TH: Tensor, up_proj: Tensor, down_proj: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The same from single operators. R rows, sorted by expert: only slots in use have one."""
    permutation = ops.permute(ids_TK, experts.num_experts)
    offsets = permutation.expert_offsets
    expert_R = ids_TK.reshape(-1)[permutation.row_slot.long()].long()  # whose bias each row gets

    def project(rows: Tensor, weight: Tensor, name: str, row_token: Tensor | None = None) -> Tensor:
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        out = ops.grouped_matmul(rows, weight, offsets, row_token)
        return out + getattr(experts, f"{name}_bias")[expert_R] if experts.has_bias else out

    name = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = project(x_TH, up_proj, name, permutation.row_token)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = project(rows, down_proj, "down_proj")
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    return ops.combine(rows, weights_TK, permutation.slot_row)
