# SPDX-License-Identifier: Apache-2.0
"""The language models in Transformers: attention, caches, generation, losses, training, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from dynamic_moe import collect_routing, losses
from dynamic_moe.models import (
    DynamicMoEConfig,
    DynamicMoEForCausalLM,
    DynamicMoEForSequenceClassification,
    DynamicMoEModel,
    causal_lm_loss,
)

pytestmark = pytest.mark.level_independent

OPTIONS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "expert_frequency": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def config(**options: Any) -> DynamicMoEConfig:
    return DynamicMoEConfig(**{**OPTIONS, **options})


def make(dtype: torch.dtype = torch.float64, **options: Any) -> DynamicMoEForCausalLM:
    torch.manual_seed(0)
    return DynamicMoEForCausalLM(config(**options)).to(dtype).eval()


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 64, (batch, length))


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    """``bound`` is a share of the largest element of each row: angles of the rotary embedding are float32."""
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= bound * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"expert_frequency": 2},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(options: dict[str, Any]) -> None:
    model, tokens = make(**options), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        cache, steps = None, []
        for position in range(tokens.shape[1]):
            output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_close(torch.cat(steps, 1), expected)


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_attention_backends_agree(backend: str) -> None:
    model, tokens = make(torch.float32), ids()  # the eager softmax is float32, and masks float64 to NaN
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation(backend)
        actual = model(tokens, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], 2e-5)


def test_rope_settings_are_honoured() -> None:
    tokens = ids()
    with torch.no_grad():
        plain = make()(tokens).logits
        other = make(rope_parameters={"rope_type": "default", "rope_theta": 100.0})(tokens).logits
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits_and_no_statistics(side: str) -> None:
    model, tokens = make(), ids(1, 6)
    padded, mask = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)
    place = slice(3, 9) if side == "left" else slice(0, 6)
    padded[:, place], mask[:, place] = tokens, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), collect_routing() as expected_routings:
        expected = model(tokens).logits
    with torch.no_grad(), collect_routing() as routings:
        actual = model(padded, attention_mask=mask, position_ids=positions).logits
    assert_close(actual[:, place], expected)
    for routing, other in zip(routings, expected_routings, strict=True):
        assert routing.num_tokens == 6
        assert torch.equal(routing.tokens_per_expert, other.tokens_per_expert)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "beam", "static"],
)
def test_generation_with_a_cache_is_generation_without(options: dict[str, Any]) -> None:
    model, tokens = make(), ids()
    tokens[0, :3] = 0
    common = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    without = model.generate(tokens, use_cache=False, num_beams=options.get("num_beams", 1), **common)
    assert torch.equal(model.generate(tokens, **common, **options), without)


def test_sampling_draws_from_the_logits() -> None:
    model, tokens = make(), ids()
    common = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None}
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        draws.append(model.generate(tokens, use_cache=use_cache, **common))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], model.generate(tokens, **common))


def test_the_loss_is_cross_entropy_with_the_losses_of_the_paper() -> None:
    model, tokens = make(), ids()
    with collect_routing() as routings:
        output = model(tokens, labels=tokens, output_router_logits=True)
    logits = output.logits.float()  # as Transformers computes it
    task = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = task + 1e-2 * losses.load_balancing(routings) + 1e-4 * losses.dynamic(routings)
    assert torch.isclose(output.loss, expected.to(output.loss.dtype), rtol=1e-6)
    assert output.router_loss > 0
    assert [tuple(layer.shape) for layer in output.router_logits] == [(18, 4)] * 2
    assert torch.equal(output.router_logits[1], routings[1].logits)
    assert model(tokens).router_logits is None


def test_a_share_of_an_accumulated_batch_counts_by_its_labels() -> None:
    model, tokens = make(), ids(4)
    whole = model(tokens, labels=tokens).loss
    total = 4 * 8
    parts = [model(part, labels=part, num_items_in_batch=total) for part in tokens.split(2)]
    balance = 0.5 * sum(part.router_loss for part in parts)
    task = whole - model(tokens, labels=tokens).router_loss
    assert torch.isclose(sum(part.loss for part in parts), task + balance, rtol=1e-6)
    with pytest.raises(ValueError, match="outputs must have a router_loss, got None"):
        causal_lm_loss(model(tokens), tokens)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = ids()
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, checkpointed)


def test_every_router_gets_a_gradient_from_the_losses_alone() -> None:
    model = make().train()
    model(ids()).router_loss.backward()
    assert all(layer.mlp.router.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_options_of_the_configuration_reach_the_routers() -> None:
    model = make(top_p_threshold=1.0, experts_topk=3, cap_experts=True, expert_frequency=2, num_hidden_layers=3)
    with collect_routing(model) as routings:
        model(ids())
    assert list(routings.by_layer()) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert all((routing.experts_per_token == 3).all() for routing in routings)
    uncapped = make(top_p_threshold=1.0, experts_topk=3)
    with collect_routing(uncapped) as routings:
        uncapped(ids())
    assert all((routing.experts_per_token == 4).all() for routing in routings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_p_threshold": 1.5}, r"top_p_threshold must be in \(0, 1\], got 1.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=4, got 3"),
        ({"cap_experts": True, "experts_topk": 5}, r"experts_topk must be in \[1, num_experts=4\].*got 5"),
        ({"threshold_rule": "strict"}, "threshold_rule must be one of .*got 'strict'"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of .*got 'gelu'"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_auto_classes_know_the_model_type(tmp_path: Path) -> None:
    model = make(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert type(AutoConfig.from_pretrained(tmp_path)) is DynamicMoEConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is DynamicMoEModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    classifier = AutoModelForSequenceClassification.from_config(config(num_labels=3))
    assert type(classifier) is DynamicMoEForSequenceClassification


def test_the_classifier_reads_the_last_token_that_is_not_padding() -> None:
    model = DynamicMoEForSequenceClassification(config(num_labels=3)).double().eval()
    tokens = ids(1, 6)
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.int64)], 1)
    labels = torch.tensor([2])
    plain = model(tokens, labels=labels)
    output = model(padded, attention_mask=(padded != 0).long(), labels=labels)
    assert_close(output.logits, plain.logits)
    task = functional.cross_entropy(output.logits, labels)
    assert torch.isclose(output.loss, task + output.router_loss)
    output.loss.backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


def _arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def _train(folder: Path, resume: str | None = None) -> tuple[DynamicMoEForCausalLM, Trainer]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (8,), generator=generator).tolist() for _ in range(16)]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    model = make(torch.float32)
    arguments = TrainingArguments(**_arguments(folder, save_steps=2))
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_a_training_that_is_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model, trainer = _train(tmp_path / "a")
    start = make(torch.float32)
    assert not torch.equal(start.model.layers[0].mlp.router.weight, model.model.layers[0].mlp.router.weight)
    assert sum("loss" in entry for entry in trainer.state.log_history) == 4
    resumed, _ = _train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_sft_trainer_trains_with_the_losses_of_the_router(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(61))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    texts = [" ".join(f"w{(start + step) % 61}" for step in range(4 + start % 3)) for start in range(16)]
    model = make(torch.float32)
    seen: list[Tensor] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(outputs.router_loss.detach())
        return causal_lm_loss(outputs, labels, num_items_in_batch)

    trainer = SFTTrainer(
        model,
        SFTConfig(**_arguments(tmp_path, max_steps=3, max_length=8)),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=fast,
        compute_loss_func=loss,
    )
    trainer.train()
    assert len(seen) == 3
    assert all(value > 0 for value in seen)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(torch.isfinite(torch.tensor(value)) for value in logged)
