# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: finds the files, splits them into training and validation, and cuts batches out of them."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Files are joined by this byte, which text does not hold; a model that writes it has finished a file.
SEPARATOR = 0
VALIDATION_FRACTION = 0.05
# Not the library itself: other people's packages, tests, tables of characters, and applications.
SKIPPED_FOLDERS = frozenset(
    ("dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo")
)


@dataclass(frozen=True)
class TextFile:
    """A file's name, relative to where the search began, and what it holds."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Training and validation text; no file is in both unless there is only one file."""

    source: str
    train_files: list[TextFile]
    validation_files: list[TextFile]
    train: Tensor  # uint8 [N]
    validation: Tensor  # uint8 [N]


def load_corpus(data: str, context: int) -> Corpus:
    """Read the text and split it by file, always in the same way for the same files.

    Parameters
    ----------
    data : str
        A file or a folder; empty for the source of the Python standard library.
    context : int
        Length of a sequence: each part must hold at least one, and the byte after it.

    Raises
    ------
    ValueError
        If there is no such path, or not enough text under it.
    """
    if data:
        source, files = data, _read_path(Path(data).expanduser())
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        source = f"the Python {sysconfig.get_python_version()} standard library"
        files = _read_all(folder, [path for path in folder.rglob("*.py") if _is_library(path.relative_to(folder))])
    if not files:
        raise ValueError(f"--data must hold UTF-8 text, found none in {data or folder}")
    train_files, validation_files = _split(files)
    corpus = Corpus(source, train_files, validation_files, _join(train_files), _join(validation_files))
    for part, text in (("training", corpus.train), ("validation", corpus.validation)):
        if len(text) <= context:
            raise ValueError(
                f"--data must hold more than --context {context} bytes of {part} text, got {len(text)} from {source}"
            )
    return corpus


def _is_library(path: Path) -> bool:
    return not SKIPPED_FOLDERS.intersection(path.parts)


def _read_path(path: Path) -> list[TextFile]:
    if path.is_file():
        return _read_all(path.parent, [path])
    if path.is_dir():
        visible = (each for each in path.rglob("*") if not any(p.startswith(".") for p in each.relative_to(path).parts))
        return _read_all(path, [each for each in visible if each.is_file()])
    raise ValueError(f"--data must be an existing file or folder, got {str(path)!r}")


def _read_all(folder: Path, paths: list[Path]) -> list[TextFile]:
    """Read the files that are text, in the order of their names."""
    files = []
    for path in paths:
        content = _read_text(path)
        if content:
            files.append(TextFile(path.relative_to(folder).as_posix(), content))
    return sorted(files, key=lambda file: file.name)


def _read_text(path: Path) -> bytes:
    """Return what a file holds, or nothing if it is not UTF-8 text."""
    with path.open("rb") as file:
        content = file.read(4096)
        if SEPARATOR in content:  # a binary file, which may be large
            return b""
        content += file.read()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return b"" if SEPARATOR in content else content


def _split(files: list[TextFile]) -> tuple[list[TextFile], list[TextFile]]:
    """Take files for validation in the order of a hash of their names, until they hold enough of the text."""
    if len(files) == 1:
        return _split_file(files[0])
    wanted = VALIDATION_FRACTION * sum(len(file.content) for file in files)
    chosen: set[str] = set()
    size = 0
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        # A file that would overshoot is left for training: validation must not swallow the one large file of a folder.
        if size < wanted and size + len(file.content) <= 2 * wanted:
            chosen.add(file.name)
            size += len(file.content)
    if not chosen:
        chosen.add(min(files, key=lambda file: (len(file.content), file.name)).name)
    return [file for file in files if file.name not in chosen], [file for file in files if file.name in chosen]


def _split_file(file: TextFile) -> tuple[list[TextFile], list[TextFile]]:
    """The end of a single file validates its beginning; at least a tenth, since it is all there is."""
    cut = len(file.content) * 9 // 10
    cut = file.content.rfind(b"\n", 0, cut) + 1 or cut
    return [TextFile(file.name, file.content[:cut])], [TextFile(f"{file.name} (end)", file.content[cut:])]


def _join(files: list[TextFile]) -> Tensor:
    joined = bytes([SEPARATOR]).join(file.content for file in files)
    return torch.frombuffer(bytearray(bytes([SEPARATOR]) + joined), dtype=torch.uint8)


class Batches:
    """Training sequences in random order, each once per pass over the text.

    A batch follows from the seed and the number of sequences taken before it, so that this number is all that a
    checkpoint needs.

    Parameters
    ----------
    text : Tensor
        uint8 ``[N]``, N > context.
    context, batch_size, seed : int
        Length and number of sequences, and what decides their order.
    """

    def __init__(self, text: Tensor, context: int, batch_size: int, seed: int) -> None:
        self._text = text
        self._context = context
        self._batch_size = batch_size
        self._seed = seed
        self._per_pass = max(1, (len(text) - 1) // context - 1)
        self._pass = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the targets, int64 ``[batch, context]``, after ``position`` sequences."""
        starts = torch.stack([self._start(position + i) for i in range(self._batch_size)])
        index = starts[:, None] + torch.arange(self._context + 1)
        rows = self._text[index].long()
        return rows[:, :-1], rows[:, 1:]

    def _start(self, sequence: int) -> Tensor:
        number, place = divmod(sequence, self._per_pass)
        if number != self._pass:
            self._pass = number
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            # Another offset in each pass, so that sequences do not break at the same bytes again.
            spare = len(self._text) - 1 - self._per_pass * self._context
            offset = torch.randint(0, spare + 1, (), generator=generator)
            self._starts = torch.randperm(self._per_pass, generator=generator) * self._context + offset
        return self._starts[place]


def validation_batches(text: Tensor, context: int, sequences: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut at most ``sequences`` sequences, evenly spread over the text, into batches like those of `Batches.at`."""
    sequences = min(sequences, max(1, (len(text) - 1) // context))
    starts = torch.linspace(0, len(text) - 1 - context, sequences).long()
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return [(chunk[:, :-1], chunk[:, 1:]) for chunk in torch.split(rows, batch_size)]
