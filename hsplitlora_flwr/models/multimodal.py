"""The text decoder of a multimodal model, as a causal LM of its own.

For text alone, a multimodal model computes what its text decoder computes. So only the decoder is loaded and cut; the
parts for images and sound stay in the files. That both agree is proven on a tiny decoder inside the multimodal model's
own code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.families import Family, UnsupportedModelError, tiny_config
from hsplitlora_flwr.models.proof import brief, find_family


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a configuration holds that of a text decoder beside others."""
    return isinstance(getattr(config, "text_config", None), PretrainedConfig) and not config.is_encoder_decoder


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text decoder in a multimodal model, as a causal LM; of any other model its own.

    Raises
    ------
    UnsupportedModelError
        If the text decoder is no causal LM of its own in transformers.
    """
    if not is_multimodal(config):
        return config
    text: PretrainedConfig = copy.deepcopy(config.text_config)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is multimodal, and transformers has no causal language model for its "
            f"text decoder, '{text.model_type}'; name a text model"
        )
    tied = getattr(config, "tie_word_embeddings", None)
    if tied is not None:  # the head is the multimodal model's, and so is this
        text.tie_word_embeddings = tied
    return text


def stands_alone(config: PretrainedConfig) -> bool:
    """Whether transformers itself loads no more than the text decoder of a multimodal model as a causal LM."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return bool(causal_lm.config_class is type(config.text_config))


def whole_model_of(config: PretrainedConfig, text: PretrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The multimodal model of ``config`` around the text decoder of ``text``; its weights have no memory.

    Parameters
    ----------
    config, text : PretrainedConfig
        As they are read; neither is changed.
    dtype : str
        Of the weights.
    """
    config = copy.deepcopy(config)
    config.text_config = copy.deepcopy(text)
    kind = AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    return model


def names_in_whole(whole: PreTrainedModel, text: PreTrainedModel, family: Family) -> dict[str, str]:
    """How the parts of a text decoder are called in the multimodal model: the names there, by those in the causal LM.

    Parameters
    ----------
    whole : PreTrainedModel
        Of :func:`whole_model_of`.
    text : PreTrainedModel
        The causal LM of the same text configuration.
    family : Family
        Its layout.
    """
    kind = type(text.get_submodule(family.decoder))
    decoder = next(name for name, module in whole.named_modules() if type(module) is kind)
    return {family.decoder: decoder, _name_of_head(text): _name_of_head(whole)}


def name_in_whole(name: str, inside: Mapping[str, str]) -> str:
    """What a tensor of the causal LM is called in the multimodal model; ``inside`` is of :func:`names_in_whole`."""
    for own, there in inside.items():
        if name.startswith(f"{own}."):
            return there + name.removeprefix(own)
    return name


def _name_of_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def prove_text_decoder(config: PretrainedConfig) -> None:
    """Put a tiny text decoder into its multimodal model, and compare what the two make of a text.

    Parameters
    ----------
    config : PretrainedConfig
        Of the multimodal model.

    Raises
    ------
    UnsupportedModelError
        If the decoder cannot be split, or a logit differs by more than 1e-9.
    """
    if not is_multimodal(config):
        return
    decoder = text_config(config)
    family = find_family(decoder)
    if stands_alone(config):
        return
    input_ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            text = build_causal_lm(tiny_config(decoder), torch.float64).eval()
        whole = whole_model_of(config, text.config).eval()
        for name, inside in names_in_whole(whole, text, family).items():
            whole.set_submodule(inside, text.get_submodule(name))
        _fill(whole)
        with torch.no_grad():
            logits, expected = (model(**inputs, use_cache=False).logits for model in (text, whole))
    except Exception as error:  # whatever a foreign architecture throws
        raise _no_stand_in(config, f"the two could not be compared ({brief(error)})") from error
    if not torch.allclose(logits, expected, rtol=0, atol=1e-9):
        raise _no_stand_in(config, "the two make different things of a text")


def _fill(model: PreTrainedModel) -> None:
    """Give parameters without memory zeros, all of which are one number in memory: code asks for their device."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            path, _, attribute = name.rpartition(".")
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(model.get_submodule(path), attribute, nn.Parameter(zeros, requires_grad=False))


def _no_stand_in(config: PretrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model type '{config.model_type}' is multimodal, and its text decoder cannot stand for it: {why}; "
        "name a text model"
    )
