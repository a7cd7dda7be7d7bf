# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for ragged problems. Hypothesis draws shapes, loads and layouts; a seed makes the values."""

from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Below, at and around the widths of vectors, register tiles and panels.
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 65]

LOADS = ["any", "top", "sparse", "one expert", "nothing"]

LAYOUTS = ["contiguous", "transposed", "every other", "offset"]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in memory of another layout."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other":
        wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "offset":  # contiguous, but aligned to nothing but the element
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor


@dataclass
class RaggedProblem:
    """Tokens, their experts and the weights of both, in the layout drawn."""

    seed: int
    tokens: int  # T
    experts: int  # E
    slots: int  # K
    hidden: int  # H
    intermediate: int  # I
    dtype: torch.dtype
    load: str
    layout: str

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.x = self.random(self.tokens, self.hidden)
        self.gate_up_proj = self.random(self.experts, 2 * self.intermediate, self.hidden, scale=self.hidden**-0.5)
        self.down_proj = self.random(self.experts, self.hidden, self.intermediate, scale=2 * self.intermediate**-0.5)
        self.expert_ids = self.draw_experts()
        self.expert_weights = self.random(self.tokens, self.slots, dtype=self.accumulator)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal values, rounded to the dtype."""
        values = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return laid_out(values.to(dtype or self.dtype), self.layout)

    def draw_experts(self) -> Tensor:
        """Draw expert_ids [T, K]: E marks an unused slot; an expert may come twice in a token."""
        shape = (self.tokens, self.slots)
        ids = torch.randint(0, self.experts + 1, shape, generator=self.generator)
        if self.load == "top":
            order = torch.rand(self.tokens, max(self.experts, self.slots), generator=self.generator).argsort(dim=1)
            ids = order[:, : self.slots]
        elif self.load == "sparse":
            ids = ids.where(torch.rand(shape, generator=self.generator) < 0.2, self.experts)
        elif self.load == "one expert":
            ids = torch.full(shape, self.experts - 1)
        elif self.load == "nothing":
            ids = torch.full(shape, self.experts)
        return laid_out(ids.to(torch.int32), self.layout)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, both projections and the weights of the experts as leaves that ask for a gradient."""
        tensors = (self.x, self.gate_up_proj, self.down_proj, self.expert_weights)
        x, gate_up_proj, down_proj, expert_weights = (t.detach().requires_grad_() for t in tensors)
        return x, gate_up_proj, down_proj, expert_weights

    def __repr__(self) -> str:
        return f"RaggedProblem({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


def ragged_problems(max_tokens: int = 24, dtypes: list[torch.dtype] = DTYPES) -> st.SearchStrategy[RaggedProblem]:
    """Draw ragged problems, the smallest first when one fails."""

    def sized(experts: int) -> st.SearchStrategy[RaggedProblem]:
        return st.builds(
            RaggedProblem,
            seed=st.integers(0, 2**16),
            tokens=st.integers(0, max_tokens),
            experts=st.just(experts),
            slots=st.integers(1, experts),
            hidden=st.sampled_from(SIZES),
            intermediate=st.sampled_from(SIZES),
            dtype=st.sampled_from(dtypes),
            load=st.sampled_from(LOADS),
            layout=st.sampled_from(LAYOUTS),
        )

    return st.integers(1, 6).flatmap(sized)


@dataclass
class GatingProblem:
    """Logits and the options of both rules."""

    seed: int
    tokens: int
    experts: int
    dtype: torch.dtype
    values: str
    p: float
    max_experts: int
    threshold_rule: str
    renormalize: bool
    temperature: float
    masked: bool
    layout: str

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (self.tokens, self.experts)
        logits = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.values == "ties":  # few values, so that many experts tie; all are exact in every dtype
            logits = torch.randint(-2, 3, shape, generator=self.generator).double() / 2
        elif self.values == "sharp":
            logits = 30 * logits
        elif self.values == "disabled":
            logits = logits.where(torch.rand(shape, generator=self.generator) < 0.6, -torch.inf)
            if self.experts:
                logits[:, 0] = logits[:, 0].clamp(min=-3.0)
        self.logits = laid_out(logits.to(self.dtype), self.layout)
        self.token_mask = torch.rand(self.tokens, generator=self.generator) < 0.7 if self.masked else None

    @property
    def shared(self) -> dict[str, object]:
        return {"renormalize": self.renormalize, "temperature": self.temperature, "token_mask": self.token_mask}

    @property
    def top_p(self) -> dict[str, object]:
        return {"p": self.p, "max_experts": self.max_experts, "threshold_rule": self.threshold_rule, **self.shared}

    @property
    def top_k(self) -> dict[str, object]:
        return {"k": self.max_experts, **self.shared}


def gating_problems(max_tokens: int = 40, dtypes: list[torch.dtype] = DTYPES) -> st.SearchStrategy[GatingProblem]:
    """Draw gating problems."""

    def sized(experts: int) -> st.SearchStrategy[GatingProblem]:
        return st.builds(
            GatingProblem,
            seed=st.integers(0, 2**16),
            tokens=st.integers(0, max_tokens),
            experts=st.just(experts),
            dtype=st.sampled_from(dtypes),
            values=st.sampled_from(["normal", "ties", "sharp", "disabled"]),
            p=st.sampled_from([1e-6, 0.1, 0.4, 0.6, 0.9, 0.999, 1.0]),
            max_experts=st.integers(1, experts),
            threshold_rule=st.sampled_from(["paper", "released"]),
            renormalize=st.booleans(),
            temperature=st.sampled_from([1.0, 0.5, 3.0]),
            masked=st.booleans(),
            layout=st.sampled_from(LAYOUTS),
        )

    return st.sampled_from([1, 2, 3, 7, 8, 16, 17, 33, 64, 130]).flatmap(sized)
