# SPDX-License-Identifier: Apache-2.0
"""The comparison: which models are trained, how large, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byte_lm.settings import Settings

PAPER_P = 0.4
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes
    ----------
    name : str
        In names of runs.
    label : str
        In tables and plots.
    changes : dict
        What it changes in the `Settings` of all.
    """

    name: str
    label: str
    changes: dict[str, Any]


DENSE = Variant("dense", "dense", {"router": "dense", "top_k": 2})
TOP_1 = Variant("top-1", "top-1", {"router": "top_k", "top_k": 1})
TOP_2 = Variant("top-2", "top-2", {"router": "top_k", "top_k": 2})
DYNAMIC = Variant("dynamic", "dynamic", {"router": "top_p", "top_p": PAPER_P})
WITHOUT_LOSS = Variant(
    "without-dynamic-loss", "dynamic, without dynamic loss", {"router": "top_p", "top_p": PAPER_P, "dynamic": 0.0}
)
VARIANTS = (DENSE, TOP_1, TOP_2, DYNAMIC, WITHOUT_LOSS)

# The coefficients of the losses are the paper's, which has no z-loss. The rest is a size that an idle core trains in
# a minute or two.
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 2,
    "num_experts": 16,
    "context": 64,
    "batch_size": 8,
    "steps": 1000,
    "lr": 3e-3,
    "balance": 1e-2,
    "dynamic": 1e-4,
    "router_z": 0.0,
    "eval_interval": 100,
    "eval_sequences": 64,
    "device": "cpu",
    "dtype": "float32",
}


@dataclass(frozen=True)
class Run:
    """One training run: a variant, its threshold if it has one, and a seed."""

    variant: Variant
    seed: int
    top_p: float | None = None

    @property
    def name(self) -> str:
        """Of its folder and of its results."""
        threshold = "" if self.top_p in (None, PAPER_P) else f"-p{self.top_p:g}"
        return f"{self.variant.name}{threshold}-seed{self.seed}"

    def settings(self, base: dict[str, Any], runs_dir: str) -> Settings:
        """Return what the trainer is told."""
        threshold = {} if self.top_p is None else {"top_p": self.top_p}
        values = base | self.variant.changes | threshold
        return Settings(**values, seed=self.seed, name=self.name, runs_dir=runs_dir)


def plan(seeds: Sequence[int] = SEEDS, sweep: Sequence[float] = SWEEP) -> list[Run]:
    """List the runs: seed after seed, so that an unfinished comparison is fair, and the sweep of the first one last."""
    runs = [Run(variant, seed, variant.changes.get("top_p")) for seed in seeds for variant in VARIANTS]
    return runs + [Run(DYNAMIC, seeds[0], p) for p in sweep if p != PAPER_P]
