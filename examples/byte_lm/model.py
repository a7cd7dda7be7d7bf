# SPDX-License-Identifier: Apache-2.0
"""The language model: a decoder of bytes. Suffixes: B sequences, S bytes of a sequence, N heads, D width of a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name

from byte_lm.settings import Settings
from dynamic_moe import DynamicMoE, SharedExpert, TopKRouter, TopPRouter

VOCABULARY = 256


class ByteLM(nn.Module):
    """Pre-norm decoder with rotary positions over the 256 bytes.

    Its feed-forward layers are :class:`~dynamic_moe.DynamicMoE`, or one SwiGLU of the same active size if the router is
    "dense".
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.norm = norm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        cos, sin = rotary_tables(settings.context, width // settings.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return logits ``[B, S, 256]`` of the byte after each of int64 ``[B, S]``, S <= context."""
        x: Tensor = self.embedding(tokens_BS)
        length = tokens_BS.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on the normalized residual stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention_norm = norm(settings.hidden_size)
        self.attention = Attention(settings)
        self.feed_forward_norm = norm(settings.hidden_size)
        self.feed_forward = feed_forward(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add what the two layers say to ``x [B, S, H]``."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + y


def norm(width: int) -> nn.Module:
    """Layer normalization without a bias; RMSNorm, which has no fused kernel on the CPU, takes four times as long."""
    return nn.LayerNorm(width, bias=False)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.num_heads = settings.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5 / (2 * settings.num_layers) ** 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let each byte of ``x [B, S, H]`` look at itself and those before it."""
        heads_BS3ND = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q_BNSD, k_BNSD, v_BNSD = heads_BS3ND.permute(2, 0, 3, 1, 4)
        # Queries and keys of one length keep the attention from saturating at the learning rate of a short run.
        q_BNSD, k_BNSD = (F.layer_norm(each, each.shape[-1:]) for each in (q_BNSD, k_BNSD))
        q_BNSD, k_BNSD = rotate(q_BNSD, cos, sin), rotate(k_BNSD, cos, sin)
        y_BNSD = causal_attention(q_BNSD, k_BNSD, v_BNSD)
        y: Tensor = self.out(y_BNSD.transpose(1, 2).flatten(2))
        return y


def causal_attention(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Softmax attention of each position to itself and those before it."""
    if q_BNSD.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
    # On a CPU and with sequences this short, torch's fused kernel takes up to three times as long as plain products.
    length, width = q_BNSD.shape[-2:]
    mask_SS = torch.full((length, length), -torch.inf, dtype=q_BNSD.dtype).triu(1)
    scores_BNSS: Tensor = (q_BNSD * width**-0.5) @ k_BNSD.transpose(-1, -2) + mask_SS
    y_BNSD: Tensor = scores_BNSS.softmax(-1).to(v_BNSD.dtype) @ v_BNSD
    return y_BNSD


def feed_forward(settings: Settings) -> nn.Module:
    """Make a feed-forward layer ``[B, S, H] -> [B, S, H]`` with the router that the settings name."""
    width = settings.hidden_size
    if settings.router == "dense":
        return SharedExpert(width, settings.dense_intermediate_size, init_std=width**-0.5)
    router: nn.Module
    if settings.router == "top_k":
        # A single weight that is divided by itself is 1, and its router would learn nothing from the text.
        router = TopKRouter(width, settings.num_experts, settings.top_k, renormalize=settings.top_k > 1)
    else:
        router = TopPRouter(width, settings.num_experts, settings.top_p)
    return DynamicMoE(width, settings.intermediate_size, settings.num_experts, router=router, init_std=width**-0.5)


def rotary_tables(length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine ``[length, head_width / 2]`` of the rotary positions (Su et al. 2021, base 10000)."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) by the angle of its position."""
    cos_SD, sin_SD = cos_SD.to(x_BNSD.dtype), sin_SD.to(x_BNSD.dtype)
    a, b = x_BNSD.chunk(2, -1)
    return torch.cat((a * cos_SD - b * sin_SD, a * sin_SD + b * cos_SD), -1)


def moe_layers(model: nn.Module) -> list[DynamicMoE]:
    """The layers with experts, first to last."""
    return [module for module in model.modules() if isinstance(module, DynamicMoE)]


def parameter_counts(model: nn.Module, mean_experts: float) -> tuple[int, int]:
    """Return all parameters, and those that a token meets with ``mean_experts`` experts in each layer."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0.0
    for layer in moe_layers(model):
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        idle += experts * (1 - mean_experts / layer.num_experts)
    return total, round(total - idle)
