# SPDX-License-Identifier: Apache-2.0
"""The language models: LLaMA's attention and norms, and :class:`~dynamic_moe.DynamicMoE` where LLaMA has its MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from dynamic_moe import losses
from dynamic_moe.collect import CollectedRoutings, collect_routing
from dynamic_moe.experts import SharedExpert, SwiGLUExperts
from dynamic_moe.layer import DynamicMoE
from dynamic_moe.models.activation_router import ActivationDtypeTopPRouter
from dynamic_moe.models.cache_names import CACHE_NAME, NAMES, BothCacheNames, one_cache, with_one_cache
from dynamic_moe.models.checkpoint_folder import check_if_released
from dynamic_moe.models.configuration import DynamicMoEConfig
from dynamic_moe.models.masks import split_mask
from dynamic_moe.routers import Router, TopPRouter
from dynamic_moe.routing import RouterScores, Routing


@dataclass
class DynamicMoEModelOutput(BothCacheNames, MoeModelOutputWithPast):
    """What :class:`DynamicMoEModel` returns."""


@dataclass
class DynamicMoECausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """What :class:`DynamicMoEForCausalLM` returns.

    Attributes
    ----------
    loss : Tensor or None
        Where there are labels: cross-entropy + ``router_loss``.
    router_loss : Tensor or None
        ``load_balancing_loss_coef * aux_loss + dynamic_loss_coef * dynamic_loss``. None where a cache was given, as
        :meth:`generate` does, without labels and in evaluation.
    aux_loss, dynamic_loss : Tensor or None
        :func:`dynamic_moe.losses.load_balancing` and :func:`dynamic_moe.losses.dynamic`, means over layers, unscaled.
    router_logits : tuple of Tensor or None
        float32 ``[B * S, E]`` of each layer with experts, if ``output_router_logits``.
    logits, past_key_values, hidden_states, attentions
        As in other models. ``cache`` is another name of ``past_key_values``.
    """

    router_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    dynamic_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class DynamicMoESequenceClassifierOutput(BothCacheNames, SequenceClassifierOutputWithPast):
    """What :class:`DynamicMoEForSequenceClassification` returns; see :class:`DynamicMoECausalLMOutput`."""

    router_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    dynamic_loss: Tensor | None = None


def causal_lm_loss(
    outputs: DynamicMoECausalLMOutput,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the next token plus the router's losses.

    :class:`DynamicMoEForCausalLM` computes it itself where it gets labels. Trainers that compute the loss on their own,
    as TRL's ``SFTTrainer`` does, take it as ``compute_loss_func=causal_lm_loss``; else they leave out the router's. It
    is the same in training and in evaluation.

    Parameters
    ----------
    outputs : DynamicMoECausalLMOutput
        Of a model in training mode, or called with labels or without a cache: it must have the ``router_loss``.
    labels : Tensor
        int64 ``[B, S]``, not shifted; -100 where there is nothing to predict.
    num_items_in_batch : Tensor or int, optional
        Labels in all the batches whose gradients are added up; then a batch counts by its share of them, in both parts.
        Default: this batch is alone.
    shift_labels : Tensor, optional
        int64 ``[B, S]``: the token that each position predicts, where the sequence is split; ``labels`` is not read.

    Raises
    ------
    ValueError
        If ``outputs`` has no ``router_loss``, or there are no labels.
    """
    if getattr(outputs, "router_loss", None) is None:
        raise ValueError(
            f"outputs must have a router_loss, got None in {type(outputs).__name__}: call the model in training mode, "
            "with labels or without a cache, and with return_dict=True"
        )
    if labels is None and shift_labels is None:
        raise ValueError("labels must be a tensor, got None: the batches must have labels")
    logits, items = outputs.logits, num_items_in_batch
    assert logits is not None
    assert outputs.router_loss is not None
    if isinstance(items, int):
        items = torch.tensor(items)
    if shift_labels is not None:
        shift_labels = shift_labels.contiguous()
    cross_entropy: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=items, shift_labels=shift_labels
    )
    router_loss = outputs.router_loss.to(cross_entropy.device)
    if num_items_in_batch is not None:
        predicted = labels[..., 1:] if shift_labels is None else shift_labels
        router_loss = router_loss * ((predicted != -100).sum().to(cross_entropy.device) / num_items_in_batch)
    return cross_entropy + router_loss


class DynamicMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts (or one dense network), each with a norm before it and a residual around it."""

    def __init__(self, config: DynamicMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)  # type: ignore[arg-type]
        self.input_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _experts(config) if config.has_experts(layer_idx) else _dense(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, H]``; ``token_mask`` is bool ``[B, S]``, False for padding.

        Other arguments, the cache among them, are the attention's.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        x = self.post_attention_norm(hidden_states)
        y: Tensor = self.mlp(x, token_mask=token_mask) if isinstance(self.mlp, DynamicMoE) else self.mlp(x)
        return hidden_states + y


def _experts(config: DynamicMoEConfig) -> DynamicMoE:
    rule = TopPRouter if config.router_dtype == "float32" else ActivationDtypeTopPRouter
    router = rule(
        config.hidden_size,
        config.num_experts,
        p=float(config.top_p_threshold),
        max_experts=config.experts_topk if config.cap_experts else None,
        threshold_rule="released" if config.threshold_rule == "released" else "paper",
        init_std=config.initializer_range,
    )
    return DynamicMoE(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        router=router,
        init_std=config.initializer_range,
    )


def _dense(config: DynamicMoEConfig) -> SharedExpert:
    return SharedExpert(config.hidden_size, config.intermediate_size, init_std=config.initializer_range)


class DynamicMoEPreTrainedModel(PreTrainedModel):
    """What the models share: initialization, what they support, and loading of released checkpoints."""

    config: DynamicMoEConfig
    config_class = DynamicMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynamicMoEDecoderLayer"]  # noqa: RUF012  lists, not tuples, in every model of Transformers
    _skip_keys_device_placement = list(NAMES)  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(Router, index=Routing._fields.index("scores")),
        "hidden_states": DynamicMoEDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (SwiGLUExperts, SharedExpert, Router)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model, also one in the released format; see the base class.

        A local folder in the released format is checked before anything is loaded.

        Raises
        ------
        ValueError
            If such a folder lacks a tensor, has one too many, one of the wrong shape or dtype, or a file that is cut
            off; the message names the tensor and the file.
        """
        check_if_released(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save with stacked experts, as the model holds them; see the base class.

        With ``save_original_format=True`` the tensors are those of the release, but the config.json is ours;
        :func:`~dynamic_moe.models.save_released` writes a folder that is the release's altogether.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})


def _with_router_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Replace in the outputs the scores of the routers, which are all that can be captured, by the logits in them."""

    @functools.wraps(forward)
    def with_router_logits(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if not isinstance(outputs, tuple):
            if outputs.router_logits is not None:
                outputs.router_logits = _logits_in(outputs.router_logits)
            return outputs
        return tuple(_logits_in(each) if isinstance(each, tuple) else each for each in outputs)

    return with_router_logits


def _logits_in(captured: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.logits if isinstance(each, RouterScores) else each for each in captured)


class DynamicMoEModel(DynamicMoEPreTrainedModel):
    """The decoder without a head: token ids ``[B, S]`` to hidden states ``[B, S, H]``."""

    def __init__(self, config: DynamicMoEConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DynamicMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @_with_router_logits
    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> DynamicMoEModelOutput:
        """Run the decoder.

        Parameters
        ----------
        input_ids, inputs_embeds : Tensor
            int64 ``[B, S]``, or ``[B, S, H]`` instead.
        attention_mask : Tensor, optional
            ``[B, past + S]``, 0 for padding; past is the number of tokens in the cache. Padding goes to no expert and
            enters no statistic and no loss. Further columns, for tokens to come, are not looked at. ``[1, past + S]``
            is for all sequences. (Masks with 4 dimensions work for the attention, and let every token be routed.)
        past_key_values, cache : Cache, optional
            Two names of one argument: the cache of keys and values.
        position_ids, use_cache, output_hidden_states, output_attentions, output_router_logits
            As in other models.

        Raises
        ------
        ValueError
            Unless exactly one of ``input_ids`` and ``inputs_embeds`` is given, at most one cache, and a mask that fits.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        cache = one_cache(past_key_values, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past
        attention_mask, token_mask = split_mask(attention_mask, inputs_embeds, cache)
        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                token_mask=token_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **named_cache,
                **kwargs,
            )
        return DynamicMoEModelOutput(last_hidden_state=self.norm(hidden_states), **named_cache)


def _router_losses(routings: CollectedRoutings, config: DynamicMoEConfig) -> dict[str, Tensor]:
    balance, entropy = losses.load_balancing(routings), losses.dynamic(routings)
    total = config.load_balancing_loss_coef * balance + config.dynamic_loss_coef * entropy.to(balance.device)
    return {"router_loss": total, "aux_loss": balance, "dynamic_loss": entropy}


class DynamicMoEForCausalLM(DynamicMoEPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DynamicMoEConfig) -> None:
        super().__init__(config)
        self.model = DynamicMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> DynamicMoECausalLMOutput:
        """Run the model; with labels, also compute the loss.

        Parameters
        ----------
        labels : Tensor, optional
            int64 ``[B, S]``, not shifted, -100 where there is nothing to predict. The loss is :func:`causal_lm_loss`,
            in training and in evaluation: set both coefficients of the configuration to 0 for the cross-entropy alone.
        output_router_logits : bool, optional
            Default: as the configuration says.
        logits_to_keep : int or Tensor
            Last positions, or indices, to compute logits of. Default: all.
        input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds, use_cache
            See :meth:`DynamicMoEModel.forward`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        cache = one_cache(past_key_values, cache)
        loss_options = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        with collect_routing(self.model) as routings:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_router_logits=output_router_logits,
                cache=cache,
                **kwargs,
            )
        named_cache: dict[str, Any] = {CACHE_NAME: outputs.cache}
        result = DynamicMoECausalLMOutput(
            logits=self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **named_cache,
        )
        if labels is not None or self.training or cache is None:
            for name, value in _router_losses(routings, self.config).items():
                result[name] = value
        if labels is not None:
            result["loss"] = causal_lm_loss(result, labels, **loss_options)
        return result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids; the cache may be given as ``past_key_values`` or ``cache``. See the base class."""
        return super().generate(*args, **with_one_cache(kwargs))  # type: ignore[misc]


class DynamicMoEForSequenceClassification(GenericForSequenceClassification, DynamicMoEPreTrainedModel):
    """The decoder with a linear classifier on the last token that is not padding."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> DynamicMoESequenceClassifierOutput:
        """Run the model; with labels ``[B]`` (float for regression), also compute the loss, with the router's losses.

        Other arguments are those of :meth:`DynamicMoEModel.forward`.
        """
        kwargs.pop("num_items_in_batch", None)
        kwargs = with_one_cache(kwargs)
        with collect_routing(self.model) as routings:
            outputs = super().forward(input_ids, labels=labels, return_dict=True, **kwargs)
        result = DynamicMoESequenceClassifierOutput(**outputs)
        if labels is not None or self.training or CACHE_NAME not in kwargs:
            for name, value in _router_losses(routings, self.config).items():
                result[name] = value
        if result.loss is not None:
            assert result.router_loss is not None
            result["loss"] = result.loss + result.router_loss
        return result
