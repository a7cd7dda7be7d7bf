# SPDX-License-Identifier: Apache-2.0
"""Dynamic MoE language models for Hugging Face Transformers, and the checkpoints of the release.

Importing this module registers the model type ``dynamic_moe`` with the Auto classes, and imports
:mod:`dynamic_moe.integrations`.
"""

try:
    import transformers  # noqa: F401  for the error alone
except ImportError as error:
    raise ImportError(
        "dynamic_moe.models needs Hugging Face Transformers: pip install 'dynamic_moe[transformers]'"
    ) from error

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dynamic_moe.integrations  # noqa: F401  warns of an untested transformers, and restores p that was saved
from dynamic_moe.models.activation_router import ActivationDtypeTopPRouter
from dynamic_moe.models.configuration import DynamicMoEConfig
from dynamic_moe.models.modeling import (
    DynamicMoECausalLMOutput,
    DynamicMoEForCausalLM,
    DynamicMoEForSequenceClassification,
    DynamicMoEModel,
    DynamicMoEModelOutput,
    DynamicMoEPreTrainedModel,
    DynamicMoESequenceClassifierOutput,
    causal_lm_loss,
)
from dynamic_moe.models.released import register_released_format, save_released

__all__ = [
    "ActivationDtypeTopPRouter",
    "DynamicMoECausalLMOutput",
    "DynamicMoEConfig",
    "DynamicMoEForCausalLM",
    "DynamicMoEForSequenceClassification",
    "DynamicMoEModel",
    "DynamicMoEModelOutput",
    "DynamicMoEPreTrainedModel",
    "DynamicMoESequenceClassifierOutput",
    "causal_lm_loss",
    "save_released",
]

AutoConfig.register(DynamicMoEConfig.model_type, DynamicMoEConfig, exist_ok=True)
AutoModel.register(DynamicMoEConfig, DynamicMoEModel, exist_ok=True)
AutoModelForCausalLM.register(DynamicMoEConfig, DynamicMoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DynamicMoEConfig, DynamicMoEForSequenceClassification, exist_ok=True)
# Trainer shifts the labels of label_smoothing_factor for the classes in this table alone; register leaves it as it is.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DynamicMoEConfig.model_type] = DynamicMoEForCausalLM.__name__
register_released_format()
