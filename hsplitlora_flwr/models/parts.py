"""The parts of a cut causal LM: what each side holds, and how a forward pass goes through it.

Each part is the model's own decoder, or the whole causal LM, with a shorter list of blocks, so masks, rotary positions,
attention and the scaling of logits come from the model's code and not from a copy of it. What a part does not hold is
skipped:

- *At the entrance.* A part above the client's gets a hidden state where embeddings would go. What the decoder computes
  before the first module of the part (position embeddings, scaling, dropout) is thrown away: a hook hands the hidden
  state itself to that module, a block or, in the head, the final norm (:class:`Entrance`).
- *At the exit.* The final norm of a part that ends before it does nothing.

:mod:`hsplitlora_flwr.models.split` cuts a model into parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.copies import to_device
from hsplitlora_flwr.models.families import Family
from hsplitlora_flwr.models.placement import device_of
from hsplitlora_flwr.models.quantisation import QuantisedLinear

M = TypeVar("M", bound=nn.Module)
IGNORED = -100
"""Label of a position that is not predicted: prompt and padding."""
CHUNK = 256
"""Positions whose logits are there at one time."""


class ModelPart(nn.Module):
    """What all parts have: some blocks of a model, and their linear layers by absolute name.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder with these blocks, or, in a part that ends in the head, the causal LM around it.
    family : Family
        The layout of the model.
    first_block : int
        Index, in the whole model, of the first block held here.

    Attributes
    ----------
    family : Family
        The layout of the model.
    first_block : int
        Index, in the whole model, of the first block held here.
    dtype : torch.dtype
        Of the frozen base, and so of the cut activation.
    """

    def __init__(self, model: PreTrainedModel, family: Family, first_block: int) -> None:
        super().__init__()
        self._model = model
        self.family = family
        self.first_block = first_block
        self.dtype = model.dtype

    @property
    def decoder(self) -> PreTrainedModel:
        """The module that runs the blocks."""
        return self._model

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks held here."""
        blocks = self.decoder.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def device(self) -> torch.device:
        """Where its input goes."""
        return device_of(self.blocks[0] if self.first_block and self.blocks else self)

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers of the blocks, by absolute name (for instance ``model.layers.7.self_attn.q_proj``).

        Those that take no adapter are left out.

        A layer that carries an adapter appears once, under the same name.
        """
        for offset, block in enumerate(self.blocks):
            inside = ""  # an adapted layer wraps another one: do not descend
            for name, module in block.named_modules():
                if name in self.family.unadapted:
                    continue
                if is_linear(module) and not (inside and name.startswith(inside)):
                    inside = f"{name}."
                    yield f"{self.family.block_name(self.first_block + offset)}.{name}", module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the linear layer called ``name`` (absolute)."""
        prefix = f"{self.family.decoder}.{self.family.blocks}."
        index, _, inside = name.removeprefix(prefix).partition(".")
        self.blocks[int(index) - self.first_block].set_submodule(inside, module)

    def resident_parameters(self) -> int:
        """Number of base parameters held here, quantised ones included; adapters do not count."""
        plain = sum(p.numel() for name, p in self.named_parameters() if not name.endswith(("lora_A", "lora_B")))
        return plain + sum(
            module.out_features * module.in_features for module in self.modules() if isinstance(module, QuantisedLinear)
        )


class ClientModel(ModelPart):
    """Embeddings and blocks ``0 .. split - 1``."""

    def __init__(self, decoder: PreTrainedModel, family: Family, split: int) -> None:
        super().__init__(decoder, family, 0)
        self.split = split

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
        outputs = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        cut: Tensor = outputs.last_hidden_state
        return cut


class Entrance:
    """Where a forward pass begins inside a model: hands a hidden state to a module in place of what came before it."""

    def __init__(self, module: nn.Module) -> None:
        self._hidden: Tensor | None = None
        module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)

    @contextmanager
    def at(self, hidden: Tensor) -> Iterator[Tensor]:
        """Forward passes inside go on from ``hidden``; what they are to get as ``inputs_embeds`` is yielded."""
        self._hidden = hidden
        try:
            yield hidden.detach()
        finally:
            self._hidden = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._hidden is None:  # generation takes the usual way
            return args, kwargs
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._hidden}


class Shortcut:
    """Where a forward pass leaves a decoder: hands on a hidden state in place of what came out of it.

    The decoder runs the first time alone, to say what its output is like besides.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._output: Any = None

    @contextmanager
    def at(self, hidden: Tensor) -> Iterator[None]:
        """Forward passes inside go on from ``hidden`` behind the decoder."""
        forward = self._decoder.forward

        def leave(*args: Any, **kwargs: Any) -> Any:
            if self._output is None:
                with torch.no_grad():
                    self._output = forward(*args, **kwargs)
            return type(self._output)(**{**self._output, "last_hidden_state": hidden})

        self._decoder.forward = leave
        try:
            yield
        finally:
            self._decoder.forward = forward


class BodyModel(ModelPart):
    """Blocks and nothing else.

    From ``split`` to the last one they are the server's part where the labels stay with the client.
    """

    def __init__(self, decoder: PreTrainedModel, family: Family, split: int) -> None:
        super().__init__(decoder, family, split)
        self.split = split
        self._entrance = Entrance(self.blocks[0])

    def forward(self, cut: Tensor, attention_mask: Tensor) -> Tensor:
        """The hidden state of the last block held here, before any norm behind it.

        Parameters
        ----------
        cut : Tensor
            The client's cut activation, ``(batch, seq, hidden)``.
        attention_mask : Tensor
            1 for tokens and 0 for padding, int64, ``(batch, seq)``.

        Returns
        -------
        Tensor
            ``(batch, seq, hidden)`` in the dtype of the base.
        """
        with self._entrance.at(cut) as inputs:
            outputs = self._model(inputs_embeds=inputs, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden


@dataclass
class LossOutput:
    """Mean loss over the labelled tokens, and their number."""

    loss: Tensor
    tokens: int


class PredictingPart(ModelPart):
    """A part that ends in the model's norm and head, and so knows the loss.

    The head sees labelled positions only, and :data:`CHUNK` of them at a time: there is never a number for every token
    and word of the vocabulary.
    """

    def __init__(self, causal_lm: PreTrainedModel, family: Family, first_block: int) -> None:
        super().__init__(causal_lm, family, first_block)
        self._behind_decoder = Shortcut(self.decoder)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model inside, without the blocks that are not held here."""
        return self._model

    @property
    def decoder(self) -> PreTrainedModel:
        decoder = self._model.get_submodule(self.family.decoder)
        assert isinstance(decoder, PreTrainedModel)
        return decoder

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The losses of positions behind the final norm.

        Parameters
        ----------
        hidden : Tensor
            ``(positions, hidden)`` in the dtype of the base.
        targets : Tensor
            The tokens to predict, int64, ``(positions,)``.

        Returns
        -------
        Tensor
            Cross-entropy in fp32 or above, ``(positions,)``.
        """
        pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        if any(parameter.requires_grad for parameter in self._model.get_output_embeddings().parameters()):
            return torch.cat([self._losses_at_once(*piece) for piece in pieces])
        return torch.cat([frozen_losses(*piece, self._losses_at_once) for piece in pieces])

    def _losses_at_once(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(hidden)
        return token_losses(logits, to_device(targets, logits.device)).to(hidden.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        """``(positions, vocab)`` as the model computes them, whatever it does before and behind the head."""
        blocks = self.blocks
        self.decoder.set_submodule(self.family.blocks, nn.ModuleList())  # positions are rows of one token here
        try:
            with self._behind_decoder.at(hidden[:, None]):
                logits: Tensor = self._model(**self._anything(hidden), use_cache=False).logits
        finally:
            self.decoder.set_submodule(self.family.blocks, blocks)
        return logits[:, 0]

    def _anything(self, hidden: Tensor) -> dict[str, Tensor]:
        """An input of one token a row that suits the model; what the decoder makes of it is thrown away."""
        return {"inputs_embeds": hidden.new_zeros(len(hidden), 1, int(self.decoder.config.hidden_size))}

    def _loss(self, hidden: Tensor, labels: Tensor, normalizer: int | None) -> LossOutput:
        losses, _ = self._token_losses(hidden, labels)
        return LossOutput(losses.sum() / (normalizer or max(len(losses), 1)), len(losses))

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(batch, seq, hidden)``: the loss of every labelled token, and the row of the batch that it is in."""
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1).flatten()
        places = (targets != IGNORED).nonzero()[:, 0]  # of labels on the host no device is asked
        labelled = hidden.flatten(0, 1).index_select(0, to_device(places, hidden.device))
        return self.losses(labelled, targets[places]), places // labels.shape[1]

    def _decode(self, **inputs: Tensor) -> Tensor:
        """``(batch, seq, hidden)`` behind the final norm."""
        hidden: Tensor = self.decoder(**inputs, use_cache=False).last_hidden_state
        return hidden


class _FrozenHead(torch.autograd.Function):
    """Losses of a few positions, with their gradients on the way forward, so that no logits wait for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, losses: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return losses(hidden, targets)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            each = losses(leaf, targets)
            (gradient,) = torch.autograd.grad(each.sum(), leaf)  # row by row, as no loss sees another position
        ctx.save_for_backward(gradient)
        return each.detach()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * weights[0][:, None]).to(gradient.dtype), None, None


def frozen_losses(hidden: Tensor, targets: Tensor, losses: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``losses(hidden, targets)``, of which nothing but the gradient of ``hidden`` is kept for backward."""
    result: Tensor = _FrozenHead.apply(hidden, targets, losses)  # type: ignore[no-untyped-call]
    return result


class ServerModel(PredictingPart):
    """Blocks ``split .. L - 1``, the final norm, the head and the loss."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family, split: int) -> None:
        super().__init__(causal_lm, family, split)
        self.split = split
        self._entrance = Entrance(self.blocks[0])

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
            here: position ``t`` predicts ``labels[:, t + 1]``. Best on the host: elsewhere their device is waited for.
        normalizer : int, optional
            What the summed loss is divided by; the number of labelled tokens by default. The micro-batches of one batch
            pass the batch's number, so that their losses and gradients add up to the batch's.
        """
        return self._loss(self._above(cut, attention_mask), labels, normalizer)

    def token_losses(self, cut: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every labelled token, and where it stands; parameters as for a forward pass.

        Returns
        -------
        losses : Tensor
            ``(tokens,)`` in fp32 or above, row by row.
        rows : Tensor
            The row of the batch that each token is in, int64, ``(tokens,)``, where the labels are.
        """
        return self._token_losses(self._above(cut, attention_mask), labels)

    def _above(self, cut: Tensor, attention_mask: Tensor) -> Tensor:
        with self._entrance.at(cut) as inputs:
            return self._decode(inputs_embeds=inputs, attention_mask=attention_mask)


class HeadModel(PredictingPart):
    """The final norm, the head and the loss, without a block: on the client, where its labels stay."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family, first_block: int) -> None:
        super().__init__(causal_lm, family, first_block)
        final = (getattr(self.decoder, name, None) for name in family.final)
        norm = next((module for module in final if module is not None), None)
        self._entrance = Entrance(norm) if norm else None

    def forward(self, hidden: Tensor, labels: Tensor, normalizer: int | None = None) -> LossOutput:
        """The loss of a hidden state; ``labels`` and ``normalizer`` as for :class:`ServerModel`.

        Parameters
        ----------
        hidden : Tensor
            What :class:`BodyModel` gives, ``(batch, seq, hidden)``.
        """
        return self._loss(self.norm(hidden), labels, normalizer)

    def norm(self, hidden: Tensor) -> Tensor:
        """What the model does between its last block and its head; shapes as they come."""
        if self._entrance is None:
            return hidden
        with self._entrance.at(hidden) as inputs:
            return self._decode(inputs_embeds=inputs)


class WholeModel(PredictingPart):
    """A model that is not cut, with the same linear layers by name: for methods without a split, and for evaluation."""

    def __init__(self, causal_lm: PreTrainedModel, family: Family) -> None:
        super().__init__(causal_lm, family, 0)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int | None = None
    ) -> LossOutput:
        """The loss of a batch; parameters as for :class:`ClientModel` and :class:`ServerModel`."""
        return self._loss(self._decode(input_ids=input_ids, attention_mask=attention_mask), labels, normalizer)

    def token_losses(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every labelled token, and the row that it is in, as :meth:`ServerModel.token_losses`."""
        return self._token_losses(self._decode(input_ids=input_ids, attention_mask=attention_mask), labels)

    def _anything(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"input_ids": hidden.new_zeros(len(hidden), 1, dtype=torch.long)}


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of ``(tokens, vocab)`` logits for ``(tokens,)`` targets, in fp32 or above; ``(tokens,)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear, GPT-2's Conv1D, one of them quantised, or with an adapter."""
    return isinstance(module, nn.Linear | Conv1D | QuantisedLinear) or getattr(module, "is_adapted_linear", False)
