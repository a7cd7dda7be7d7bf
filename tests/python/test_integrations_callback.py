# SPDX-License-Identifier: Apache-2.0
"""RoutingStatisticsCallback: what it logs is right, reaches report_to, and costs no synchronization in a step."""

import contextlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_models import EXPERTS, K, make, tokens
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamic_moe import DynamicMoE, collect_routing
from dynamic_moe.integrations import RoutingStatisticsCallback, set_top_p
from dynamic_moe.models import DynamicMoEConfig, DynamicMoEForCausalLM

pytestmark = pytest.mark.level_independent


def watch(model: nn.Module, **options: Any) -> RoutingStatisticsCallback:
    callback = RoutingStatisticsCallback(**options)
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model.train())
    return callback


def logged(callback: RoutingStatisticsCallback) -> dict[str, float]:
    logs = {"loss": 1.0}
    callback.on_log(None, TrainerState(), TrainerControl(), logs=logs)
    return {name: value for name, value in logs.items() if name != "loss"}


def test_a_trainer_logs_them_to_report_to_and_to_its_history(tmp_path: Path) -> None:
    class Report(TrainerCallback):
        """Stands for an integration that report_to names."""

        seen: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    model = make("mixtral", torch.float32)
    model.set_experts_implementation("dynamic_moe")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[Report])
    RoutingStatisticsCallback(per_layer=True).attach(trainer)
    trainer.train()
    reports = [logs for logs in Report.seen if "loss" in logs]
    assert len(reports) == 2
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    for logs, kept in zip(reports, history, strict=True):
        assert logs["routing/experts_per_token"] == K
        assert 0 < logs["routing/entropy"] < math.log(EXPERTS)
        assert logs["routing/load_imbalance"] >= 1
        assert logs["routing/entropy/model.layers.1.mlp.gate"] > 0
        assert {name: kept[name] for name in logs if name.startswith("routing/")} == {
            name: value for name, value in logs.items() if name.startswith("routing/")
        }
    assert not any(name.startswith("routing/") for logs in Report.seen if "loss" not in logs for name in logs)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith(".gate"))


def test_the_figures_are_those_of_the_routers() -> None:
    model, ids = make("mixtral", torch.float32), tokens(2, 16)
    callback = watch(model, per_layer=True)
    with set_top_p(model, 0.5):
        logits = [model(part, output_router_logits=True).router_logits[0] for part in (ids[:1], ids[1:])]
    figures = logged(callback)
    probabilities = torch.cat(logits).double().softmax(-1)
    values, order = probabilities.sort(-1, descending=True)
    counts = (1 + (values.cumsum(-1)[:, : K - 1] < 0.5).sum(-1)).tolist()
    rows = torch.zeros(EXPERTS)
    for token, count in enumerate(counts):
        rows[order[token, :count]] += 1
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    name = "model.layers.0.mlp.gate"
    assert figures[f"routing/experts_per_token/{name}"] == pytest.approx(sum(counts) / 32)
    assert figures[f"routing/entropy/{name}"] == pytest.approx(entropy, rel=1e-5)
    assert figures[f"routing/load_imbalance/{name}"] == pytest.approx((rows.max() / rows.mean()).item())
    assert logged(callback) == {}  # sums start anew


def test_layers_of_this_package_are_watched_with_their_masks() -> None:
    model = nn.Sequential(DynamicMoE(16, 8, 4, top_p=0.4, init_std=1.0))
    callback = watch(model)
    x, mask = torch.randn(3, 6, 16), torch.rand(3, 6) < 0.5
    _, routing = model[0](x, token_mask=mask, return_routing=True)
    figures = logged(callback)
    assert figures["routing/experts_per_token"] == pytest.approx(routing.mean_experts_per_token.item(), rel=1e-6)
    assert figures["routing/entropy"] == pytest.approx(routing.mean_entropy.item(), rel=1e-6)


def test_the_language_model_of_this_package_is_watched_without_its_padding() -> None:
    torch.manual_seed(0)
    config = DynamicMoEConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        expert_frequency=1,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = DynamicMoEForCausalLM(config)
    callback = watch(model)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    with collect_routing(model) as routings:
        model(ids % 64, attention_mask=mask)
    assert all(routing.num_tokens == 16 for routing in routings)
    mean = sum(routing.mean_experts_per_token.item() for routing in routings) / len(routings)
    assert mean > 1
    assert logged(callback)["routing/experts_per_token"] == pytest.approx(mean, rel=1e-6)


def test_evaluation_does_not_count() -> None:
    model = make("mixtral", torch.float32)
    callback = watch(model)
    model.eval()(tokens())
    assert logged(callback) == {}


def test_a_step_reads_nothing_and_a_log_reads_once() -> None:
    model = make("mixtral", torch.float32)
    callback = watch(model)
    routers = {name: module for name, module in model.named_modules() if name.endswith(".gate")}
    outputs = {name: router(torch.randn(5, 32)) for name, router in routers.items()}
    reads: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return original(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, read)

    with contextlib.ExitStack() as stack:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(counting(name))
        for name, router in routers.items():
            callback._sums[name].add(router, (), outputs[name])
        assert reads == []
        assert logged(callback)
        assert reads == ["tolist"]


def test_it_counts_under_compile() -> None:
    model, ids = make("mixtral", torch.float32), tokens()
    callback = watch(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        compiled(ids).logits.sum().backward()
    compiled_figures = logged(callback)
    for _ in range(3):
        model(ids)
    assert compiled_figures == pytest.approx(logged(callback), rel=1e-5)


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="DynamicMoE layers or routers of a known kind, got Linear"):
        watch(nn.Linear(2, 2))
