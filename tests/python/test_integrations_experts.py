# SPDX-License-Identifier: Apache-2.0
"""experts_implementation="dynamic_moe": the same as transformers' eager experts, for every family."""

import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from hf_models import FAMILIES, K, make, tokens
from transformers import PreTrainedModel

from dynamic_moe import ops
from dynamic_moe.integrations import experts

# Norms and routers compute in float32 whatever the model's dtype: both sides alike, but for what float64 then rounds.
CLOSE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 8e-2}


def logits_of(model: PreTrainedModel, ids: Tensor, implementation: str) -> Tensor:
    model.set_experts_implementation(implementation)
    logits: Tensor = model(ids).logits
    return logits


def experts_of(model: PreTrainedModel) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(".experts"))


def assert_close(actual: Tensor, exact: Tensor, relative: float) -> None:
    bound = relative * (exact.double().abs() + exact.double().square().mean().sqrt())
    assert bool(((actual.double() - exact.double()).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager(family: str, dtype: torch.dtype) -> None:
    model, ids = make(family, dtype), tokens()
    with torch.no_grad():
        expected = logits_of(model, ids, "eager")
        with mock.patch.object(experts, "ops", wraps=ops) as used:
            actual = logits_of(model, ids, "dynamic_moe")
    assert actual.dtype == dtype
    assert_close(actual, expected, CLOSE[dtype])
    # gpt-oss has biases, transposed weights and a gate of its own; all others are plain SwiGLU.
    assert used.expert_mlp.call_count == (0 if family == "gpt_oss" else 2)
    assert used.grouped_matmul.call_count == (4 if family == "gpt_oss" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager(family: str) -> None:
    model, ids = make(family), tokens()
    gradients = []
    for implementation in ("eager", "dynamic_moe"):
        model.zero_grad()
        logits_of(model, ids, implementation).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert set(actual) == set(expected)
    assert any("experts" in name for name in actual)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-6)


@pytest.mark.level_independent
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_it_compiles_into_one_graph(family: str) -> None:
    model = make(family, torch.float32)
    model.set_experts_implementation("dynamic_moe")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        ids = tokens(length=length)
        assert_close(compiled(ids).logits, model(ids).logits, 1e-5)
    compiled(ids).logits.square().mean().backward()
    assert experts_of(model).down_proj.grad.abs().sum() > 0


@pytest.mark.level_independent
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_eager(family: str) -> None:
    model, ids = make(family), tokens()
    texts = []
    for implementation in ("eager", "dynamic_moe"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False))
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_unused_slots_and_experts_of_other_ranks_add_nothing(family: str) -> None:
    module = experts_of(make(family))
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(8)[:K] for _ in range(7)])
    weights = torch.rand(7, K, dtype=torch.float64, requires_grad=True)
    unused = torch.rand(7, K) < 0.4
    unused[0], unused[1] = True, False
    expected = torch.zeros_like(x)
    for slot in range(K):  # one slot at a time, tokens that use it alone
        used = ~unused[:, slot]
        part = experts.experts_forward(module, x[used], ids[used, slot : slot + 1], weights[used, slot : slot + 1])
        expected = expected.index_add(0, used.nonzero()[:, 0], part)
    sentinels = ids.masked_fill(unused, module.num_experts)
    for is_expert_parallel in (False, True):
        module._is_expert_parallel = is_expert_parallel
        actual = experts.experts_forward(module, x, sentinels, weights)
        assert_close(actual, expected, 1e-12)
        assert actual[0].abs().sum() == 0
    gradient = torch.autograd.grad(actual.square().sum(), weights)[0]
    assert bool((gradient[unused] == 0).all())
    assert bool((gradient[~unused] != 0).all())


def test_a_weight_for_every_expert_may_be_given() -> None:
    module = experts_of(make("mixtral"))
    x, ids, weights_TE = torch.randn(5, 32).double(), torch.tensor([[1, 4, 8]] * 5), torch.rand(5, 8).double()
    weights_TK = torch.cat([weights_TE[:, [1, 4]], torch.zeros(5, 1)], dim=1)
    every = experts.experts_forward(module, x, ids, weights_TE)
    assert torch.equal(every, experts.experts_forward(module, x, ids, weights_TK))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations_than_silu_are_those_of_eager(activation: str) -> None:
    model, ids = make("mixtral", hidden_act=activation), tokens()
    assert_close(logits_of(model, ids, "dynamic_moe"), logits_of(model, ids, "eager"), 1e-7)


def test_a_norm_behind_the_experts_and_experts_without_a_gate() -> None:
    module = experts_of(make("mixtral"))
    module.post_expert_norm, module.has_post_expert_norm = nn.LayerNorm(32, dtype=torch.float64), True
    x, ids, weights = torch.randn(4, 32).double(), torch.tensor([[0, 3]] * 4), torch.rand(4, 2).double()
    up = [torch.nn.functional.linear(x, module.gate_up_proj[e]) for e in (0, 3)]

    def combined(hidden: list[Tensor]) -> Tensor:
        outs = [module.post_expert_norm(h @ module.down_proj[e].T) for h, e in zip(hidden, (0, 3), strict=True)]
        return weights[:, :1] * outs[0] + weights[:, 1:] * outs[1]

    expected = combined([module._apply_gate(h) for h in up])
    assert_close(experts.experts_forward(module, x, ids, weights), expected, 1e-12)
    module.has_gate, module.up_proj = False, module.gate_up_proj[:, :24]
    expected = combined([torch.nn.functional.silu(h[:, :24]) for h in up])
    assert_close(experts.experts_forward(module, x, ids, weights), expected, 1e-12)


def test_under_autocast_the_output_keeps_the_dtype_of_the_input() -> None:
    model, ids = make("mixtral", torch.float32), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = logits_of(model, ids, "dynamic_moe"), logits_of(model, ids, "eager")
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, 8e-2)


def test_weights_that_cannot_be_used_are_refused_by_name() -> None:
    module = experts_of(make("mixtral"))
    call = (torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"top_k_weights must have shape \[2, 1\].*\[2, 8\].*got \[2, 3\]"):
        experts.experts_forward(module, *call[:2], torch.ones(2, 3))
    module.down_proj = nn.Parameter(torch.zeros(8, 32, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"MixtralExperts\.down_proj must be float32.*got int8"):
        experts.experts_forward(module, *call)
    module.down_proj = None
    with pytest.raises(ValueError, match=r"MixtralExperts\.down_proj must be one tensor"):
        experts.experts_forward(module, *call)


@pytest.mark.level_independent
def test_the_package_alone_does_not_import_transformers() -> None:
    code = "import dynamic_moe, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.level_independent
def test_without_transformers_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import dynamic_moe.integrations"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "dynamic_moe.integrations needs transformers, which cannot be imported: pip install transformers" in (
        result.stderr
    )
