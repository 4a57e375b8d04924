"""A causal LM from its configuration, without a checkpoint."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def build_causal_lm(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, experts: str | None = None
) -> PreTrainedModel:
    """A causal LM with random weights, or with none inside ``accelerate.init_empty_weights``.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model; it is not changed.
    dtype : torch.dtype
        Of the weights.
    experts : str, optional
        How experts of a mixture are computed, as transformers names it. By default they multiply in groups, and one by
        one in float64, which has no product of groups.
    """
    if experts is None and dtype == torch.float64:
        experts = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype, experts_implementation=experts
    )
    return model
