# SPDX-License-Identifier: Apache-2.0
"""What every run learns: blocks of the standard library and blocks of `reproduce.tasks`, by turns."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from byte_lm.corpus import Corpus, load_corpus
from reproduce.tasks import draw_lines

BLOCK = 2048  # bytes; a sequence of the model is much shorter, so most are of one kind
TASK_SHARE = 3  # of every 4 blocks
PERIOD = 4
TRAINING_LINES = 1  # seeds of the problems: no run changes them, so that all learn and are measured on the same
VALIDATION_LINES = 2
MEASURED_LINES = 3


def mix(text: Tensor, size: int, seed: int) -> Tensor:
    """Return about ``size`` bytes, uint8: blocks of text, evenly spread over it, between blocks of problems."""
    periods = max(1, size // (PERIOD * BLOCK))
    text_block = min(BLOCK, len(text))
    starts = torch.linspace(0, len(text) - text_block, periods).long()
    lines = draw_lines(periods * TASK_SHARE * BLOCK, seed)
    problems = torch.frombuffer(bytearray(lines.content), dtype=torch.uint8).reshape(periods, -1)
    parts = [torch.cat((problems[i], text[starts[i] : starts[i] + text_block])) for i in range(periods)]
    return torch.cat(parts)


def load_mixture(data: str, context: int, train_size: int, validation_size: int) -> Corpus:
    """Read the text of the demo and mix problems into both of its parts.

    Parameters
    ----------
    data, context
        As in `byte_lm.corpus.load_corpus`.
    train_size, validation_size : int
        Bytes of the two parts; repeated runs and all variants get the same ones.
    """
    text = load_corpus(data, context)
    return Corpus(
        source=text.source,
        train_files=text.train_files,
        validation_files=text.validation_files,
        train=mix(text.train, train_size, TRAINING_LINES),
        validation=mix(text.validation, validation_size, VALIDATION_LINES),
    )


def fingerprint(corpus: Corpus) -> str:
    """Return a hash of the data: another version of Python has another standard library."""
    return hashlib.sha256(corpus.train.numpy().tobytes() + corpus.validation.numpy().tobytes()).hexdigest()[:16]
