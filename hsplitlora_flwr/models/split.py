"""A causal LM cut in two.

    input_ids -> [ embeddings | blocks 0 .. l-1 ] -> cut activation -> [ blocks l .. L-1 | norm | head ] -> loss
                            ClientModel                                             ServerModel

Each part is the model's own decoder with a shorter list of blocks, so masks, rotary positions and attention come from
the model's code and not from a copy of it. Two things happen on one side only:

- *Embeddings and positions.* The server's decoder gets the cut activation where embeddings would go. What it computes
  before its first block (position embeddings, scaling, dropout) is thrown away: a hook hands the cut activation itself
  to that block.
- *Norm and head.* They are absent from the client.

Parts share their tensors with the model they were cut from: cutting costs no memory, and one frozen base serves any
number of clients with different split points, each with adapters of its own (see :mod:`hsplitlora_flwr.lora.layers`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.models.families import Family, shorten

M = TypeVar("M", bound=nn.Module)

IGNORED = -100
"""Label of a position that is not predicted: prompt and padding."""


class ModelPart(nn.Module):
    """What both parts have: some blocks of a model, and its linear layers by absolute name.

    Attributes
    ----------
    family : Family
        The layout of the model.
    first_block : int
        Index, in the whole model, of the first block held here.
    dtype : torch.dtype
        Of the frozen base, and so of the cut activation.
    """

    def __init__(self, family: Family, first_block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.family = family
        self.first_block = first_block
        self.dtype = dtype

    @property
    def decoder(self) -> PreTrainedModel:
        """The module that runs the blocks."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks held here."""
        blocks = self.decoder.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers of the blocks, by absolute name (for instance ``model.layers.7.self_attn.q_proj``).

        A layer that carries an adapter appears once, under the same name.
        """
        for offset, block in enumerate(self.blocks):
            inside = ""  # an adapted layer wraps another one: do not descend
            for name, module in block.named_modules():
                if is_linear(module) and not (inside and name.startswith(inside)):
                    inside = f"{name}."
                    yield f"{self.family.block_name(self.first_block + offset)}.{name}", module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the linear layer called ``name`` (absolute)."""
        prefix = f"{self.family.decoder}.{self.family.blocks}."
        index, _, inside = name.removeprefix(prefix).partition(".")
        self.blocks[int(index) - self.first_block].set_submodule(inside, module)

    def resident_parameters(self) -> int:
        """Number of base parameters held here; adapters do not count."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.endswith(("lora_A", "lora_B")))


class ClientModel(ModelPart):
    """Embeddings and blocks ``0 .. split - 1``."""

    def __init__(self, decoder: PreTrainedModel, family: Family, split: int) -> None:
        super().__init__(family, 0, decoder.dtype)
        self._decoder = decoder
        self.split = split

    @property
    def decoder(self) -> PreTrainedModel:
        return self._decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The cut activation.

        Parameters
        ----------
        input_ids : Tensor
            Token ids, int64, ``(batch, seq)``.
        attention_mask : Tensor
            1 for tokens and 0 for padding, int64, ``(batch, seq)``.

        Returns
        -------
        Tensor
            ``(batch, seq, hidden)`` in the dtype of the base.
        """
        outputs = self._decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        cut: Tensor = outputs.last_hidden_state
        return cut


@dataclass
class LossOutput:
    """Mean loss over the labelled tokens, and their number."""

    loss: Tensor
    tokens: int


class PredictingPart(ModelPart):
    """A part that ends in the model's norm and head, and so knows the loss."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family, first_block: int) -> None:
        super().__init__(family, first_block, causal_lm.dtype)
        self._causal_lm = causal_lm
        self._labelled: Tensor | None = None
        causal_lm.get_output_embeddings().register_forward_pre_hook(self._keep_labelled)

    @property
    def decoder(self) -> PreTrainedModel:
        decoder = self._causal_lm.get_submodule(self.family.decoder)
        assert isinstance(decoder, PreTrainedModel)
        return decoder

    def _loss(self, labels: Tensor, normalizer: int | None, **inputs: Tensor) -> LossOutput:
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        labelled = targets != IGNORED
        self._labelled = labelled
        try:
            # The head sees labelled positions only; prompt and padding never cost (tokens x vocabulary).
            logits = self._causal_lm(**inputs, use_cache=False).logits
        finally:
            self._labelled = None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tokens = int(labelled.sum())
        total = nn.functional.cross_entropy(logits, targets[labelled], reduction="sum")
        return LossOutput(total / (normalizer or max(tokens, 1)), tokens)

    def _keep_labelled(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._labelled is None:  # generation asks for its own positions
            return args
        hidden: Tensor = args[0]
        return (hidden[self._labelled], *args[1:])


class ServerModel(PredictingPart):
    """Blocks ``split .. L - 1``, the final norm, the head and the loss."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family, split: int) -> None:
        super().__init__(causal_lm, family, split)
        self.split = split
        self._cut: Tensor | None = None
        self.blocks[0].register_forward_pre_hook(self._enter_at_cut, with_kwargs=True)

    def forward(self, cut: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int | None = None) -> LossOutput:
        """The loss of a cut activation.

        Parameters
        ----------
        cut : Tensor
            The client's cut activation, ``(batch, seq, hidden)``.
        attention_mask : Tensor
            1 for tokens and 0 for padding, int64, ``(batch, seq)``.
        labels : Tensor
            The token ids where they are to be predicted and -100 elsewhere, int64, ``(batch, seq)``. They are shifted
            here: position ``t`` predicts ``labels[:, t + 1]``.
        normalizer : int, optional
            What the summed loss is divided by; the number of labelled tokens by default. The micro-batches of one batch
            pass the batch's number, so that their losses and gradients add up to the batch's.
        """
        self._cut = cut
        try:
            return self._loss(labels, normalizer, inputs_embeds=cut.detach(), attention_mask=attention_mask)
        finally:
            self._cut = None

    def _enter_at_cut(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._cut, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._cut}


class WholeModel(PredictingPart):
    """A model that is not cut, with the same linear layers by name: for methods without a split, and for evaluation."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family) -> None:
        super().__init__(causal_lm, family, 0)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self._causal_lm

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int | None = None
    ) -> LossOutput:
        """The loss of a batch; parameters as for :class:`ClientModel` and :class:`ServerModel`."""
        return self._loss(labels, normalizer, input_ids=input_ids, attention_mask=attention_mask)


class SplitError(ValueError):
    """A split point outside ``1 .. L - 1``."""


def check_split(config: PretrainedConfig, split: int) -> None:
    """Raise :class:`SplitError` unless ``1 <= split <= L - 1``."""
    last = config.num_hidden_layers - 1
    if not 1 <= split <= last:
        raise SplitError(
            f"split={split} is not possible: a {config.model_type} with {last + 1} blocks "
            f"can be cut after 1 to {last} of them"
        )


def client_part(model: PreTrainedModel, family: Family, split: int) -> ClientModel:
    """The client's part of ``model``, sharing its tensors."""
    check_split(model.config, split)
    decoder = _share(model.get_submodule(family.decoder))
    _keep_blocks(decoder, family, 0, split)
    for name in family.final:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, nn.Identity())
    assert isinstance(decoder, PreTrainedModel)
    return ClientModel(decoder, family, split)


def server_part(model: PreTrainedModel, family: Family, split: int) -> ServerModel:
    """The server's part of ``model``, sharing its tensors."""
    check_split(model.config, split)
    causal_lm = _share(model)
    decoder = causal_lm.get_submodule(family.decoder)
    _keep_blocks(decoder, family, split, model.config.num_hidden_layers)
    for name in family.embeddings:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, _Absent())
    return ServerModel(causal_lm, family, split)


def whole_model(model: PreTrainedModel, family: Family) -> WholeModel:
    """All of ``model`` as one part, sharing its tensors."""
    return WholeModel(_share(model), family)


class _Absent(nn.Module):
    """Stands where the other side's module was; what it returns is computed with and then thrown away."""

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return first if first.is_floating_point() and first.ndim == 3 else torch.zeros((), device=first.device)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear, GPT-2's Conv1D, or one of them with an adapter."""
    return isinstance(module, nn.Linear | Conv1D) or getattr(module, "is_adapted_linear", False)


def _share(module: M) -> M:
    """A copy of the module tree around the very same tensors, frozen."""
    module.requires_grad_(False)
    tensors: dict[int, Any] = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, tensors)


def _keep_blocks(decoder: nn.Module, family: Family, first: int, last: int) -> None:
    blocks = decoder.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    decoder.set_submodule(family.blocks, nn.ModuleList(list(blocks)[first:last]))
    config = decoder.config
    assert isinstance(config, PretrainedConfig)
    shorten(config, first, last)
