# SPDX-License-Identifier: Apache-2.0
"""set_top_p, and the p that calibrate_top_p finds."""

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from hf_models import EXPERTS, FAMILIES, K, make, tokens

from dynamic_moe import DynamicMoE
from dynamic_moe.integrations import (
    Calibration,
    TradeOff,
    calibrate_top_p,
    evaluate_top_p,
    set_top_p,
    top_p_trade_off,
    unset_top_p,
)
from dynamic_moe.integrations.routers import CONVENTIONS, find_routers

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


def test_a_copy_has_routers_of_its_own() -> None:
    model, ids = make("mixtral"), tokens()
    set_top_p(model, 0.1)
    other = copy.deepcopy(model)
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
