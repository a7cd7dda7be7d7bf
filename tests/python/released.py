# SPDX-License-Identifier: Apache-2.0
"""The released semantics (Huang et al. 2024) in plain PyTorch: an oracle that shares no code with the package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # ignored by the release
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,  # ignored by the release
    "rope_scaling": None,
    "num_experts": 4,
    "experts_topk": 2,
    "expert_frequency": 2,
    "top_p_threshold": 0.4,
}


def state(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Random tensors of a checkpoint, under the names of the release; layer 0 has experts, layer 1 has not."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, vocabulary = FIELDS["hidden_size"], FIELDS["intermediate_size"], FIELDS["vocab_size"]

    def random(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": random(vocabulary, hidden)}
    for layer in range(FIELDS["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = random(hidden, hidden)
        tensors[f"{prefix}.self_attn.rotary_emb.inv_freq"] = inv_freq()
        for norm in ("input_norm", "post_attention_norm"):
            tensors[f"{prefix}.{norm}.weight"] = 1 + random(hidden)
        networks = [f"{prefix}.mlp.mlp"]
        if layer % FIELDS["expert_frequency"] == 0:
            tensors[f"{prefix}.mlp.router.weight"] = random(FIELDS["num_experts"], hidden)
            networks = [f"{prefix}.mlp.experts.{expert}" for expert in range(FIELDS["num_experts"])]
        for network in networks:
            tensors[f"{network}.gate_proj.weight"] = random(width, hidden)
            tensors[f"{network}.up_proj.weight"] = random(width, hidden)
            tensors[f"{network}.down_proj.weight"] = random(hidden, width)
    return tensors | {"model.norm.weight": 1 + random(hidden), "lm_head.weight": random(vocabulary, hidden)}


def inv_freq() -> Tensor:
    head_dim = FIELDS["hidden_size"] // FIELDS["num_attention_heads"]
    return 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))


def write(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, safe: bool = True, **fields: Any) -> Path:
    """Write a folder in the released format; tensors go to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[shard::shards]}
        if safe:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def select(probabilities_TE: Tensor, p: float) -> Tensor:
    """Bool ``[T, E]``: in descending order, up to the first expert whose partial sum is over p; all if none is."""
    values, order = probabilities_TE.sort(dim=-1, descending=True)
    over = values.cumsum(-1) > p
    chosen = torch.zeros_like(over)
    for token in range(len(over)):
        last = int(over[token].int().argmax()) if over[token].any() else over.shape[1] - 1
        chosen[token, order[token, : last + 1]] = True
    return chosen


def logits(tensors: Mapping[str, Tensor], ids_BS: Tensor) -> Tensor:
    """Logits ``[B, S, V]``, all arithmetic in the dtype of the tensors but norms and the softmax of the attention."""
    dtype = tensors["lm_head.weight"].dtype
    heads = FIELDS["num_attention_heads"]
    wide = torch.promote_types(dtype, torch.float32)

    def norm(x: Tensor, name: str) -> Tensor:
        wide_x = x.to(wide)
        scaled = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + FIELDS["rms_norm_eps"])
        return tensors[name] * scaled.to(dtype)

    def swiglu(x: Tensor, name: str) -> Tensor:
        gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

    def attention(x: Tensor, prefix: str) -> Tensor:
        def project(part: str) -> Tensor:
            weight = tensors[f"{prefix}.{part}_proj.weight"]
            return functional.linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2)

        length = x.shape[1]
        angles = torch.arange(length).float()[:, None] * inv_freq()
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def rotate(q: Tensor) -> Tensor:
            left, right = q.chunk(2, -1)
            return q * cos + torch.cat([-right, left], -1) * sin

        scores = rotate(project("q")) @ rotate(project("k")).transpose(2, 3) * (x.shape[-1] // heads) ** -0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(dtype).min)
        mixed = scores.softmax(-1, dtype=wide).to(dtype) @ project("v")
        return functional.linear(mixed.transpose(1, 2).flatten(2), tensors[f"{prefix}.o_proj.weight"])

    def experts(x: Tensor, prefix: str) -> Tensor:
        x_TH = x.flatten(0, 1)
        probabilities_TE = functional.linear(x_TH, tensors[f"{prefix}.router.weight"]).softmax(-1)
        chosen_TE = select(probabilities_TE, FIELDS["top_p_threshold"])
        y_TH = torch.zeros_like(x_TH)
        for expert in range(FIELDS["num_experts"]):
            rows = chosen_TE[:, expert].nonzero()[:, 0]
            y_TH[rows] += probabilities_TE[rows, expert, None] * swiglu(x_TH[rows], f"{prefix}.experts.{expert}")
        return y_TH.reshape(x.shape)

    x = tensors["model.embed_tokens.weight"][ids_BS]
    for layer in range(FIELDS["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = x + attention(norm(x, f"{prefix}.input_norm.weight"), f"{prefix}.self_attn")
        y = norm(x, f"{prefix}.post_attention_norm.weight")
        has_experts = layer % FIELDS["expert_frequency"] == 0
        x = x + (experts(y, f"{prefix}.mlp") if has_experts else swiglu(y, f"{prefix}.mlp.mlp"))
    return functional.linear(norm(x, "model.norm.weight"), tensors["lm_head.weight"])


def greedy(tensors: Mapping[str, Tensor], ids_BS: Tensor, count: int) -> Tensor:
    """Continue by ``count`` tokens, without a cache."""
    for _ in range(count):
        ids_BS = torch.cat([ids_BS, logits(tensors, ids_BS)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids_BS
