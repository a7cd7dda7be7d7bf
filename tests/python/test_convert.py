# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamic_moe.convert``: round trips, families of transformers, and folders that it refuses."""

import json
from pathlib import Path

import pytest
import released
import torch
from hf_models import make, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynamic_moe import convert
from dynamic_moe.models import DynamicMoEForCausalLM

pytestmark = pytest.mark.level_independent


def test_a_released_folder_becomes_ours_and_again_released(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = released.state(torch.bfloat16)
    first, ours, last = (tmp_path / name for name in ("first", "ours", "last"))
    released.write(first, tensors, shards=2)
    (first / "tokenizer.model").write_bytes(b"pieces")
    assert convert.main([str(first), str(ours)]) == 0
    assert "the released format became ours" in capsys.readouterr().out
    assert json.loads((ours / "config.json").read_text())["model_type"] == "dynamic_moe"
    assert (ours / "tokenizer.model").read_bytes() == b"pieces"
    assert convert.main([str(ours), str(last)]) == 0
    written = load_file(last / "model.safetensors")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    # Transformers itself, loading the released folder, gets the same model.
    direct, stored = DynamicMoEForCausalLM.from_pretrained(first), AutoModelForCausalLM.from_pretrained(ours)
    assert type(stored) is DynamicMoEForCausalLM
    assert stored.dtype == torch.bfloat16
    for (name, expected), actual in zip(direct.state_dict().items(), stored.state_dict().values(), strict=True):
        assert torch.equal(actual.float(), expected.float()), name


@pytest.mark.parametrize("family", convert.FAMILIES)
def test_a_family_keeps_its_architecture_and_gets_our_kernels(tmp_path: Path, family: str) -> None:
    model = make(family, torch.float32)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert convert.convert(tmp_path / "a", tmp_path / "b") == "the architecture is the same, on our kernels"
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(served) is type(model)
    assert served.config._experts_implementation == "dynamic_moe"
    for name, tensor in model.state_dict().items():
        assert torch.equal(served.state_dict()[name], tensor), name
    ids = tokens()
    with torch.no_grad():
        actual, expected = served(ids).logits, model(ids).logits
    assert ((actual - expected).abs() <= 1e-4 * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("family", convert.FAMILIES)
def test_missing_and_unknown_tensors_of_a_family_are_named(tmp_path: Path, family: str) -> None:
    make(family, torch.float32).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    missing = next(name for name in tensors if ".experts.1." in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != missing}
    for spoilt, message in (
        (kept, f"tensor {missing} is missing in {file}"),
        (tensors | {"model.extra": torch.ones(1)}, f"tensor model.extra in {file} is unknown"),
        (tensors | {missing: torch.ones(2, 2)}, f"tensor {missing} must have shape"),
    ):
        save_file(spoilt, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            convert.convert(tmp_path / "a", tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_a_spoilt_released_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = released.state()
    del tensors["model.norm.weight"]
    released.write(tmp_path / "a", tensors)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "error: tensor model.norm.weight is missing in " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_folders_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a"
    with pytest.raises(ValueError, match=r"must hold a config\.json"):
        convert.convert(source, tmp_path / "b")
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type in .* must be one of dynamic_moe, .*mixtral.*got 'llama'"):
        convert.convert(source, tmp_path / "b")
    with pytest.raises(ValueError, match=r"destination .* must be empty or not exist"):
        convert.convert(source, source)
