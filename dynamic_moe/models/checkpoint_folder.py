# SPDX-License-Identifier: Apache-2.0
"""Folders of weights, one tensor at a time: .safetensors or .bin, in one file or in shards."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dynamic_moe.models.configuration import DynamicMoEConfig, from_released_fields, is_released
from dynamic_moe.models.released_names import IGNORED, released_shapes

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """Where a tensor lies and what it is; its data is not read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class CheckpointFolder:
    """The tensors of a folder. Data is read when it is asked for, so that a copy of the model need not fit into memory.

    Parameters
    ----------
    folder : path
        Holds ``model.safetensors``, ``pytorch_model.bin``, or shards of either with their index.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        By name.

    Raises
    ------
    ValueError
        If there are no weights, a shard is missing or cut off, or the index names a tensor that its file lacks.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        for file, expected in self._files().items():
            if not file.is_file():
                raise ValueError(f"file {file} is missing; it should hold tensor {next(iter(expected), 'unknown')}")
            found = self._headers(file)
            for name in expected:
                if name not in found:
                    raise ValueError(f"tensor {name} is missing in {file}, where the index says it is")
            self.tensors.update(found)

    def _files(self) -> dict[Path, list[str]]:
        """Map the files to the tensors that the index expects in them."""
        for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
            if (self.folder / single).is_file():
                return {self.folder / single: []}
            if (self.folder / index).is_file():
                files: dict[Path, list[str]] = {}
                for name, file in json.loads((self.folder / index).read_text())["weight_map"].items():
                    files.setdefault(self.folder / file, []).append(name)
                return files
        raise ValueError(f"folder {self.folder} must hold one of {', '.join(SINGLE_FILES + INDEX_FILES)}, has none")

    def _headers(self, file: Path) -> dict[str, StoredTensor]:
        if file.suffix == ".safetensors":
            return _safetensors_header(file)
        state = self._load_bin(file)
        return {name: StoredTensor(file, tuple(t.shape), t.dtype) for name, t in state.items()}

    def _load_bin(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open:
            try:
                mapped = zipfile.is_zipfile(file)  # files of torch < 1.6 are not, and cannot be mapped
                self._open[file] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise ValueError(f"file {file} cannot be read, its tensors are cut off or damaged: {error}") from error
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises
        ------
        ValueError
            If there is none of this name.
        """
        if name not in self.tensors:
            raise ValueError(f"tensor {name} is missing in {self.folder}")
        file = self.tensors[name].file
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
            return tensor
        return self._load_bin(file)[name]


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a .safetensors file, and check that the data is all there."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length or size < 8:
            raise ValueError(f"file {file} is cut off within its header, after {size} bytes: no tensor can be read")
        header = json.loads(opened.read(length))
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if name == "__metadata__":
            continue
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise ValueError(f"tensor {name} is cut off in {file}: it ends at byte {end} of a file of {size}")
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
        tensors[name] = StoredTensor(file, tuple(entry["shape"]), dtype)
    try:
        with safe_open(file, framework="pt"):
            return tensors
    except SafetensorError as error:
        raise ValueError(f"file {file} cannot be read: {error}") from error


def check_tensors(folder: CheckpointFolder, shapes: Mapping[str, tuple[int, ...]]) -> torch.dtype:
    """Check that a folder holds exactly these tensors, all of one floating-point dtype, and return it.

    Raises
    ------
    ValueError
        If not; the message names the tensor and the file.
    """
    files = sorted({str(tensor.file) for tensor in folder.tensors.values()})
    found: torch.dtype | None = None
    for name, shape in shapes.items():
        if name not in folder.tensors:
            raise ValueError(f"tensor {name} is missing in {_list(files)}")
        tensor = folder.tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} must have shape {list(shape)}, has {list(tensor.shape)} in {tensor.file}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"tensor {name} must have a floating-point dtype, has {tensor.dtype} in {tensor.file}")
        found = tensor.dtype if found is None else found
        if tensor.dtype != found:
            raise ValueError(
                f"tensor {name} must have dtype {found} as those before it, has {tensor.dtype} in {tensor.file}"
            )
    for name, tensor in folder.tensors.items():
        if name not in shapes and not IGNORED.search(name):
            raise ValueError(f"tensor {name} in {tensor.file} is unknown")
    assert found is not None
    return found


def _list(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"all of {files[0]} ... {files[-1]}"


def check_if_released(folder: Any, subfolder: str = "") -> None:
    """Check the weights of a local folder if it is in the released format; else do nothing.

    Raises
    ------
    ValueError
        As :func:`check_tensors` and :class:`CheckpointFolder`.
    """
    try:
        path = Path(folder) / subfolder
        fields = json.loads((path / "config.json").read_text())
    except (TypeError, OSError):  # the name of a repository, or None
        return
    if is_released(fields):
        config = DynamicMoEConfig.from_dict(from_released_fields(fields))
        check_tensors(CheckpointFolder(path), released_shapes(config))


def write_tensors(
    folder: Path,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = 5 << 30,
    safe: bool = True,
) -> None:
    """Write tensors into files of at most about ``max_shard_bytes``, holding one such file in memory at a time.

    Parameters
    ----------
    folder : Path
        Is made if it is not there.
    names : iterable of str
        In the order in which they shall be written.
    read : callable
        Returns the tensor of a name.
    max_shard_bytes : int
        A tensor larger than this gets a file of its own.
    safe : bool, default True
        Write .safetensors; else .bin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    single, index = (SINGLE_FILES[not safe], INDEX_FILES[not safe])
    stem, suffix = single.rsplit(".", 1)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        part = folder / f"{stem}-part{len(shards):05d}.{suffix}"
        if safe:
            save_file(shard, part, metadata={"format": "pt"})
        else:
            torch.save(dict(shard), part)
        shards.append(list(shard))
        shard.clear()

    for name in names:
        tensor = read(name)
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_shard_bytes:
            flush()
            held = 0
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes  # it would be written with all that it views
        shard[name] = tensor.contiguous().clone() if is_view else tensor.contiguous()
        held += size
        total += size
    flush()
    weight_map = {}
    for number, written in enumerate(shards):
        name = single if len(shards) == 1 else f"{stem}-{number + 1:05d}-of-{len(shards):05d}.{suffix}"
        (folder / f"{stem}-part{number:05d}.{suffix}").rename(folder / name)
        weight_map.update(dict.fromkeys(written, name))
    if len(shards) > 1:
        fields = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(fields, indent=2) + "\n")
