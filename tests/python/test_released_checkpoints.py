# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the released format: loaded, compared with the release's arithmetic, written back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released
import torch
from safetensors.torch import load_file
from torch import Tensor

from dynamic_moe.models import DynamicMoEForCausalLM, save_released

pytestmark = pytest.mark.level_independent

OPTIONS = {"threshold_rule": "released", "router_dtype": "activations", "attn_implementation": "eager"}
ROUTER = "model.layers.0.mlp.router.weight"
EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DynamicMoEForCausalLM:
    model: DynamicMoEForCausalLM = DynamicMoEForCausalLM.from_pretrained(folder, dtype=dtype, **{**OPTIONS, **options})
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return tensors


@pytest.mark.parametrize("router_dtype", ["float32", "activations"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_released_ones(tmp_path: Path, dtype: torch.dtype, router_dtype: str) -> None:
    tensors = released.state(dtype)
    model = load(released.write(tmp_path, tensors), dtype, router_dtype=router_dtype)
    ids = torch.randint(3, 64, (3, 11))
    expected = released.logits(tensors, ids)
    with torch.no_grad():
        actual = model(ids).logits
    # The rotary embedding is float32 in both, so float64 is not better than its angles.
    bound = 2e-5 * expected.abs().amax(-1, keepdim=True)
    assert ((actual - expected).abs() <= bound).all()


def test_bfloat16_logits_are_the_released_ones(tmp_path: Path) -> None:
    tensors = released.state(torch.bfloat16)
    model = load(released.write(tmp_path, tensors), torch.bfloat16)
    ids = torch.randint(3, 64, (3, 11))
    expected = released.logits(tensors, ids).float()
    with torch.no_grad():
        actual = model(ids).logits.float()
    # Products that round elsewhere: a few units in the last place (2^-8) of the largest logit of the token.
    assert ((actual - expected).abs() <= 12 * 2**-8 * expected.abs().amax(-1, keepdim=True)).all()


def test_greedy_generations_are_the_released_ones(tmp_path: Path) -> None:
    tensors = released.state()
    model = load(released.write(tmp_path, tensors))
    ids = torch.randint(3, 64, (2, 5))
    actual = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(actual, released.greedy(tensors, ids, 8))


def test_the_rule_of_the_release_is_strict() -> None:
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert released.select(halves, 0.5).sum() == 2
    assert released.select(torch.full((1, 16), 1 / 16), 0.5).sum() == 9
    assert released.select(torch.full((1, 4), 0.25), 1.0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["released", "paper"])
def test_the_router_in_the_activations_dtype_selects_what_the_release_selects(dtype: torch.dtype, rule: str) -> None:
    from dynamic_moe.models import ActivationDtypeTopPRouter

    router = ActivationDtypeTopPRouter(16, 16, 0.4, threshold_rule=rule)
    logits = torch.randn(2000, 16).to(dtype)
    routing = router.select(logits)
    compiled = torch.compile(router.select, backend="eager", fullgraph=True)(logits)
    assert torch.equal(compiled.expert_ids, routing.expert_ids)
    expected = released.select(logits.softmax(-1), 0.4)
    actual = torch.zeros(2000, 17, dtype=torch.bool).scatter(1, routing.expert_ids.long(), True)[:, :16]
    differ = (actual != expected).any(-1)
    values = logits.softmax(-1).sort(-1, descending=True).values
    tied = (values[:, 1:] == values[:, :-1]).any(-1)  # of tied experts, the release may take either
    met = (values.cumsum(-1) == 0.4).any(-1) & (rule == "paper")
    assert not (differ & ~tied & ~met).any()
    assert dtype == torch.bfloat16 or not tied.all()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_written_back_bit_for_bit(tmp_path: Path, shards: int, safe: bool) -> None:
    tensors = released.state(torch.bfloat16)
    model = load(released.write(tmp_path / "a", tensors, shards=shards, safe=safe), torch.bfloat16)
    assert model.model.layers[0].mlp.router.threshold_rule == "released"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_released(model, tmp_path / "b", max_shard_bytes=20_000 if shards > 1 else 1 << 30, safe=safe)
    written = tensors_of(tmp_path / "b")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    ignored = {"num_key_value_heads": 4, "rope_theta": 10000.0}  # by the release; what it computes with is written
    assert {name: fields[name] for name in released.FIELDS} == released.FIELDS | ignored
    assert (len(list((tmp_path / "b").glob("*.index.json"))) == 1) == (shards > 1)


def test_what_the_release_cannot_express_is_refused(tmp_path: Path) -> None:
    model = load(released.write(tmp_path / "a", released.state()))
    model.config.cap_experts = True
    with pytest.raises(ValueError, match="cap_experts must be False in the released format, got True"):
        save_released(model, tmp_path / "b")


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.4.up_proj.weight"] = tensors[EXPERT].clone()


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT][:-1].clone()


def _cast(tensors: dict[str, Tensor]) -> None:
    tensors[ROUTER] = tensors[ROUTER].to(torch.int8)


def _mix(tensors: dict[str, Tensor]) -> None:
    tensors[ROUTER] = tensors[ROUTER].double()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, r"tensor model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight is missing in "),
        (_add, r"tensor model\.layers\.0\.mlp\.experts\.4\.up_proj\.weight in .* is unknown"),
        (_reshape, r"experts\.2\.up_proj\.weight must have shape \[24, 32\], has \[23, 32\] in "),
        (_cast, r"mlp\.router\.weight must have a floating-point dtype, has torch\.int8 in "),
        (_mix, r"mlp\.router\.weight must have dtype torch\.float32 as those before it, has torch\.float64 in "),
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_wrong_tensors_are_named_with_their_file(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str, safe: bool
) -> None:
    tensors = released.state()
    spoil(tensors)
    released.write(tmp_path, tensors, safe=safe)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert ("model.safetensors" if safe else "pytorch_model.bin") in str(error.value)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, safe: bool, kept: float) -> None:
    released.write(tmp_path, released.state(), safe=safe)
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    named = r"tensor (model|lm_head)\..* is cut off in .*model\.safetensors" if safe else r"file .*\.bin cannot be read"
    with pytest.raises(ValueError, match=named):
        load(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    released.write(tmp_path, released.state(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model-00002-of-00003\.safetensors is missing; it should hold tensor model\."
    ):
        load(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    released.write(tmp_path, released.state())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold one of model\.safetensors, pytorch_model\.bin, .* has none"):
        load(tmp_path)


def test_the_default_number_of_experts_of_the_release_is_refused(tmp_path: Path) -> None:
    released.write(tmp_path, released.state(), num_experts=-1)
    with pytest.raises(ValueError, match=r"num_experts must be at least 1 in the released config\.json, got -1"):
        load(tmp_path)
