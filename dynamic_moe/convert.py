# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints: ``python -m dynamic_moe.convert SRC DST``.

A folder in the released format of Huang et al. 2024 becomes one of ours, and one of ours becomes one in the released
format, a tensor at a time. A folder of Mixtral, Qwen3-MoE or OLMoE keeps its architecture; its config.json then names
our kernels, which serve it in every process that has imported ``dynamic_moe.integrations``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamic_moe.integrations._requirements import require

require("transformers", "dynamic_moe.convert")
require("rich", "dynamic_moe.convert")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import dynamic_moe.integrations  # noqa: E402, F401  registers the name of our kernels
from dynamic_moe.models import DynamicMoEConfig  # noqa: E402
from dynamic_moe.models.checkpoint_folder import CheckpointFolder, check_tensors  # noqa: E402
from dynamic_moe.models.configuration import is_released  # noqa: E402
from dynamic_moe.models.released import write_ours, write_released  # noqa: E402
from dynamic_moe.models.released_names import our_shapes, released_shapes  # noqa: E402

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")

Track = Callable[[list[str]], Iterable[str]]


def convert(source: str | Path, destination: str | Path, *, track: Track = list) -> str:
    """Convert a checkpoint.

    Parameters
    ----------
    source : path
        A folder with a config.json and weights.
    destination : path
        Must not exist, or be empty. Also gets the other files of the source, such as those of its tokenizer.
    track : callable
        Gets the names of the tensors and returns them one after the other; may show progress.

    Returns
    -------
    str
        What was done, in words.

    Raises
    ------
    ValueError
        If the destination holds files, the model type is not one that we convert, or a tensor is missing, unknown, or
        of the wrong shape or dtype; the message names it. Nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination {destination} must be empty or not exist, but it holds files")
    if not (source / "config.json").is_file():
        raise ValueError(f"source {source} must hold a config.json, has none")
    fields = json.loads((source / "config.json").read_text())
    kind = fields.get("model_type")
    if is_released(fields) or kind == DynamicMoEConfig.model_type:
        done = _convert_ours(source, destination, is_released(fields), track)
    elif kind in FAMILIES:
        done = _convert_family(source, destination, fields)
    else:
        known = ", ".join((DynamicMoEConfig.model_type, "llama with num_experts (the released format)", *FAMILIES))
        raise ValueError(f"model_type in {source / 'config.json'} must be one of {known}; got {kind!r}")
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not (destination / file.name).exists():
            shutil.copy2(file, destination)
    return done


def _convert_ours(source: Path, destination: Path, released: bool, track: Track) -> str:
    config = DynamicMoEConfig.from_pretrained(source)
    folder = CheckpointFolder(source)
    dtype = check_tensors(folder, released_shapes(config) if released else our_shapes(config))
    if released:
        write_ours(destination, config, folder.read, dtype, track=track)
        return "the released format became ours"
    write_released(destination, config, folder.read, dtype, track=track)
    return "our format became the released one"


def _convert_family(source: Path, destination: Path, fields: dict[str, Any]) -> str:
    """Check the weights of a model of transformers, and copy them: only its config.json changes."""
    folder = CheckpointFolder(source)
    check_tensors(folder, _family_shapes(source, fields["model_type"]))
    destination.mkdir(parents=True, exist_ok=True)
    # Transformers reads this field, and leaves it out of what it writes itself.
    fields["experts_implementation"] = "dynamic_moe"
    (destination / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    files = {tensor.file for tensor in folder.tensors.values()}
    for file in [*sorted(files), *source.glob("*.index.json")]:
        shutil.copy2(file, destination)
    return "the architecture is the same, on our kernels"


def _family_shapes(source: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a published checkpoint of the family has: a tensor for each matrix of each expert."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if kind == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        shape = tuple(tensor.shape)
        stem, _, last = name.rpartition(".")
        for expert in range(shape[0] if stem.endswith(".experts") else 0):
            if last == "down_proj":
                shapes[f"{stem}.{expert}.{down}.weight"] = shape[1:]
            else:
                shapes[f"{stem}.{expert}.{gate}.weight"] = shapes[f"{stem}.{expert}.{up}.weight"] = (
                    shape[1] // 2,
                    shape[2],
                )
        if not stem.endswith(".experts"):
            shapes[name] = shape
    return shapes


def _with_bar(names: list[str]) -> Iterator[str]:
    return iter(track(names, description="Tensors", console=Console(stderr=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_moe.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="folder with config.json and weights")
    parser.add_argument("destination", metavar="DST", help="folder to write, new or empty")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.destination}: {convert(options.source, options.destination, track=_with_bar)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
