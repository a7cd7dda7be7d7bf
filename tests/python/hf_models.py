# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of Hugging Face families, built from their configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
EXPERTS = 8
K = 3

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS, "head_dim": 8},
    "qwen3_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 20,
        "num_experts": EXPERTS,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": EXPERTS},
    "deepseek_v3": {
        "intermediate_size": 24,
        "moe_intermediate_size": 20,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": EXPERTS, "head_dim": 8},
}


def make(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A model with weights large enough for routers to have preferences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or ".gate." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.05)
    model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """``[batch, length]`` random ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length))
