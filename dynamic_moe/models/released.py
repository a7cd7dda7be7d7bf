# SPDX-License-Identifier: Apache-2.0
"""The released format (Huang et al. 2024): loading it through Transformers, and writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from dynamic_moe.models.checkpoint_folder import write_tensors
from dynamic_moe.models.configuration import DynamicMoEConfig, to_released_fields
from dynamic_moe.models.released_names import inv_freq_names, our_shapes, released_shapes

if TYPE_CHECKING:
    from dynamic_moe.models.modeling import DynamicMoEForCausalLM

Read = Callable[[str], Tensor]

_NETWORK = re.compile(
    r"(?P<mlp>model\.layers\.\d+\.mlp)\.(?:mlp|experts\.(?P<expert>\d+))\.(?P<projection>\w+)\.weight"
)
_STACKED = re.compile(r"(?P<mlp>model\.layers\.\d+\.mlp)\.(?P<experts>experts\.)?(?P<projection>gate_up|down)_proj")


def register_released_format() -> None:
    """Tell Transformers how the tensors of the release become ours, when a model of our type is loaded."""
    register_checkpoint_conversion_mapping(
        DynamicMoEConfig.model_type,
        [
            WeightRenaming(r"\.mlp\.mlp\.down_proj\.weight", ".mlp.down_proj"),
            WeightConverter(
                [".mlp.experts.*.gate_proj.weight", ".mlp.experts.*.up_proj.weight"],
                ".mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                ".mlp.experts.*.down_proj.weight", ".mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]
            ),
            WeightConverter(
                [".mlp.mlp.gate_proj.weight", ".mlp.mlp.up_proj.weight"],
                ".mlp.gate_up_proj",
                operations=[Concatenate(dim=0)],
            ),
        ],
        overwrite=True,
    )


def released_tensor(name: str, read: Read) -> Tensor:
    """Return a tensor of the released format, cut from one of ours that ``read`` returns."""
    match = _NETWORK.fullmatch(name)
    if match is None:
        return read(name)
    place = match["mlp"] if match["expert"] is None else f"{match['mlp']}.experts"
    down = match["projection"] == "down_proj"
    stacked = read(f"{place}.{'down_proj' if down else 'gate_up_proj'}")
    if match["expert"] is not None:
        stacked = stacked[int(match["expert"])]
    return stacked if down else stacked.chunk(2)[match["projection"] == "up_proj"]


def our_tensor(name: str, num_experts: int, read: Read) -> Tensor:
    """Return a tensor of ours, put together from those of the released format that ``read`` returns."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return read(name)
    networks = [f"{match['mlp']}.mlp"]
    if match["experts"]:
        networks = [f"{match['mlp']}.experts.{expert}" for expert in range(num_experts)]
    projections = ["down_proj"] if match["projection"] == "down" else ["gate_proj", "up_proj"]
    first = read(f"{networks[0]}.{projections[0]}.weight")
    rows = first.shape[0]
    stacked = first.new_empty(len(networks), rows * len(projections), first.shape[1])
    for expert, network in enumerate(networks):  # one matrix at a time, into its place
        for part, projection in enumerate(projections):
            stacked[expert, part * rows : (part + 1) * rows] = read(f"{network}.{projection}.weight")
    return stacked if match["experts"] else stacked[0]


def inv_freq(config: DynamicMoEConfig) -> Tensor:
    """Frequencies of the rotary embedding, float32 ``[head_dim / 2]``, computed as the released code does."""
    assert config.head_dim is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (10000.0**exponents)


def save_released(
    model: DynamicMoEForCausalLM,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 << 30,
    safe: bool = True,
    with_inv_freq: bool = True,
) -> None:
    """Save a model in the released format, bit for bit: one tensor for each matrix of each expert.

    Parameters
    ----------
    model : DynamicMoEForCausalLM
        On any device.
    folder : path
        Gets the weights, a config.json that calls itself a LLaMA, and generation_config.json.
    max_shard_bytes : int, default 5 GiB
        Most bytes of a file, and about as many of memory that this takes.
    safe : bool, default True
        Write .safetensors; else .bin.
    with_inv_freq : bool, default True
        Also write the buffers ``rotary_emb.inv_freq``, as the release does.

    Raises
    ------
    ValueError
        If the release cannot express the configuration.
    """
    state: Mapping[str, Tensor] = model.state_dict()
    write_released(
        Path(folder),
        model.config,
        lambda name: state[name].cpu(),
        next(iter(state.values())).dtype,
        max_shard_bytes=max_shard_bytes,
        safe=safe,
        with_inv_freq=with_inv_freq,
    )
    model.generation_config.save_pretrained(folder)


def write_released(
    folder: Path,
    config: DynamicMoEConfig,
    read: Read,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5 << 30,
    safe: bool = True,
    with_inv_freq: bool = True,
    track: Callable[[list[str]], Iterable[str]] = list,
) -> None:
    """Write the released format from tensors of ours; see :func:`save_released`. ``track`` may show progress."""
    fields = to_released_fields(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    buffers = set(inv_freq_names(config)) if with_inv_freq else set()
    names = [*released_shapes(config), *sorted(buffers)]

    def tensor(name: str) -> Tensor:
        return inv_freq(config) if name in buffers else released_tensor(name, read)

    write_tensors(folder, track(names), tensor, max_shard_bytes, safe)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def write_ours(
    folder: Path,
    config: DynamicMoEConfig,
    read: Read,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5 << 30,
    track: Callable[[list[str]], Iterable[str]] = list,
) -> None:
    """Write the format of ``save_pretrained`` from tensors of the released one. ``track`` may show progress."""
    names = list(our_shapes(config))
    write_tensors(folder, track(names), lambda name: our_tensor(name, config.num_experts, read), max_shard_bytes)
    config.dtype = dtype
    config.architectures = ["DynamicMoEForCausalLM"]
    config.save_pretrained(folder)
