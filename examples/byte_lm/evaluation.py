# SPDX-License-Identifier: Apache-2.0
"""What a trained model does with text: its loss, its experts for every byte, and what it writes itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name

from byte_lm.corpus import SEPARATOR
from byte_lm.model import ByteLM
from dynamic_moe import Routing, collect_routing

# What a byte is, in the order in which the report lists it.
BYTE_CLASSES = (
    "start of a word",
    "inside a word",
    "digit",
    "punctuation",
    "space",
    "indentation",
    "line end",
    "other",
)


@dataclass(frozen=True)
class Evaluation:
    """Text through the model, byte by byte. N bytes, L layers with experts (0 in a dense model), E experts."""

    tokens: Tensor  # uint8 [N]
    previous: Tensor  # uint8 [N], the byte before each
    bits: Tensor  # float32 [N], what it costs to predict the byte after each
    experts: Tensor  # uint8 [L, N], how many experts each got
    rows: Tensor  # int64 [L, E], how many bytes each expert got

    @property
    def bits_per_byte(self) -> float:
        """Mean cost."""
        return self.bits.double().mean().item()

    @property
    def experts_per_layer(self) -> list[float]:
        """Mean number of experts of a byte, first layer to last."""
        return [float(value) for value in self.experts.double().mean(1).tolist()]

    @property
    def mean_experts(self) -> float:
        """Mean number of experts of a byte and layer; 1 in a dense model."""
        return self.experts.double().mean().item() if self.experts.numel() else 1.0

    @property
    def load(self) -> list[list[float]]:
        """Share of the rows of each layer that each expert gets; a layer's shares sum to 1."""
        rows = self.rows.double()
        return [[float(value) for value in layer] for layer in (rows / rows.sum(1, keepdim=True)).tolist()]


@dataclass(frozen=True)
class ClassFigures:
    """Mean figures of the bytes of one class."""

    name: str
    share: float
    experts: float
    bits: float


class Inference:
    """Runs a model without gradients, in the precision of its training.

    Parameters
    ----------
    model : ByteLM
        Not compiled: the shapes here change from call to call.
    device, dtype
        Where it is, and the dtype of matrix products (float32 or bfloat16).
    context : int
        Most bytes that it can see.
    """

    def __init__(self, model: ByteLM, device: torch.device, dtype: torch.dtype, context: int) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.context = context

    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Evaluation:
        """Run batches of (bytes, bytes after them), int64 ``[B, S]``, through the model."""
        parts = []
        for tokens, targets in batches:
            logits, routings = self._forward(tokens)
            nats = F.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten(), reduction="none")
            before = torch.cat((torch.full((len(tokens), 1), SEPARATOR), tokens[:, :-1]), 1)
            parts.append((tokens.flatten(), before.flatten(), nats.cpu() / math.log(2), *_experts(routings, nats)))
        tokens_N, previous_N, bits_N, experts_LN, rows_LE = zip(*parts, strict=True)
        return Evaluation(
            tokens=torch.cat(tokens_N).to(torch.uint8),
            previous=torch.cat(previous_N).to(torch.uint8),
            bits=torch.cat(bits_N),
            experts=torch.cat(experts_LN, 1),
            rows=torch.stack(rows_LE).sum(0),
        )

    def trace(self, text: bytes) -> Evaluation:
        """Run consecutive text through the model so that each byte sees at least half a context before it.

        The last byte has no successor, and its cost is 0.
        """
        tokens = torch.tensor(list(text + b"\0"), dtype=torch.int64)
        length, stride = len(text), max(1, self.context // 2)
        parts = []
        for start in range(0, max(1, length - self.context + stride), stride):
            end = min(start + self.context, length)
            window = self.evaluate([(tokens[None, start:end], tokens[None, start + 1 : end + 1])])
            parts.append((window, 0 if start == 0 else self.context - stride))
        bits = torch.cat([window.bits[skip:] for window, skip in parts])
        bits[-1] = 0.0
        experts = torch.cat([window.experts[:, skip:] for window, skip in parts], 1)
        return Evaluation(
            tokens=tokens[:-1].to(torch.uint8),
            previous=torch.cat((tokens.new_tensor([SEPARATOR]), tokens[: length - 1])).to(torch.uint8),
            bits=bits,
            experts=experts,
            rows=torch.stack([window.rows for window, _ in parts]).sum(0),
        )

    def write(self, prompt: bytes, length: int, temperature: float, seed: int) -> Iterator[int]:
        """Continue a prompt byte by byte until ``length`` bytes or the end of a file.

        Parameters
        ----------
        temperature : float
            Divides the logits before a byte is drawn; 0 takes the likeliest.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = [SEPARATOR, *prompt]
        for _ in range(length):
            logits = self._forward(torch.tensor([tokens[-self.context :]]))[0][0, -1].float().cpu()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            if token == SEPARATOR:
                return
            tokens.append(token)
            yield token

    def _forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        with _evaluating(self.model), torch.inference_mode(), collect_routing(self.model) as routings:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = self.model(tokens.to(self.device))
            return logits.float(), list(routings)


def byte_classes(evaluation: Evaluation) -> Tensor:
    """Return, for each byte, the index of its class in `BYTE_CLASSES`, int64 ``[N]``.

    A space belongs to the indentation if only spaces and a line end stand before it, as far as the byte before tells.
    """
    classes = []
    indented = False
    for byte, before in zip(evaluation.tokens.tolist(), evaluation.previous.tolist(), strict=True):
        indented = before in b"\n\0" or (indented and before in b" \t")
        classes.append(_byte_class(byte, before, indented))
    return torch.tensor(classes)


def _byte_class(byte: int, before: int, indented: bool) -> int:
    character, word = chr(byte), (chr(before).isalnum() and before < 128) or before == ord("_")
    if byte >= 128 or byte == SEPARATOR:
        name = "other"
    elif character.isalpha() or character == "_":
        name = "inside a word" if word else "start of a word"
    elif character.isdigit():
        name = "digit"
    elif character in "\n\r":
        name = "line end"
    elif character in " \t":
        name = "indentation" if indented else "space"
    else:
        name = "punctuation"
    return BYTE_CLASSES.index(name)


def figures_by_class(evaluation: Evaluation) -> list[ClassFigures]:
    """Return the mean experts, over layers too, and the cost of each class of bytes that occurs."""
    classes = byte_classes(evaluation)
    experts = evaluation.experts.double().mean(0)
    figures = []
    for index, name in enumerate(BYTE_CLASSES):
        chosen = classes == index
        if chosen.any():
            figures.append(
                ClassFigures(
                    name=name,
                    share=chosen.double().mean().item(),
                    experts=experts[chosen].mean().item(),
                    bits=evaluation.bits[chosen].double().mean().item(),
                )
            )
    return figures


def _experts(routings: list[Routing], like: Tensor) -> tuple[Tensor, Tensor]:
    """Number of experts of each token, uint8 ``[L, N]``, and of tokens of each expert, int64 ``[L, E]``."""
    if not routings:
        return torch.empty(0, len(like), dtype=torch.uint8), torch.empty(0, 0, dtype=torch.int64)
    experts = torch.stack([routing.experts_per_token for routing in routings])
    rows = torch.stack([routing.tokens_per_expert for routing in routings])
    return experts.to(torch.uint8).cpu(), rows.long().cpu()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
