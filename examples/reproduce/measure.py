# SPDX-License-Identifier: Apache-2.0
"""What a trained model does with each task: answers, cost, and experts. N tokens, L layers with experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from byte_lm.corpus import validation_batches
from byte_lm.training import Trainer
from dynamic_moe import collect_routing
from reproduce.mixture import MEASURED_LINES
from reproduce.tasks import TASKS, draw_lines

TEXT = "standard library"
BATCH = 64  # sequences at once; more than in training, for the time that it takes


@dataclass(frozen=True)
class Reading:
    """Sequences through a model, token by token, flat."""

    bits: Tensor  # float64 [N], what it costs to predict the byte after each token
    correct: Tensor  # bool [N], whether that byte is the likeliest
    experts: Tensor  # float64 [L, N]


def measure(trainer: Trainer, sequences: int) -> dict[str, Any]:
    """Run ``sequences`` sequences of problems that were never trained on, and as many of text, through the model.

    A token belongs to the byte that it predicts: the experts of an answer are those of the tokens before its bytes.

    Returns
    -------
    dict
        ``tasks``: for each task and for the text its ``tokens``, ``bits`` (mean), ``correct`` (share) and ``experts``
        (mean of each layer; empty in a dense model). Those of a task cover its answers; ``line_experts`` whole lines.
        ``validation_bits``, ``validation_experts``: of ``sequences`` sequences of the validation mixture.
        ``experts_and_bits``: Spearman's correlation, over the tokens of text, of their experts with the cost of what
        they predict; null where every token has as many experts.
    """
    context = trainer.settings.context
    lines = draw_lines(sequences * context + 1, MEASURED_LINES)
    content = torch.frombuffer(bytearray(lines.content), dtype=torch.uint8).long()
    inputs, targets = content[:-1].view(-1, context), content[1:].view(-1, context)
    task = torch.tensor(lines.task[1:])
    answer = torch.tensor(lines.answer[1:])
    # Sequences cut lines, and nobody can answer a question that was not seen whole.
    sequence = torch.arange(len(task)) // context
    whole = torch.tensor(lines.start[1:]) >= sequence * context
    reading = _read(trainer, list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True)))
    figures = {}
    for index, each in enumerate(TASKS):
        figures[each.name] = _figures(reading, (task == index) & whole & answer)
        figures[each.name]["line_experts"] = _figures(reading, (task == index) & whole)["experts"]
    text = load_text_batches(trainer, sequences)
    reading = _read(trainer, text)
    figures[TEXT] = _figures(reading, torch.ones_like(reading.correct))
    mixture = validation_batches(trainer.corpus.validation, context, sequences, BATCH)
    validation = _read(trainer, mixture)
    return {
        "tasks": figures,
        "validation_bits": validation.bits.mean().item(),
        "validation_experts": validation.experts.mean(1).tolist(),
        "experts_and_bits": _correlation(reading),
    }


def load_text_batches(trainer: Trainer, sequences: int) -> list[tuple[Tensor, Tensor]]:
    """Cut sequences from the validation text, without the problems that are mixed into it for training."""
    content = b"\0".join(file.content for file in trainer.corpus.validation_files)
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return validation_batches(text, trainer.settings.context, sequences, BATCH)


def _read(trainer: Trainer, batches: list[tuple[Tensor, Tensor]]) -> Reading:
    bits, correct, experts = [], [], []
    trainer.model.eval()
    for tokens, targets in batches:
        with torch.inference_mode(), collect_routing(trainer.model) as routings:
            logits = trainer.model(tokens).flatten(0, 1)
        bits.append(F.cross_entropy(logits.double(), targets.flatten(), reduction="none") / math.log(2))
        correct.append(logits.argmax(-1) == targets.flatten())
        counts = [routing.experts_per_token.double() for routing in routings]
        experts.append(torch.stack(counts) if counts else torch.empty(0, len(logits), dtype=torch.float64))
    trainer.model.train()
    return Reading(torch.cat(bits), torch.cat(correct), torch.cat(experts, 1))


def _figures(reading: Reading, chosen: Tensor) -> dict[str, Any]:
    return {
        "tokens": int(chosen.sum()),
        "bits": reading.bits[chosen].mean().item(),
        "correct": reading.correct[chosen].double().mean().item(),
        "experts": reading.experts[:, chosen].mean(1).tolist(),
    }


def _correlation(reading: Reading) -> float | None:
    experts = reading.experts.mean(0) if len(reading.experts) else torch.zeros(1)
    if experts.min() == experts.max():
        return None
    return float(stats.spearmanr(experts.numpy(), reading.bits.numpy()).statistic)
