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
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
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
from dynamic_moe.models.cache_names import NAMES

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
            name = NAMES[position % 2]  # either may be given, whatever transformers calls it
            output = model(tokens[:, position : position + 1], use_cache=True, **{name: cache})
            cache = output.cache
            assert cache is output.past_key_values
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


CACHES: dict[str, Any] = {
    "none": lambda: None,
    "dynamic": lambda: DynamicCache(config=config()),
    "static": lambda: StaticCache(config=config(), max_cache_len=16),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_columns_of_a_mask_for_tokens_to_come_change_nothing(backend: str, kind: str) -> None:
    model, tokens = make(torch.float32), ids(3, 7)
    model.set_attn_implementation(backend)
    mask = torch.ones_like(tokens)
    mask[0, :2], mask[1, 5:] = 0, 0
    steps = [slice(0, 7)] if kind == "none" else [slice(0, 3), slice(3, 6), slice(6, 7)]
    tails = [torch.zeros(3, 0), torch.zeros(3, 4), torch.ones(3, 9)]
    results = []
    for tail in tails:
        cache, logits = CACHES[kind](), []
        for step in steps:
            given = torch.cat([mask, tail.long()], 1)[:, : step.stop if tail.shape[1] == 0 else None]
            with torch.no_grad(), collect_routing() as routings:
                logits.append(model(tokens[:, step], attention_mask=given, past_key_values=cache).logits)
            assert all(routing.num_tokens == mask[:, step].sum() for routing in routings)
        results.append(torch.cat(logits, 1))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    expected = model(tokens, attention_mask=mask).logits
    assert_close(results[0][mask.bool()], expected[mask.bool()], 1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_for_a_whole_cache_compiles(kind: str) -> None:
    model, tokens = make(torch.float32), ids(2, 8)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, :2], mask[:, 8:] = 0, 0
    torch.compiler.reset()
    compiled, cache, logits = torch.compile(model, fullgraph=True, backend="aot_eager"), CACHES[kind](), []
    with torch.no_grad():
        for step in (slice(0, 5), slice(5, 8)):
            with collect_routing() as routings:
                logits.append(compiled(tokens[:, step], attention_mask=mask, past_key_values=cache).logits)
            assert all(routing.num_tokens == mask[:, step].sum() for routing in routings)
        expected = model(tokens, attention_mask=mask[:, :8]).logits
    used = mask[:, :8].bool()
    assert_close(torch.cat(logits, 1)[used], expected[used], 1e-5)


@pytest.mark.parametrize(
    ("shape", "past", "message"),
    [
        ((2, 3), 0, r"attention_mask must have shape \[2, 4\], a column for each of 0 cached and 4 new.*got \[2, 3\]"),
        ((2, 1), 0, r"attention_mask must have shape \[2, 4\].*got \[2, 1\]"),
        ((2, 4), 3, r"attention_mask must have shape \[2, 7\], a column for each of 3 cached and 4 new.*got \[2, 4\]"),
        ((3, 4), 0, r"attention_mask must have shape \[2, 4\].*got \[3, 4\]"),
        ((2, 4, 4), 0, r"attention_mask must have shape \[2, 4\].*or 4 dimensions; got \[2, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...], past: int, message: str, kind: str) -> None:
    model, cache = make(torch.float32), CACHES[kind]()
    if past:
        model(ids(2, past), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(ids(2, 4), attention_mask=torch.ones(shape), past_key_values=cache)


def test_one_mask_may_be_for_all_sequences() -> None:
    model, tokens, mask = make(), ids(2, 4), torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(
        model(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask.expand(2, -1)).logits
    )


def test_packed_sequences_do_not_see_each_other() -> None:
    model, first, second = make(torch.float32), ids(1, 5), ids(1, 4)
    packed, positions = torch.cat([first, second], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    actual = model(packed, position_ids=positions, use_cache=False).logits
    assert_close(actual, torch.cat([model(first).logits, model(second).logits], 1), 1e-5)


def test_two_caches_are_refused() -> None:
    model, tokens = make(), ids()
    caches = {name: CACHES["dynamic"]() for name in NAMES}
    classifier = DynamicMoEForSequenceClassification(config())
    for call in (model, model.model, model.generate, classifier):
        with pytest.raises(ValueError, match=r"past_key_values and cache are two names of one argument.*got both"):
            call(tokens, **caches)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"past_key_values": "dynamic"},
        {"cache": "dynamic"},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generation_with_a_cache_is_generation_without(options: dict[str, Any]) -> None:
    model, tokens = make(), ids()
    tokens[0, :3] = 0
    common = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    without = model.generate(tokens, use_cache=False, num_beams=options.get("num_beams", 1), **common)
    options = {name: CACHES[value]() if name in NAMES else value for name, value in options.items()}
    assert torch.equal(model.generate(tokens, **common, **options), without)


def test_drafts_of_another_model_change_no_token() -> None:
    model, tokens = make(), ids(1)
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    drafts = model.generate(tokens, assistant_model=make(num_hidden_layers=1), **common)
    assert torch.equal(drafts, model.generate(tokens, **common))


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
    with pytest.raises(ValueError, match=r"outputs must have a router_loss, got None.*without a cache"):
        causal_lm_loss(model(tokens, cache=DynamicCache(config=model.config)), tokens)
    with pytest.raises(ValueError, match=r"outputs must have a router_loss, got None in tuple.*return_dict=True"):
        causal_lm_loss(model(tokens, return_dict=False), tokens)
    with pytest.raises(ValueError, match="labels must be a tensor, got None"):
        causal_lm_loss(model(tokens), None)


def test_the_loss_outside_of_the_model_is_that_of_the_model() -> None:
    model, tokens = make(), ids(3)
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    for num_items in (None, 40, torch.tensor(40)):
        expected = model(tokens, labels=labels, num_items_in_batch=num_items).loss
        assert torch.equal(causal_lm_loss(model(tokens), labels, num_items), expected)  # in evaluation
        assert torch.equal(causal_lm_loss(model.train()(tokens), labels, num_items), expected)
        given = model.eval()(tokens, labels=tokens, shift_labels=shifted, num_items_in_batch=num_items).loss
        assert torch.equal(given, expected)


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


def _train(
    folder: Path, resume: str | None = None, compute_loss_func: Any = None, compute_metrics: Any = None, **options: Any
) -> tuple[DynamicMoEForCausalLM, Trainer]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (8,), generator=generator).tolist() for _ in range(16)]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    model = make(torch.float32)
    trainer = Trainer(
        model,
        TrainingArguments(**_arguments(folder, **options)),
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=compute_loss_func,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_a_training_that_is_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model, trainer = _train(tmp_path / "a", save_steps=2)
    start = make(torch.float32)
    assert not torch.equal(start.model.layers[0].mlp.router.weight, model.model.layers[0].mlp.router.weight)
    assert sum("loss" in entry for entry in trainer.state.log_history) == 4
    resumed, _ = _train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), save_steps=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("steps", [1, 2], ids=["whole batches", "accumulated"])
def test_trainer_logs_the_same_losses_with_the_loss_of_the_model_and_with_ours(tmp_path: Path, steps: int) -> None:
    predictions: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        predictions.append(prediction.predictions)
        return {}

    logs = []
    for name, loss in (("model", None), ("ours", causal_lm_loss)):
        _, trainer = _train(
            tmp_path / name,
            compute_loss_func=loss,
            compute_metrics=metrics,
            eval_strategy="steps",
            eval_steps=2,
            gradient_accumulation_steps=steps,
        )
        entries = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        logs.append([entry for entry in entries if entry is not None])
    assert len(logs[0]) == 6
    assert logs[0] == logs[1]
    assert [prediction.shape for prediction in predictions] == [(16, 8, 64)] * 4  # logits alone


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path: Path) -> None:
    model, trainer = _train(tmp_path, label_smoothing_factor=0.2, max_steps=1)
    tokens = torch.tensor(trainer.eval_dataset["input_ids"])
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def _sft_trainer(folder: Path, **options: Any) -> SFTTrainer:
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(61))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    texts = [" ".join(f"w{(start + step) % 61}" for step in range(4 + start % 3)) for start in range(16)]
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(
        make(torch.float32, load_balancing_loss_coef=1.0, output_router_logits=True),
        SFTConfig(**_arguments(folder, max_steps=3, max_length=8, eval_strategy="steps", eval_steps=2, **options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=fast,
        compute_loss_func=causal_lm_loss,
    )


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
def test_the_sft_trainer_trains_and_evaluates_with_the_losses_of_the_router(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = _sft_trainer(tmp_path, **options)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
    with torch.no_grad():
        outputs = [trainer.model.eval()(**batch, use_cache=False) for batch in batches]
    assert all(output.router_loss > 0.5 for output in outputs)
    expected = sum(output.loss.item() for output in outputs) / len(outputs)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_coefficient_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef must be 0\.0.*compute_loss_func=causal_lm_loss.*got 0\.1"
    ):
        _sft_trainer(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0\.0.*got 0\.2"):
        config(router_aux_loss_coef=0.2)
