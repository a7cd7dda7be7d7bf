# SPDX-License-Identifier: Apache-2.0
"""set_top_p, and the p that calibrate_top_p finds."""

import ast
import copy
import functools
import gc
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

pytest.importorskip("transformers")

import transformers
from hf_models import COMMON, EXPERTS, FAMILIES, K, make, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    Qwen3VLMoeForConditionalGeneration,
    TrainerControl,
    TrainerState,
)

from dynamic_moe import DynamicMoE
from dynamic_moe.integrations import (
    Calibration,
    RoutingStatisticsCallback,
    TradeOff,
    calibrate_top_p,
    evaluate_top_p,
    set_top_p,
    top_p_trade_off,
    unset_top_p,
)
from dynamic_moe.integrations.routers import CONVENTIONS, find_routers
from dynamic_moe.models import DynamicMoEConfig, DynamicMoEForCausalLM, save_released

pytestmark = pytest.mark.level_independent


def first_router(model: nn.Module) -> Any:
    return next(iter(find_routers(model).values()))


def routed(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = first_router(model)(x)
    return result


def states(count: int = 50) -> Tensor:
    return torch.randn(count, 32, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_p_of_one_is_the_model_as_it_was(family: str) -> None:
    model, ids = make(family), tokens()
    expected = model(ids).logits
    with set_top_p(model, 1.0):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_p_selects_the_best_expert_alone(family: str) -> None:
    model, x = make(family), states()
    _, weights, ids = routed(model, x)
    best = ids.gather(1, weights.argmax(-1, keepdim=True))[:, 0]
    total = weights.sum(-1)
    with set_top_p(model, 1e-6):
        _, weights, ids = routed(model, x)
    assert torch.equal(ids[:, 0], best)
    assert bool((ids[:, 1:] == EXPERTS).all())
    assert bool((weights[:, 1:] == 0).all())
    if family != "olmoe":  # renormalized: the sum is what it was, scaling factor included
        torch.testing.assert_close(weights.sum(-1).double(), total.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_p_is_a_share_of_the_probability_over_all_experts(family: str) -> None:
    model, x = make(family), states()
    router = first_router(model)
    p = 0.6
    with set_top_p(model, p, max_experts=EXPERTS):
        logits, weights, ids = router(x)
    probabilities, order = (logits.softmax(-1)).sort(-1, descending=True)
    for t in range(len(x)):
        count = next(k for k in range(1, EXPERTS + 1) if probabilities[t, :k].sum() >= p)
        assert ids[t].tolist() == [*order[t, :count].tolist(), *[EXPERTS] * (EXPERTS - count)]
        expected = probabilities[t, :count]
        if family != "olmoe":
            expected = expected / expected.sum()
        torch.testing.assert_close(weights[t, :count], expected, rtol=1e-9, atol=0)
    assert len({(row < EXPERTS).sum().item() for row in ids}) > 1


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_where_scores_are_sigmoids_p_is_a_share_of_what_the_router_selects(norm_topk_prob: bool) -> None:
    model, x = make("deepseek_v3", norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5), states()
    router = first_router(model)
    _, weights, ids = router(x)
    with set_top_p(model, 0.7):
        _, short_weights, short_ids = router(x)
    counts = set()
    for t in range(len(x)):
        shares, order = (weights[t] / weights[t].sum()).sort(descending=True)
        count = next(k for k in range(1, K + 1) if shares[:k].sum() >= 0.7)
        assert short_ids[t].tolist() == [*ids[t][order[:count]].tolist(), *[EXPERTS] * (K - count)]
        expected = weights[t][order[:count]]
        if norm_topk_prob:
            expected = expected * (2.5 / expected.sum())
        torch.testing.assert_close(short_weights[t, :count], expected, rtol=1e-5, atol=0)
        counts.add(count)
    assert len(counts) > 1


def test_each_layer_may_have_a_p_of_its_own() -> None:
    model, ids = make("mixtral"), tokens()
    measured = evaluate_top_p(model, [ids], [1e-6, 1.0])
    assert list(measured.experts_per_token.values()) == [1.0, float(K)]


@pytest.mark.parametrize("family", FAMILIES)
def test_unset_restores_the_model(family: str) -> None:
    model, ids = make(family, torch.float32), tokens()
    model.set_experts_implementation("grouped_mm")
    expected, before = model(ids).logits, {k: set(m.__dict__) for k, m in model.named_modules()}
    set_top_p(model, 0.3)
    set_top_p(model, 0.2)
    assert model.get_experts_implementation()[""] == "dynamic_moe"
    assert not torch.equal(model(ids).logits, expected)
    unset_top_p(model)
    unset_top_p(model)  # nothing to undo: nothing happens
    assert torch.equal(model(ids).logits, expected)
    assert model.get_experts_implementation()[""] == "grouped_mm"
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == before


def test_blocks_may_be_nested() -> None:
    model, ids = make("mixtral"), tokens()
    plain = model(ids).logits
    set_top_p(model, 0.5)
    outer = model(ids).logits
    with set_top_p(model, 0.1):
        assert not torch.equal(model(ids).logits, outer)
    assert torch.equal(model(ids).logits, outer)
    unset_top_p(model)
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-9, atol=1e-9)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    copied: PreTrainedModel = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_routers_of_its_own(copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model, ids = make("mixtral"), tokens()
    set_top_p(model, 0.1)
    other = copied(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other.config.dynamic_moe_top_p == model.config.dynamic_moe_top_p
    with torch.no_grad():
        first_router(other).weight.zero_()
    assert torch.equal(routed(other, states())[0], torch.zeros(50, EXPERTS).double())
    unset_top_p(other)
    assert routed(model, states())[2][:, 1:].unique().tolist() == [EXPERTS]
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_logits_are_still_put_out(family: str) -> None:
    model, ids = make(family), tokens()
    with set_top_p(model, 0.3):
        output = model(ids, labels=ids, output_router_logits=True)
    assert [list(logits.shape) for logits in output.router_logits] == [[18, EXPERTS]] * 2
    assert output.aux_loss.isfinite()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_implementations_of_the_experts_compute_the_same(family: str, implementation: str) -> None:
    model, ids = make(family, torch.float32), tokens()
    model.set_experts_implementation(implementation)
    with torch.no_grad(), set_top_p(model, 0.4):
        expected = model(ids).logits
    with torch.no_grad(), set_top_p(model, 0.4, experts_implementation=None):
        assert model.get_experts_implementation()[""] == implementation
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        callback = RoutingStatisticsCallback()
        callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model.train())
        model(ids)
        callback.on_log(None, TrainerState(), TrainerControl(), logs=(logs := {"loss": 0.0}))
    assert 1 < logs["routing/experts_per_token"] < K  # unused slots do not count


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def composite() -> PreTrainedModel:
    """A vision and language model, whose configuration holds that of its language model."""
    text = dict(COMMON, **FAMILIES["qwen3_moe"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **special
    )
    return Qwen3VLMoeForConditionalGeneration(config).eval()


def own() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    return DynamicMoEForCausalLM(
        DynamicMoEConfig(**sizes, num_attention_heads=4, num_experts=4, expert_frequency=1, initializer_range=0.3)
    ).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{family: functools.partial(make, family, torch.float32) for family in FAMILIES},
    "composite": composite,
    "own": own,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_saved_with_p_routes_by_it_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    model, ids = MODELS[name](), torch.randint(3, 60, (2, 9))
    plain = model(ids).logits
    set_top_p(model, [0.3, 0.6])
    expected = model(ids).logits
    assert not torch.equal(expected, plain)
    load = functools.partial(type(model).from_pretrained, attn_implementation=model.config._attn_implementation)
    loaded = load(saved(model, tmp_path / "a"))
    assert torch.equal(loaded(ids).logits, expected)
    again = load(saved(loaded, tmp_path / "b"))
    assert torch.equal(again(ids).logits, expected)
    unset_top_p(again)
    torch.testing.assert_close(again(ids).logits, plain, rtol=1e-4, atol=1e-4)
    text = (saved(again, tmp_path / "c") / "config.json").read_text()
    assert "dynamic_moe_top_p" not in text
    assert "experts_implementation" not in text


def test_the_configuration_holds_what_is_set_and_no_more(tmp_path: Path) -> None:
    model = make("mixtral", torch.float32)

    def entries() -> Any:
        return getattr(model.config, "dynamic_moe_top_p", None)

    with set_top_p(model, 0.5):
        assert entries()["layers.1.mlp.gate"] == {"p": 0.5, "max_experts": K}
        with set_top_p(model, [0.1, 0.2], max_experts=2):
            assert entries()["layers.1.mlp.gate"] == {"p": 0.2, "max_experts": 2}
        assert entries()["layers.1.mlp.gate"] == {"p": 0.5, "max_experts": K}
    assert entries() is None
    set_top_p(model, 0.5)
    model.config.dynamic_moe_top_p.pop("layers.1.mlp.gate")
    folder = saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"dynamic_moe_top_p must have an entry for each router.*none for layers\.1"):
        type(model).from_pretrained(folder)


def test_numbers_of_numpy_and_torch_are_saved(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    model = make("mixtral", torch.float32)
    for p in (numpy.float32(0.5), numpy.array([0.5, 0.5]), torch.tensor(0.5), torch.tensor([0.5, 0.5])):
        set_top_p(model, p, max_experts=numpy.int64(2))
        assert model.config.dynamic_moe_top_p["layers.1.mlp.gate"] == {"p": 0.5, "max_experts": 2}
        saved(model, tmp_path)


def test_a_configuration_that_two_models_share_is_warned_of() -> None:
    model = make("mixtral", torch.float32)
    other = type(model)(model.config)
    with pytest.warns(UserWarning, match="MixtralForCausalLM shares its configuration with another Mixtral"):
        set_top_p(model, 0.5)
    del other
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_top_p(model.model, 0.5)


def test_a_base_model_and_other_experts_are_loaded_with_p(tmp_path: Path) -> None:
    model, ids = make("mixtral", torch.float32), tokens()
    set_top_p(model.model, [0.3, 0.6])  # the part that has the routers
    expected, folder = model(ids).logits, saved(model, tmp_path)
    base = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    other = type(model).from_pretrained(folder, attn_implementation="eager", experts_implementation="grouped_mm")
    assert other.get_experts_implementation()[""] == "grouped_mm"
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_without_this_package_a_model_with_p_is_not_loaded(tmp_path: Path) -> None:
    model = make("mixtral", torch.float32)
    set_top_p(model, 0.5)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(saved(model, tmp_path))!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'experts_implementation="dynamic_moe"` is not supported' in result.stderr


def test_p_may_be_taken_from_the_configuration() -> None:
    model, ids = make("mixtral", torch.float32), tokens()
    with pytest.raises(ValueError, match=r"p must be given where config\.dynamic_moe_top_p is not set, got None"):
        set_top_p(model)
    with set_top_p(model, [0.3, 0.6]):
        expected, entries = model(ids).logits, dict(model.config.dynamic_moe_top_p)
    model.config.dynamic_moe_top_p = entries  # as in a model that was loaded before this package was imported
    with pytest.raises(ValueError, match="max_experts must be None where p is"):
        set_top_p(model, max_experts=2)
    set_top_p(model)
    assert torch.equal(model(ids).logits, expected)


def test_the_released_format_refuses_p(tmp_path: Path) -> None:
    model = own()
    with (
        set_top_p(model, 0.5),
        pytest.raises(ValueError, match="dynamic_moe_top_p must be None in the released format"),
    ):
        save_released(model, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "own"])
def test_another_p_compiles_nothing_anew(name: str) -> None:
    model, ids = MODELS[name]().requires_grad_(False), torch.randint(3, 60, (1, 4))
    torch.compiler.reset()  # all models share code of transformers, and what was compiled for others counts
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    values = torch.linspace(0.02, 1.0, 50).tolist()
    outputs = []
    for first, second in zip(values, reversed(values), strict=True):
        with set_top_p(model, [first, second]):
            outputs.append(compiled(ids).logits)
            torch.testing.assert_close(outputs[-1], model(ids).logits, rtol=1e-4, atol=1e-4)
        set_top_p(model, [second, first])
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[-1])


def test_it_generates_compiles_and_trains() -> None:
    model, ids = make("mixtral", torch.float32), tokens()
    with set_top_p(model, 0.5):
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape == (2, 13)
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-4)
        expected.square().mean().backward()
    assert first_router(model).weight.grad.abs().sum() > 0


def test_the_layers_of_this_package_have_their_p_set() -> None:
    model = nn.Sequential(DynamicMoE(16, 8, 4, top_p=0.4), DynamicMoE(16, 8, 4, top_p=0.6))
    with set_top_p(model, 0.9, max_experts=2):
        assert [(layer.router.p, layer.router.max_experts) for layer in model] == [(0.9, 2)] * 2
    assert [(layer.router.p, layer.router.max_experts) for layer in model] == [(0.4, None), (0.6, None)]
    set_top_p(model, [0.1, 0.2])
    set_top_p(model, [0.3, 0.4])
    unset_top_p(model)
    assert [(layer.router.p, layer.router.max_experts) for layer in model] == [(0.4, None), (0.6, None)]


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("mixtral", {"p": 0.0}, r"p must be in \(0, 1\], got 0\.0 for model\.layers\.0\.mlp\.gate"),
        ("mixtral", {"p": 1.5}, r"p must be in \(0, 1\], got 1\.5"),
        ("mixtral", {"p": "0.5"}, r"p must be a number in \(0, 1\], got '0.5' for model\.layers\.0\.mlp\.gate"),
        ("mixtral", {"p": 0.5, "max_experts": 1.0}, "max_experts must be an integer of at least 1, got 1.0"),
        ("mixtral", {"p": [0.5]}, "p must be one number or 2, one for each router, got 1"),
        ("mixtral", {"p": 0.5, "max_experts": 9}, r"max_experts must be in \[1, 8\] .*MixtralTopKRouter.*got 9"),
        ("deepseek_v3", {"p": 0.5, "max_experts": 4}, r"max_experts must be in \[1, 3\] .*DeepseekV3TopkRouter.*got 4"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(family: str, arguments: dict[str, Any], message: str) -> None:
    model, ids = make(family), tokens()
    expected = model(ids).logits
    with pytest.raises(ValueError, match=message):
        set_top_p(model, **arguments)
    assert torch.equal(model(ids).logits, expected)


def test_an_unknown_router_is_named() -> None:
    class StrangeRouter(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"Sequential has StrangeRouter; known: MixtralTopKRouter.*TopPRouter"):
        set_top_p(nn.Sequential(StrangeRouter(4, 4)), 0.5)


# Calibration.


def text(batches: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [tokens(4, 32) for _ in range(batches)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_meets_the_target(family: str) -> None:
    model, data = make(family, torch.float32), text()
    before = model(data[0]).logits
    found = calibrate_top_p(model, data, 1.7, tolerance=0.03)
    assert list(found.p) == list(find_routers(model))
    measured = evaluate_top_p(model, data, list(found.p.values()))
    assert measured == found
    for mean in found.experts_per_token.values():
        assert mean == pytest.approx(1.7, abs=0.03)
    assert torch.equal(model(data[0]).logits, before)


def test_the_mean_is_that_of_what_the_routers_select() -> None:
    model, data = make("mixtral"), text(1)
    counts: list[float] = []
    hook = first_router(model).register_forward_hook(
        lambda router, args, output: counts.append((output[2] < EXPERTS).sum(-1).double().mean().item())
    )
    measured = evaluate_top_p(model, data, 0.5)
    hook.remove()
    assert next(iter(measured.experts_per_token.values())) == pytest.approx(counts[0], rel=1e-12)
    with set_top_p(model, 0.5):
        assert measured.loss == pytest.approx(model(data[0], labels=data[0]).loss.item(), rel=1e-6)


def test_one_p_for_all_layers_meets_the_target_on_average() -> None:
    model, data = make("mixtral"), text()
    found = calibrate_top_p(model, data, 2.2, per_layer=False)
    assert len(set(found.p.values())) == 1
    assert found.mean_experts_per_token == pytest.approx(2.2, abs=0.02)


def test_each_layer_may_have_a_target_and_the_ends_are_reached() -> None:
    model = make("mixtral")
    found = calibrate_top_p(model, iter(text()), [1.0, float(K)])
    assert list(found.experts_per_token.values()) == [1.0, float(K)]


def test_more_experts_than_the_model_was_trained_with_can_be_the_target() -> None:
    found = calibrate_top_p(make("mixtral"), text(), 4.0, max_experts=EXPERTS, tolerance=0.03)
    assert found.mean_experts_per_token == pytest.approx(4.0, abs=0.03)


def test_padding_does_not_count() -> None:
    model, ids = make("mixtral"), text(1)[0]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros(4, 7, dtype=torch.int64)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(4, 7, dtype=torch.int64)], dim=1)
    plain = evaluate_top_p(model, [{"input_ids": ids, "attention_mask": mask}], 0.5)
    with_padding = evaluate_top_p(model, [{"input_ids": padded, "attention_mask": padded_mask}], 0.5)
    assert with_padding.experts_per_token == plain.experts_per_token
    assert with_padding.loss == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_experts": 0.5}, r"target_experts must be in \[1, 3\], got 0\.5"),
        ({"target_experts": 3.5}, r"target_experts must be in \[1, 3\], got 3\.5"),
        ({"target_experts": [2.0]}, "target_experts must be one number or 2"),
        ({"target_experts": [1.0, 2.0], "per_layer": False}, "one number where per_layer is False"),
        ({"target_experts": 2.0, "max_passes": 0}, "max_passes must be at least 1, got 0"),
        ({"target_experts": 2.0, "data": []}, "data must hold at least one token to predict"),
    ],
)
def test_wrong_targets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_top_p(make("mixtral"), **{"data": text(1), **arguments})


def test_the_trade_off_holds_both_rules_and_shows_them(tmp_path: Path) -> None:
    trade_off = top_p_trade_off(make("mixtral"), text(1), targets=[2.0, 1.5])
    assert [point.mean_experts_per_token for point in trade_off.top_k] == [1.0, 2.0, 3.0]
    means = [point.mean_experts_per_token for point in trade_off.top_p]
    assert means == pytest.approx([1.5, 2.0], abs=0.05)
    rows = trade_off.table().splitlines()
    assert len(rows) == 2 + 3 + 2
    assert rows[3].startswith("| top-k |  | 2.00 |")
    pytest.importorskip("matplotlib")
    trade_off.plot(tmp_path / "trade_off.svg")
    assert "experts per token" in (tmp_path / "trade_off.svg").read_text()


def test_the_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    point = Calibration({"a": 1.0}, {"a": 1.0}, 1.0)
    with pytest.raises(ImportError, match=r"TradeOff\.plot needs matplotlib.*pip install matplotlib"):
        TradeOff([point], [point]).plot(tmp_path / "x.png")


def forward_passes() -> dict[str, str]:
    """The forward pass of every class named like a router in transformers' models, without its signature."""
    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text()
        if any(f"class {name}(" in text for name in CONVENTIONS):
            for kind in ast.parse(text).body:
                if isinstance(kind, ast.ClassDef) and kind.name in CONVENTIONS:
                    method = next(m for m in kind.body if isinstance(m, ast.FunctionDef) and m.name == "forward")
                    found[kind.name] = "\n".join(ast.unparse(line) for line in method.body)
    return found


def test_routers_of_one_convention_compute_what_the_tested_one_does() -> None:
    passes = forward_passes()
    assert set(passes) == set(CONVENTIONS)
    tested = {"MixtralTopKRouter", "Qwen3MoeTopKRouter", "GptOssTopKRouter", "DeepseekV3TopkRouter"}
    known = {passes[name] for name in tested}
    # As Qwen3's with norm_topk_prob=True.
    always = passes["Qwen3MoeTopKRouter"].replace("if self.norm_topk_prob:\n    ", "")
    assert always not in known
    assert {name for name, forward in passes.items() if forward not in {*known, always}} == set()
