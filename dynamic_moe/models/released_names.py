# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of tensors: the released format and ours, and which tensor of one becomes which of the other."""

import re

from dynamic_moe.models.configuration import DynamicMoEConfig

# A buffer that the release stores and that follows from the configuration.
IGNORED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")

Shapes = dict[str, tuple[int, ...]]


def _shared_shapes(config: DynamicMoEConfig, layer: int) -> Shapes:
    """Tensors of a layer that have one name in both formats."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    assert kv_heads is not None
    assert head_dim is not None
    prefix = f"model.layers.{layer}"
    shapes: Shapes = {
        f"{prefix}.self_attn.q_proj.weight": (heads * head_dim, hidden),
        f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
        f"{prefix}.input_norm.weight": (hidden,),
        f"{prefix}.post_attention_norm.weight": (hidden,),
    }
    if config.has_experts(layer):
        shapes[f"{prefix}.mlp.router.weight"] = (config.num_experts, hidden)
    return shapes


def _around_layers(config: DynamicMoEConfig, layers: list[Shapes]) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in layers:
        shapes.update(layer)
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def released_shapes(config: DynamicMoEConfig) -> Shapes:
    """Tensors of the released format, without the buffers that it also stores."""
    hidden, width = config.hidden_size, config.intermediate_size

    def layer(number: int) -> Shapes:
        shapes = _shared_shapes(config, number)
        prefix = f"model.layers.{number}.mlp"
        networks = [f"{prefix}.mlp"]
        if config.has_experts(number):
            networks = [f"{prefix}.experts.{expert}" for expert in range(config.num_experts)]
        for network in networks:
            shapes[f"{network}.gate_proj.weight"] = (width, hidden)
            shapes[f"{network}.up_proj.weight"] = (width, hidden)
            shapes[f"{network}.down_proj.weight"] = (hidden, width)
        return shapes

    return _around_layers(config, [layer(number) for number in range(config.num_hidden_layers)])


def our_shapes(config: DynamicMoEConfig) -> Shapes:
    """Tensors of ``DynamicMoEForCausalLM``."""
    hidden, width = config.hidden_size, config.intermediate_size

    def layer(number: int) -> Shapes:
        shapes = _shared_shapes(config, number)
        prefix = f"model.layers.{number}.mlp"
        if config.has_experts(number):
            shapes[f"{prefix}.experts.gate_up_proj"] = (config.num_experts, 2 * width, hidden)
            shapes[f"{prefix}.experts.down_proj"] = (config.num_experts, hidden, width)
        else:
            shapes[f"{prefix}.gate_up_proj"] = (2 * width, hidden)
            shapes[f"{prefix}.down_proj"] = (hidden, width)
        return shapes

    return _around_layers(config, [layer(number) for number in range(config.num_hidden_layers)])


def inv_freq_names(config: DynamicMoEConfig) -> list[str]:
    """Names of the buffers that the released code stores beside its weights."""
    return [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_hidden_layers)]
