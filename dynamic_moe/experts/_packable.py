# SPDX-License-Identifier: Apache-2.0
"""Refuses to pack weights that could change without the packed copy being dropped."""

from torch import Tensor, nn


def packable_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter if a packed copy of it can be kept up to date.

    Parameters
    ----------
    module : Module
        Whose parameter it is.
    name : str
        The parameter's name.

    Raises
    ------
    ValueError
        If it is no parameter, or other code or other processes may change its values unseen.
    """
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is None:
        raise ValueError(
            f"{name} must be a parameter of {type(module).__name__} to be packed, got a tensor that other code "
            "computes (a parametrization, an adapter, pruning, FSDP): remove, merge or unshard it first"
        )
    if reason := _reason_against(weight):
        raise ValueError(f"{name} must be a plain tensor of this process to be packed, got {reason}")
    return weight


def _reason_against(weight: Tensor) -> str:
    """What speaks against packing the weight, and what to do about it; empty if nothing does."""
    if weight.device.type not in ("cpu", "meta"):
        return ""  # prepack_experts says what to call there
    # getattr: FSDP 1 and DeepSpeed ZeRO 3 keep ordinary parameters and mark them.
    if getattr(weight, "_fsdp_flattened", False) or hasattr(weight, "ds_id"):
        return "a sharded weight: pack a model that is not sharded"
    if not is_plain(weight):
        return f"{type(weight).__name__}: pack a model that is neither sharded nor quantized"
    if weight.device.type == "meta":
        return (
            "a weight on the meta device: load or initialize it first, and without offloading "
            "(accelerate keeps offloaded weights there between passes)"
        )
    if weight.is_inference():
        return "an inference tensor, whose changes are not counted: build or load the module outside inference_mode"
    if _is_shared(weight):
        return "memory that other processes may write to: copy the module (copy.deepcopy) and pack the copy"
    return ""


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's values are in its own memory, and not in tensors that a subclass wraps."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _is_shared(weight: Tensor) -> bool:
    """Tell whether the memory of a weight on the CPU is a shared mapping.

    ``Tensor.is_shared`` does not tell. It is true of a file that is mapped privately, as ``torch.from_file`` maps it,
    and false of slices of a shared mapping, as ``torch.load(mmap=True)`` makes them.
    """
    address = weight.data_ptr()
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, permissions = line.split(maxsplit=2)[:2]
                first, end = (int(bound, 16) for bound in span.split("-"))
                if first <= address < end:
                    # CUDA maps pinned memory as shared, but nobody else has it.
                    return permissions.endswith("s") and not weight.is_pinned()
    except OSError:
        pass
    return bool(weight.is_shared())  # type: ignore[no-untyped-call]
