"""Cutting a causal LM in two, or in three where the labels stay with the client.

    input_ids -> [ embeddings | blocks 0 .. l-1 ] -> cut activation -> [ blocks l .. L-1 | norm | head ] -> loss
                            ClientModel                                             ServerModel

    input_ids -> [ embeddings | blocks 0 .. l-1 ] -> cut activation -> [ blocks l .. L-1 ]
                            ClientModel                                      BodyModel
                                             loss <- [ norm | head ] <- hidden state of the last block
                                                        HeadModel

What a part is, and how a forward pass enters and leaves it, is :mod:`hsplitlora_flwr.models.parts`. Parts share their
tensors with the model that they were cut from: cutting costs no memory, and one frozen base serves any number of
clients with different split points, each with adapters of its own (:mod:`hsplitlora_flwr.lora.layers`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hsplitlora_flwr.models.families import Family, shorten
from hsplitlora_flwr.models.parts import BodyModel, ClientModel, HeadModel, M, ServerModel, WholeModel


class SplitError(ValueError):
    """A split point outside ``1 .. L - 1``."""


def check_split(config: PretrainedConfig, split: int) -> None:
    """Raise :class:`SplitError` unless ``1 <= split <= L - 1``."""
    last = config.num_hidden_layers - 1
    if last < 1:
        raise SplitError(
            f"split={split} is not possible: a model of one block cannot be cut; name one with two or more"
        )
    if not 1 <= split <= last:
        raise SplitError(
            f"split={split} is not possible: a {config.model_type} with {last + 1} blocks "
            f"can be cut after 1 to {last} of them"
        )


def client_part(model: PreTrainedModel, family: Family, split: int) -> ClientModel:
    """The client's part of ``model``, sharing its tensors."""
    check_split(model.config, split)
    return ClientModel(_bare_decoder(model, family, 0, split), family, split)


def one_block(model: PreTrainedModel, family: Family, index: int) -> ClientModel:
    """Block ``index`` of ``model`` alone, right behind the embeddings, sharing their tensors."""
    decoder = _share(model.get_submodule(family.decoder))
    _keep_blocks(decoder, family, index, index + 1, embeddings=True)
    _replace(decoder, family.final, _Through())
    assert isinstance(decoder, PreTrainedModel)
    return ClientModel(decoder, family, 1)


def outline(block: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """The names and shapes of a block's parameters."""
    return tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def body_part(model: PreTrainedModel, family: Family, split: int) -> BodyModel:
    """The server's part of ``model`` where the labels stay with the client, sharing its tensors."""
    check_split(model.config, split)
    return middle_part(model, family, split, model.config.num_hidden_layers)


def middle_part(model: PreTrainedModel, family: Family, first: int, last: int) -> BodyModel:
    """Blocks ``first .. last - 1`` of ``model``, sharing its tensors; ``first`` is at least 1."""
    return BodyModel(_bare_decoder(model, family, first, last), family, first)


def server_part(model: PreTrainedModel, family: Family, split: int) -> ServerModel:
    """The server's part of ``model``, sharing its tensors."""
    check_split(model.config, split)
    causal_lm = _share(model)
    _keep_blocks(causal_lm.get_submodule(family.decoder), family, split, model.config.num_hidden_layers)
    return ServerModel(causal_lm, family, split)


def head_part(model: PreTrainedModel, family: Family) -> HeadModel:
    """The final norm and the head of ``model``, sharing its tensors."""
    blocks = model.config.num_hidden_layers
    causal_lm = _share(model)
    _keep_blocks(causal_lm.get_submodule(family.decoder), family, blocks, blocks)
    return HeadModel(causal_lm, family, blocks)


def whole_model(model: PreTrainedModel, family: Family) -> WholeModel:
    """All of ``model`` as one part, sharing its tensors."""
    return WholeModel(_share(model), family)


class _Absent(nn.Module):
    """Stands where the other side's module was; what it returns is computed with and then thrown away."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return first if first.is_floating_point() and first.ndim == 3 else torch.zeros((), device=first.device)


class _Through(nn.Module):
    """Stands where the final norm was, and does nothing."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def _share(module: M) -> M:
    """A copy of the module tree around the very same tensors, frozen."""
    module.requires_grad_(False)
    tensors: dict[int, Any] = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, tensors)


def _bare_decoder(model: PreTrainedModel, family: Family, first: int, last: int) -> PreTrainedModel:
    """The decoder of ``model`` with blocks ``first .. last - 1``, which ends before the final norm."""
    decoder = _share(model.get_submodule(family.decoder))
    _keep_blocks(decoder, family, first, last)
    _replace(decoder, family.final, _Through())
    assert isinstance(decoder, PreTrainedModel)
    return decoder


def _keep_blocks(decoder: nn.Module, family: Family, first: int, last: int, *, embeddings: bool = False) -> None:
    """Drop all blocks but ``first .. last - 1``, and the embeddings where they lead to another block than the first.

    With ``embeddings`` they stay.
    """
    blocks = decoder.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    decoder.set_submodule(family.blocks, nn.ModuleList(list(blocks)[first:last]))
    config = decoder.config
    assert isinstance(config, PretrainedConfig)
    shorten(config, first, last)
    if first > 0 and not embeddings:
        _replace(decoder, family.embeddings, _Absent())


def _replace(decoder: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` in the place of those of ``names`` that this model has."""
    for name in names:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, module)
