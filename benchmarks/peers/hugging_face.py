# SPDX-License-Identifier: Apache-2.0
"""The experts of Hugging Face Transformers 5, through its experts interface."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

from torch import Tensor, nn

from benchmarks.peers.base import Peer, Step, is_padded, step_of
from benchmarks.problem import Problem


class _HuggingFace(Peer):
    trains = True
    implementation: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """Whether transformers has the experts interface."""
        if importlib.util.find_spec("transformers") is None:
            return "not installed: pip install transformers"
        if importlib.util.find_spec("transformers.integrations.moe") is None:
            return "this transformers has no experts interface: version 5 or newer is needed"
        return None

    def prepare(self, problem: Problem) -> Step:
        """Build the experts of Mixtral, whose weights lie as ours do, around the problem's weights."""
        experts = _mixtral_experts(problem, self.implementation)
        pairs = self.implementation == "grouped_mm" and is_padded(problem)

        def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            experts.gate_up_proj, experts.down_proj = gate_up, down
            y: Tensor = experts(x, ids.long(), weights.to(x.dtype))
            return y

        return step_of(expert_pass, problem, pairs=pairs)


class HuggingFaceEager(_HuggingFace):
    """``experts_implementation="eager"``: a Python loop over the experts that are hit."""

    name = "Hugging Face eager"
    implementation = "eager"


class HuggingFaceGroupedMm(_HuggingFace):
    """``experts_implementation="grouped_mm"``, the default of Transformers 5."""

    name = "Hugging Face grouped_mm"
    implementation = "grouped_mm"


def _mixtral_experts(problem: Problem, implementation: str) -> Any:
    import torch
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=problem.shape.hidden_size,
        intermediate_size=problem.shape.intermediate_size,
        num_local_experts=problem.shape.num_experts,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: nn.Module = MixtralExperts(config)
    # Plain attributes instead of parameters, so that a step can put its own tensors there.
    for name in ("gate_up_proj", "down_proj"):
        delattr(experts, name)
        setattr(experts, name, getattr(problem, name))
    return experts
