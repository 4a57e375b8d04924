"""From the tensors in files to the tensors of a model.

Files may name, merge, split or pack tensors otherwise than the model does. transformers keeps a table for every model
type, by which it renames, stacks, chunks and dequantises while it loads. The same table is used here, tensor by tensor,
so that a part of a model reads what it is made of and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that mean what they say; others are packed, and need scales."""


class PackedWeightsError(ValueError):
    """Weights are quantised in the files, and nothing here dequantises them."""


@dataclass(frozen=True)
class Recipe:
    """Tensors of a model, and the tensors in files that they are made of.

    Parameters
    ----------
    targets : tuple of str
        Names in the model. All come from one application of the converter.
    converter : WeightConverter, optional
        What makes them; None where the one source is the one target.
    sources : list of (str, str)
        Patterns of the converter, and the names in files that match them, in the order that it expects.
    """

    targets: tuple[str, ...]
    converter: WeightConverter | None = None
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def stored(self) -> list[str]:
        """The names in files."""
        return [name for _, name in self.sources]

    @property
    def dequantises(self) -> bool:
        """Whether the converter turns packed numbers and their scales into weights."""
        return any(hasattr(operation, "hf_quantizer") for operation in getattr(self.converter, "operations", ()))

    def make(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The targets by name; tensors without memory make ones without memory.

        Parameters
        ----------
        tensors : Mapping[str, Tensor]
            The sources, by their names in files.
        model : PreTrainedModel
            The whole model, which has the targets in their shapes and dtypes.

        Raises
        ------
        PackedWeightsError
            If a source is packed, and nothing here unpacks it.
        """
        wanted = model.get_parameter_or_buffer(self.targets[0]).dtype
        scaled = self.dequantises and len(self.sources) > 1
        for name in [] if scaled or not wanted.is_floating_point else self.stored:
            if tensors[name].dtype not in _NUMBERS:
                kind = str(tensors[name].dtype).removeprefix("torch.")
                raise PackedWeightsError(f"'{name}' is stored as {kind}, without the scales that make weights of it")
        if self.converter is None:
            return {self.targets[0]: tensors[self.stored[0]]}
        converter: Any = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            # transformers converts in the model's dtype, but for what knows how to dequantise
            tensor = tensors[name] if self.dequantises else tensors[name].to(wanted)
            converter.add_tensor(self.targets[0], name, pattern, tensor)
        made = converter.convert(self.targets[0], model=model, config=model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: found[name] for name in self.targets}


class Conversion:
    """Which tensors in files make which tensors of a model.

    Parameters
    ----------
    model : PreTrainedModel
        The whole model; it need not have memory.
    stored : Iterable[str]
        The names of all tensors in files; a renaming may depend on which there are.
    quantizer : HfQuantizer, optional
        Of :func:`find_dequantiser`.

    Attributes
    ----------
    recipes : dict[str, Recipe]
        By the name in the model. A tensor that is tied to another one may have none of its own.
    unread : list of str
        Names in files that the model has no tensor for.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str], quantizer: Any = None) -> None:
        state = model.state_dict()
        transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.recipes: dict[str, Recipe] = {}
        self.unread: list[str] = []
        for name in sorted(stored, key=dot_natural_key):
            first, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if first not in state and name in state:
                first, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
            if first not in state:
                self.unread.append(name)
                continue
            converter = converter_of[pattern] if pattern is not None else None
            patterns = converter.target_patterns if converter else [first]
            targets = tuple(first.replace(patterns[0], target) for target in patterns)
            recipe = self.recipes.get(first) or Recipe(targets, converter)
            if recipe.converter is not converter or (converter is None and recipe.sources):
                self.unread.append(name)
                continue
            recipe.sources.append((pattern or name, name))
            self.recipes |= dict.fromkeys(targets, recipe)


def parts_of(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration, and those inside it: of the text model, for instance."""
    inside = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in inside if isinstance(part, PretrainedConfig))]


def take_quantisation(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Remove from a configuration, and return, how its files are quantised: in memory the model is not."""
    found = [vars(part).pop("quantization_config", None) for part in parts_of(config)]
    settings: Any = next(filter(None, found), None)
    return settings if settings is None or isinstance(settings, Mapping) else settings.to_dict()


def find_dequantiser(quantisation: Mapping[str, Any]) -> Any:
    """What makes weights of quantised files while they are read.

    Parameters
    ----------
    quantisation : Mapping[str, Any]
        The ``quantization_config`` of a configuration.

    Raises
    ------
    PackedWeightsError
        If transformers cannot do that for this way to quantise, on this machine.
    """
    method = str(quantisation.get("quant_method"))
    known: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    why = "transformers does not dequantise that while it loads"
    if known is not None and "dequantize" in signature(known).parameters:
        try:
            settings = known.from_dict({**quantisation, "dequantize": True})
            quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
            quantizer.validate_environment()
            return quantizer
        except Exception as error:  # each has its own, for libraries that are missing and settings that are wrong
            why = str(error).strip().partition("\n")[0]
    raise PackedWeightsError(f"its weights are quantised ({method}): {why}")
