# SPDX-License-Identifier: Apache-2.0
"""experts_implementation="dynamic_moe": the same as transformers' eager experts, for every family."""

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytest.importorskip("transformers")

from documents import ROOT
from hf_models import FAMILIES, K, make, tokens
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from dynamic_moe import ops
from dynamic_moe.integrations import experts
from dynamic_moe.integrations._requirements import NEWEST_TRANSFORMERS, warn_if_untested

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


def test_routing_weights_of_another_shape_are_refused() -> None:
    module = experts_of(make("mixtral"))
    with pytest.raises(ValueError, match=r"top_k_weights must have shape \[2, 1\].*\[2, 8\].*got \[2, 3\]"):
        experts.experts_forward(module, torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 3))


class Quantized(Tensor):
    """Stands for a tensor of torchao: it says that it is bfloat16, and holds something else."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Any:
        result = Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)
        result.data_int8 = data
        return result

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_int8"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Any:
        return cls(inner["data_int8"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_int8)
        raise NotImplementedError(f"{func} on a quantized tensor")


SHAPE = (8, 32, 24)
DOWN = r"MixtralExperts\.down_proj must be"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (None, f"{DOWN} one tensor for all experts.*got NoneType"),
        (torch.zeros(SHAPE, dtype=torch.int8), f"{DOWN} float32.*got int8: load the model without quantization"),
        (torch.zeros(SHAPE, dtype=torch.float8_e4m3fn), f"{DOWN} float32.*got float8_e4m3fn"),
        (torch.zeros(SHAPE[0] * SHAPE[1] * SHAPE[2] // 2, 1, dtype=torch.uint8), f"{DOWN} one tensor for all"),
        (
            Quantized(torch.zeros(SHAPE, dtype=torch.int8)),
            rf"{DOWN} a plain tensor.*got Quantized \(quantized or sharded",
        ),
        (torch.zeros(SHAPE).to_sparse(), rf"{DOWN} a dense tensor.*got layout torch\.sparse_coo"),
        (torch.zeros(SHAPE, device="meta"), f"{DOWN} on cpu.*got the meta device, where it has no data: load it"),
    ],
    ids=["missing", "int8", "float8", "packed", "subclass", "sparse", "offloaded"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_weights_that_are_no_plain_tensors_are_refused_by_name(weight: Any, message: str, compiled: bool) -> None:
    module = experts_of(make("mixtral", torch.float32))
    module.config._experts_implementation = "dynamic_moe"
    module.down_proj = weight if weight is None else nn.Parameter(weight, requires_grad=False)
    run = torch.compile(module, backend="eager") if compiled else module
    with pytest.raises(ValueError, match=message):
        run(torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


@pytest.mark.level_independent
def test_sharded_weights_are_refused_by_name() -> None:
    module = experts_of(make("mixtral", torch.float32))
    with single_process_mesh() as mesh:
        module.down_proj = nn.Parameter(distribute_tensor(module.down_proj.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=rf"{DOWN} a plain tensor.*got DTensor .*without tensor parallelism"):
            experts.experts_forward(module, torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


@contextlib.contextmanager
def single_process_mesh() -> Iterator[DeviceMesh]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.level_independent
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_on_the_experts_train_as_with_eager_experts(family: str, compiled: bool) -> None:
    ids, results = tokens(), []
    for implementation in ("eager", "dynamic_moe"):
        model = make(family, torch.float32)
        model.set_experts_implementation(implementation)
        torch.manual_seed(1)
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        adapted = get_peft_model(model, LoraConfig(r=4, target_parameters=parameters, init_lora_weights=False))
        uses_ours = implementation == "dynamic_moe"
        # PEFT swaps the weights in and out within the graph, so that there is more than one.
        run = torch.compile(adapted, backend="aot_eager") if compiled and uses_ours else adapted
        output = run(ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), gradients))
    (expected, wanted), (actual, got) = results
    assert_close(actual, expected, 1e-4)
    assert len(wanted) == 8
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, 1e-3)


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


@pytest.mark.level_independent
def test_a_transformers_newer_than_the_tested_one_warns_once() -> None:
    code = "\n".join(
        [
            "import transformers, warnings",
            "transformers.__version__ = '5.99.0.dev0'",
            "with warnings.catch_warnings(record=True) as caught:",
            "    warnings.simplefilter('always')",
            "    import dynamic_moe.models, dynamic_moe.integrations",
            "print(*[each.message for each in caught if 'dynamic_moe was tested' in str(each.message)], sep='\\n')",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("dynamic_moe was tested with transformers up to 5.24; 5.99.0.dev0 may have changed") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("5.24.7")


@pytest.mark.level_independent
def test_the_upper_bound_is_the_newest_version_that_is_tested() -> None:
    major, minor = NEWEST_TRANSFORMERS
    assert f',<{major}.{minor + 1}"' in (ROOT / "pyproject.toml").read_text()
    assert f"transformers=={major}.{minor}." in (ROOT / "requirements" / "transformers-newest.txt").read_text()
