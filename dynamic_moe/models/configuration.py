# SPDX-License-Identifier: Apache-2.0
"""The configuration of a Dynamic MoE language model, and how the released one is read and written."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from dynamic_moe.integrations.saved_top_p import KEY
from dynamic_moe.models.cache_names import NAMES

# What the released code computes with, whatever its config.json says (it reads these fields and does not use them).
_RELEASED_ROPE_THETA = 10000.0

# Fields of the released config.json that say nothing that a model needs to know.
_RELEASED_ONLY = {"pretraining_tp": 1, "auto_map": None, "rope_theta": None, "rope_scaling": None}


@strict
class DynamicMoEConfig(PreTrainedConfig):
    r"""Configuration of :class:`~dynamic_moe.models.DynamicMoEModel` and the models built on it.

    The fields of the released config.json (Huang et al. 2024) keep their names, meanings and defaults, except that
    ``num_experts`` has a default that works. A config.json of the release (``model_type`` "llama" with
    ``num_experts``) is read as it is; what the release ignores is then ignored here too: ``num_key_value_heads``
    (it has as many as ``num_attention_heads``), ``rope_theta`` (10000) and ``rope_scaling`` (none).

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads : int
        Sizes. An expert, and the dense network of a layer without experts, has width ``intermediate_size``.
    num_key_value_heads : int, optional
        Heads of keys and values; a divisor of ``num_attention_heads``. Default: as many.
    head_dim : int, optional
        Default ``hidden_size / num_attention_heads``.
    num_experts : int, default 16
        E, in each layer that has experts.
    expert_frequency : int, default 2
        Layer l has experts if l is a multiple of this, else one dense network. 1: every layer.
    top_p_threshold : float, default 0.4
        p, in (0, 1]; see :class:`~dynamic_moe.TopPRouter`.
    experts_topk : int, default 2
        Most experts of a token, **only if** ``cap_experts`` is set. The release has the field and never uses it.
    cap_experts : bool, default False
        Give no token more than ``experts_topk`` experts.
    threshold_rule : {"paper", "released"}, default "paper"
        Stop when the mass is at least p (the paper), or more than p (the released code).
    router_dtype : {"float32", "activations"}, default "float32"
        Arithmetic of the router. "activations" rounds the logits, the softmax and its partial sums to the dtype of the
        activations, as the released code does; for parity with it, in plain PyTorch.
    load_balancing_loss_coef : float, default 1e-2
        Scale of the load-balancing loss (the paper's alpha).
    dynamic_loss_coef : float, default 1e-4
        Scale of the dynamic loss, the entropy of the router (the paper's beta).
    output_router_logits : bool, default False
        Whether outputs have ``router_logits``.
    rope_parameters : dict, optional
        As in other models of Transformers; default ``{"rope_type": "default", "rope_theta": 10000.0}``.
    **other fields
        As in :class:`transformers.LlamaConfig`.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    model_type = "dynamic_moe"
    # Trainer gathers all other outputs of an evaluation as predictions.
    keys_to_ignore_at_inference = [*NAMES, "router_loss", "aux_loss", "dynamic_loss"]  # noqa: RUF012
    default_theta = _RELEASED_ROPE_THETA

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    num_experts: int = 16
    expert_frequency: int = 2
    top_p_threshold: float | int = 0.4
    experts_topk: int = 2
    cap_experts: bool = False
    threshold_rule: str = "paper"
    router_dtype: str = "float32"
    load_balancing_loss_coef: float | int = 1e-2
    dynamic_loss_coef: float | int = 1e-4
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and check them all."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        super().__post_init__(**kwargs)
        self.validate_architecture()  # the base class would wrap its ValueError into an error that is none

    def validate_architecture(self) -> None:
        """Raise a ValueError unless a model can be built; the base class calls it too."""
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_experts", "expert_frequency")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_key_value_heads is None or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads={self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )
        if not 0.0 < self.top_p_threshold <= 1.0:
            raise ValueError(f"top_p_threshold must be in (0, 1], got {self.top_p_threshold!r}")
        if self.cap_experts and not 1 <= self.experts_topk <= self.num_experts:
            raise ValueError(
                f"experts_topk must be in [1, num_experts={self.num_experts}] where cap_experts is set, "
                f"got {self.experts_topk}"
            )
        known = {
            "threshold_rule": ("paper", "released"),
            "router_dtype": ("float32", "activations"),
            "hidden_act": ("silu",),  # the only one that the experts have
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")

    @property
    def router_aux_loss_coef(self) -> float:
        """0.0: TRL's option of this name, with a loss for a fixed number of experts per token, is refused.

        Raises
        ------
        ValueError
            When it is set to anything else.
        """
        return 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        if value != 0.0:
            raise ValueError(
                "router_aux_loss_coef must be 0.0: it scales a loss for a fixed number of experts per token. Set "
                "load_balancing_loss_coef and dynamic_loss_coef, and give TRL compute_loss_func=causal_lm_loss; "
                f"got {value!r}"
            )

    def has_experts(self, layer: int) -> bool:
        """Whether layer number ``layer`` has experts; else it has one dense network."""
        return layer % self.expert_frequency == 0

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json, also one of the release; see the base class."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (from_released_fields(fields) if is_released(fields) else fields), unused


def is_released(fields: dict[str, Any]) -> bool:
    """Tell whether the fields of a config.json are those of the release, which calls itself a LLaMA."""
    return fields.get("model_type") == "llama" and "num_experts" in fields


def from_released_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of a released config.json into ours.

    Raises
    ------
    ValueError
        If ``num_experts`` is not positive; -1, the default of the release, cannot be built there either.
    """
    if not isinstance(fields["num_experts"], int) or fields["num_experts"] < 1:
        raise ValueError(f"num_experts must be at least 1 in the released config.json, got {fields['num_experts']!r}")
    ours = {name: value for name, value in fields.items() if name not in _RELEASED_ONLY}
    ours["model_type"] = DynamicMoEConfig.model_type
    ours["num_key_value_heads"] = None
    ours["rope_parameters"] = {"rope_type": "default", "rope_theta": _RELEASED_ROPE_THETA}
    if "architectures" in ours:
        ours["architectures"] = ["DynamicMoEForCausalLM"]
    return ours


def to_released_fields(config: DynamicMoEConfig) -> dict[str, Any]:
    """Translate a configuration into the fields of a released config.json.

    Raises
    ------
    ValueError
        If the release cannot express it: fewer heads for keys and values, another rotary embedding, biases, a cap,
        heads of another width, or a p that ``set_top_p`` set.
    """
    rope = config.rope_parameters or {}
    limits: dict[str, tuple[Any, Any]] = {
        "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_theta": (rope.get("rope_theta", _RELEASED_ROPE_THETA), _RELEASED_ROPE_THETA),
        "attention_bias": (config.attention_bias, False),
        "cap_experts": (config.cap_experts, False),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        KEY: (getattr(config, KEY, None), None),  # of set_top_p: unset_top_p(model), then set top_p_threshold
    }
    for name, (value, allowed) in limits.items():
        if value != allowed:
            raise ValueError(f"{name} must be {allowed!r} in the released format, got {value!r}")
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "num_experts",
        "experts_topk",
        "expert_frequency",
        "top_p_threshold",
    ]
    fields = {name: getattr(config, name) for name in names}
    dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "pretraining_tp": 1,
        "rope_theta": _RELEASED_ROPE_THETA,
        "rope_scaling": None,
        "torch_dtype": dtype,
    }
