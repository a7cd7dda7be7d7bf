# SPDX-License-Identifier: Apache-2.0
"""What a run can be told: one dataclass, which is also the command line and the part of a checkpoint that says so."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ROUTERS = ("top_p", "top_k", "dense")
DTYPES = ("auto", "float32", "bfloat16")
METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(group: str, default: Any, text: str, **extra: Any) -> Any:
    """Make a dataclass field that is also a command-line option, under this heading and with this help text."""
    return field(default=default, metadata={"group": group, "help": text, **extra})


_run = functools.partial(option, "run")
_model = functools.partial(option, "model", fixed=True)
_training = functools.partial(option, "training", fixed=True)
_watching = functools.partial(option, "watching")


@dataclass(frozen=True)
class Settings:
    """A run. Every field is an option of the command line; ``fixed`` ones cannot change when a run is resumed."""

    name: str = _run("", "name of the run, a folder in --runs-dir (default: the router and the time)")
    runs_dir: str = _run("runs", "folder that holds the runs")
    resume: bool = _run(False, "continue the run --name from its checkpoint; other options default to what it had")
    data: str = _run("", "file or folder to learn (default: the source of the Python standard library)", fixed=True)
    minutes: float = _run(0.0, "time to train for, in all (default: 4, or no limit where --steps is given)")
    steps: int = _run(0, "optimizer steps to train for, in all (default: no limit)")
    seed: int = _run(0, "of weights, batches and the sample", fixed=True)
    device: str = _run("auto", "torch device; auto: cuda if torch and this build have it, else cpu")
    dtype: str = _run("auto", "of matrix products; auto: bfloat16 where it is fast, else float32", choices=DTYPES)
    compile: bool = _run(False, "run the model through torch.compile")

    router: str = _model(
        "top_p", "how experts are chosen; dense: one SwiGLU as wide as --top-k experts", choices=ROUTERS
    )
    top_p: float = _model(0.4, "probability that a token's experts must hold (router top_p)")
    top_k: int = _model(2, "experts per token (router top_k)")
    num_experts: int = _model(16, "experts per layer")
    hidden_size: int = _model(256, "width of the model")
    intermediate_size: int = _model(128, "width of one expert")
    num_layers: int = _model(4, "transformer blocks")
    num_heads: int = _model(4, "attention heads")
    context: int = _model(128, "bytes that the model sees at once")

    batch_size: int = _training(4, "sequences per step")
    lr: float = _training(3e-3, "highest learning rate")
    warmup: float = _training(0.05, "fraction of the run in which the learning rate rises")
    weight_decay: float = _training(0.1, "of matrices")
    grad_clip: float = _training(1.0, "largest norm of the gradient")
    balance: float = _training(1e-2, "weight of the load-balancing loss")
    dynamic: float = _training(1e-4, "weight of the dynamic loss, the router's entropy")
    router_z: float = _training(1e-3, "weight of the router z-loss")

    eval_interval: int = _watching(200, "steps between evaluations; a checkpoint is written at each")
    eval_sequences: int = _watching(64, "validation sequences per evaluation; 4 times as many at the end")
    log_interval: int = _watching(10, "steps between TensorBoard points")
    prompt: str = _watching("def ", "start of the sample")
    sample_bytes: int = _watching(600, "length of the sample")
    temperature: float = _watching(0.7, "of the sample; 0 takes the likeliest byte")

    def __post_init__(self) -> None:
        """Check every value."""
        at_least = {"steps": 0, "top_k": 1, "num_experts": 1, "intermediate_size": 1, "num_layers": 1, "num_heads": 1,
                    "context": 8, "batch_size": 1, "eval_interval": 1, "eval_sequences": 1, "log_interval": 1,
                    "sample_bytes": 0, "seed": 0}  # fmt: skip
        for name, bound in at_least.items():
            _check(name, getattr(self, name) >= bound, f"at least {bound}", self)
        for name in ("minutes", "weight_decay", "balance", "dynamic", "router_z", "temperature"):
            _check(name, 0 <= getattr(self, name) < math.inf, "finite and at least 0", self)
        for name in ("lr", "grad_clip"):
            _check(name, 0 < getattr(self, name) < math.inf, "finite and above 0", self)
        _check("top_p", 0 < self.top_p <= 1, "in (0, 1]", self)
        _check("top_k", self.top_k <= self.num_experts, f"at most --num-experts {self.num_experts}", self)
        _check("warmup", 0 <= self.warmup < 1, "in [0, 1)", self)
        _check("router", self.router in ROUTERS, f"one of {', '.join(ROUTERS)}", self)
        _check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}", self)
        heads = 2 * self.num_heads
        _check("hidden_size", self.hidden_size % heads == 0, f"a multiple of 2 * --num-heads = {heads}", self)
        _check("prompt", self.prompt != "", "at least one character", self)
        _check("name", "/" not in self.name and self.name not in (".", ".."), "a plain folder name", self)

    @property
    def dense_intermediate_size(self) -> int:
        """Width of the feed-forward layers of a dense model: as many parameters as ``top_k`` experts."""
        return self.top_k * self.intermediate_size


def _check(name: str, holds: bool, expected: str, settings: Settings) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(settings, name)!r}")


def parse(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the options that the command line names, and only those; see `complete`."""
    parser = argparse.ArgumentParser(
        prog="train_lm.py",
        description="Train a byte-level language model with dynamic routing on text, watch it, and get a report.",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for each in dataclasses.fields(Settings):
        heading = each.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        flag, text = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        if isinstance(each.default, bool):
            groups[heading].add_argument(flag, action="store_true", help=text)
            continue
        if "(default" not in text:
            text += f" (default: {each.default})"
        choices = each.metadata.get("choices")
        metavar = None if choices else METAVARS[type(each.default)]
        groups[heading].add_argument(flag, type=type(each.default), choices=choices, metavar=metavar, help=text)
    return vars(parser.parse_args(arguments))


def complete(given: dict[str, Any], saved: dict[str, Any] | None = None) -> Settings:
    """Make the settings of a run.

    Parameters
    ----------
    given : dict
        The options that the user named.
    saved : dict, optional
        The settings in the checkpoint of the run that is resumed; what the user did not name comes from there.

    Raises
    ------
    ValueError
        If a value is out of bounds, or a resumed run is asked to change what it cannot change.
    """
    if saved is not None:
        for each in dataclasses.fields(Settings):
            if each.metadata.get("fixed") and given.get(each.name, saved[each.name]) != saved[each.name]:
                flag = each.name.replace("_", "-")
                raise ValueError(
                    f"--{flag} must be {saved[each.name]!r} as in the run that is resumed, got {given[each.name]!r}"
                )
    values = (saved or {}) | given
    if not values.get("minutes") and not values.get("steps"):
        values["minutes"] = 4.0
    if not values.get("name"):
        if values.get("resume"):
            raise ValueError("--resume needs --name, the run to continue")
        values["name"] = f"{values.get('router', 'top_p')}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Settings(**values)
