# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, schedule, evaluations, checkpoints, and the history that they leave."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from byte_lm.corpus import Batches, Corpus, validation_batches
from byte_lm.evaluation import Evaluation, Inference
from byte_lm.model import ByteLM, moe_layers
from byte_lm.settings import Settings
from dynamic_moe import _C, collect_routing, losses

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_FORMAT = 1
FINAL_LR = 0.02  # of the highest
FINAL_EVALUATION = 4  # times the sequences of the others


@dataclass
class History:
    """What happened, in columns. Costs are in bits per byte; experts are means per token, one figure per layer."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training, when the step was done
    bits: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    experts: list[list[float]] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    eval_bits: list[float] = field(default_factory=list)
    eval_experts: list[list[float]] = field(default_factory=list)


class Trainer:
    """A model, its optimizer, and where they stand in the run.

    Parameters
    ----------
    settings : Settings
        Checked options.
    corpus : Corpus
        The text.
    folder : Path
        Where the checkpoint is written.
    checkpoint : dict, optional
        What `load_checkpoint` read: go on from there, bit for bit as if the run had not stopped. (With a time limit the
        learning rate follows the clock, so two runs are never the same.)
    """

    def __init__(
        self, settings: Settings, corpus: Corpus, folder: Path, checkpoint: dict[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.folder = folder
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        torch.manual_seed(settings.seed)
        self.model = ByteLM(settings).to(self.device)
        self.optimizer = make_optimizer(self.model, settings)
        self.inference = Inference(self.model, self.device, self.dtype, settings.context)
        self.batches = Batches(corpus.train, settings.context, settings.batch_size, settings.seed)
        self.history = History()
        self.step = 0
        self.seconds = 0.0
        self._moe_layers = len(moe_layers(self.model))
        self._pending: list[Tensor] = []
        self._pending_rates: list[tuple[float, float]] = []
        if checkpoint is not None:
            self._restore(checkpoint)
        self._forward = torch.compile(self.model) if settings.compile else self.model

    @property
    def tokens(self) -> int:
        """Bytes trained on so far."""
        return self.step * self.settings.batch_size * self.settings.context

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1: of the steps or of the time, whichever is further."""
        done = [0.0]
        if self.settings.steps:
            done.append(self.step / self.settings.steps)
        if self.settings.minutes:
            done.append(self.seconds / (60 * self.settings.minutes))
        return min(1.0, max(done))

    @property
    def seconds_left(self) -> float:
        """Time until the run is over at its speed so far; infinite as long as the first steps do not tell it."""
        return self.seconds * (1 - self.progress) / self.progress if self.step >= 5 else math.inf

    def run(self, after_step: Callable[[Trainer], bool]) -> None:
        """Train until the run is over or ``after_step``, called after each step, returns False."""
        mark = time.perf_counter()
        while self.progress < 1:
            self.train_step()
            if self.step % self.settings.eval_interval == 0:
                self.evaluate()
                self.save()
            now = time.perf_counter()
            self.seconds += now - mark
            mark = now
            self._flush_if_due()
            if not after_step(self):
                break
        self._flush()

    def train_step(self) -> None:
        """Do one step."""
        tokens, targets = (each.to(self.device) for each in self.batches.at(self.step * self.settings.batch_size))
        lr = self.settings.lr * schedule(self.progress, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with collect_routing(self.model) as routings:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = self._forward(tokens)
            task = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            zero = task.new_zeros(())
            balance, entropy, z = zero, zero, zero
            if self._moe_layers:
                balance = losses.load_balancing(routings)
                entropy = losses.dynamic(routings)
                z = losses.router_z(routings)
            experts = [routing.mean_experts_per_token for routing in routings]
        weights = self.settings
        loss = task + weights.balance * balance + weights.dynamic * entropy + weights.router_z * z
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append(torch.stack([task, balance, entropy, norm, *experts]).detach())
        self._pending_rates.append((lr, self.seconds))

    def evaluate(self, final: bool = False) -> Evaluation:
        """Run the validation text through the model, and note the result in the history."""
        sequences = self.settings.eval_sequences * (FINAL_EVALUATION if final else 1)
        batches = validation_batches(self.corpus.validation, self.settings.context, sequences, self.settings.batch_size)
        result = self.inference.evaluate(batches)
        history = self.history
        if history.eval_step and history.eval_step[-1] == self.step:  # the final one replaces the last one
            for column in (history.eval_step, history.eval_bits, history.eval_experts):
                column.pop()
        history.eval_step.append(self.step)
        history.eval_bits.append(result.bits_per_byte)
        history.eval_experts.append(result.experts_per_layer)
        return result

    def save(self) -> Path:
        """Write the checkpoint; one that is there is replaced only by a complete one."""
        self._flush()
        path = self.folder / CHECKPOINT
        state = {
            "format": CHECKPOINT_FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": dataclasses.asdict(self.history),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        incomplete = path.with_suffix(".part")
        torch.save(state, incomplete)
        os.replace(incomplete, path)
        return path

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step = checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.history = History(**checkpoint["history"])
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint["cuda_rng"]:
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])

    def _flush_if_due(self) -> None:
        # On a GPU reading a figure waits for the step to finish; on a CPU it has finished.
        if self.device.type == "cpu" or len(self._pending) >= self.settings.log_interval:
            self._flush()

    def _flush(self) -> None:
        """Move the figures of the last steps from the device into the history."""
        if not self._pending:
            return
        rows = torch.stack(self._pending).tolist()
        first = self.step - len(rows) + 1
        history = self.history
        for step, (task, balance, entropy, norm, *experts), (lr, seconds) in zip(
            range(first, self.step + 1), rows, self._pending_rates, strict=True
        ):
            if not math.isfinite(task):
                raise RuntimeError(f"the loss is {task} at step {step}: try a smaller --lr than {self.settings.lr}")
            history.step.append(step)
            history.seconds.append(seconds)
            history.bits.append(task / math.log(2))
            history.balance.append(balance)
            history.entropy.append(entropy)
            history.gradient_norm.append(norm)
            history.lr.append(lr)
            history.experts.append(experts)
        self._pending.clear()
        self._pending_rates.clear()


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run.

    Raises
    ------
    ValueError
        If there is none, or another version of this example wrote it.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"--resume needs a checkpoint, found none at {path}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} must have format {CHECKPOINT_FORMAT}, got {state.get('format')!r}")
    return state


def schedule(progress: float, warmup: float) -> float:
    """Return the learning rate as a fraction of the highest: a linear rise, then half a cosine."""
    if progress < warmup:
        # Not 0 at the start: the first step is a step.
        return max(progress / warmup, 0.02)
    angle = math.pi * (progress - warmup) / (1 - warmup)
    return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(angle)) / 2


def make_optimizer(model: ByteLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    named = dict(model.named_parameters())
    decayed = [value for name, value in named.items() if value.dim() >= 2 and not name.startswith("embedding")]
    others = [value for value in named.values() if not any(value is each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def choose_device(name: str) -> torch.device:
    """Turn the option into a device.

    Raises
    ------
    ValueError
        If torch does not have it, or this build has no kernels for it.
    """
    cuda = torch.cuda.is_available() and bool(_C.cuda_architectures())
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not cuda:
        reason = "this build has no CUDA kernels" if torch.cuda.is_available() else "torch sees no CUDA device"
        raise ValueError(f"--device must be cpu, since {reason}, got {name!r}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the option into the dtype of matrix products."""
    if name == "auto":
        fast = device.type == "cuda" or _C.cpu_isa() in ("avx512_bf16", "amx")
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
