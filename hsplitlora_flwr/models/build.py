"""A causal LM from its configuration, without a checkpoint."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def build_causal_lm(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM with random weights, or with none inside ``accelerate.init_empty_weights``.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model; it is not changed.
    dtype : torch.dtype
        Of the weights. Mixtures of experts multiply in groups where that exists, and in float64 expert by expert.
    """
    experts = "eager" if dtype == torch.float64 else None
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype, experts_implementation=experts
    )
    return model
