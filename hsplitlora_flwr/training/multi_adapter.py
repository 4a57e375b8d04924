"""One pass over the server's base for all clients that wait: multi-adapter batching.

Activations of clients with different split points join the batch at their own block::

    blocks   3 .. 6          7 .. 9          10 .. L-1, norm, head
    client A  xxxxx  ------>  xxxxx  ------>  xxxxx   loss of A
    client B                  xxxxx  ------>  xxxxx   loss of B
    client C                                  xxxxx   loss of C

Between two split points the blocks are a part of the model as any other (:mod:`hsplitlora_flwr.models.split`), so masks
and positions are the model's own. Nobody waits for a client that is not there: whatever has arrived while a pass was
under way is the next one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from threading import Condition
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsplitlora_flwr.copies import to_device
from hsplitlora_flwr.lora.layers import AdaptedLinear, same_masks
from hsplitlora_flwr.lora.multi_adapter import AdapterBatch, Share, adapted_layers, batch_adapters
from hsplitlora_flwr.models.parts import IGNORED, BodyModel, ServerModel
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.server import MicroBatch, differentiate

log = logging.getLogger(__name__)


class Base(Protocol):
    """What parts are cut from, such as a :class:`hsplitlora_flwr.lora.base.SharedBase`."""

    def middle_part(self, first: int, last: int) -> BodyModel:
        """Blocks ``first .. last - 1``."""

    def server_part(self, split: int) -> ServerModel:
        """Blocks from ``split`` up, norm and head."""


class MultiAdapterPass:
    """Takes the micro-batches of several clients through the base together; used by the threads of all of them.

    Parameters
    ----------
    base : Base
        Its update must not change while this is in use.
    """

    def __init__(self, base: Base) -> None:
        self._base, self._checkpointing = base, False
        self._layers: dict[ServerModel, Mapping[str, AdaptedLinear]] = {}
        self._segments: list[tuple[BodyModel | ServerModel, AdapterBatch]] = []
        self._waiting: list[tuple[MicroBatch, Future[Tensor]]] = []
        self._busy = False
        self._changed = Condition()

    def enter(self, model: ServerModel, *, checkpointing: bool = False) -> None:
        """Let a client's part in, with its adapters on it; before its first micro-batch comes.

        One part with activation checkpointing makes the whole pass have it.
        """
        self._layers[model] = adapted_layers(model)
        self._checkpointing |= checkpointing
        self._segments = []

    def __call__(self, work: MicroBatch) -> Tensor:
        """As :func:`hsplitlora_flwr.training.server.differentiate`, together with whatever else waits."""
        result: Future[Tensor] = Future()
        with self._changed:
            self._waiting.append((work, result))
            self._changed.wait_for(lambda: result.done() or not self._busy)
            if result.done():
                return result.result()
            self._busy, batch, self._waiting = True, self._waiting, []
        try:
            self._serve(batch)
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        return result.result()

    def _serve(self, batch: Sequence[tuple[MicroBatch, Future[Tensor]]]) -> None:
        """Set all results: by one pass, or one by one where that fails, so that only the guilty one learns of it, and
        where a client's part is scored."""
        together = [each for each in batch if not each[0].alone]
        if len(together) > 1:
            works = [work for work, _ in together]
            try:
                with same_masks(work.model for work in works):  # so that one by one they drop the same
                    losses = self.differentiate(works)
            except Exception:  # whatever it is, such as too little memory for all at once
                log.warning("a pass for %d clients failed; they come one by one", len(together), exc_info=True)
            else:
                for (_, result), loss in zip(together, losses, strict=True):
                    result.set_result(loss)
                batch = [each for each in batch if each[0].alone]
        for work, result in batch:
            try:
                result.set_result(differentiate(work))
            except Exception as error:  # for the thread that waits for it
                result.set_exception(error)

    def differentiate(self, works: Sequence[MicroBatch]) -> list[Tensor]:
        """Losses of micro-batches of different clients; gradients of their cuts and adapters are accumulated.

        Nothing is accumulated if it fails.
        """
        ordered = sorted(works, key=lambda work: work.model.split)
        losses = [loss / work.normalizer for loss, work in zip(self._forward(ordered), ordered, strict=True)]
        leaves = [leaf for work in ordered for leaf in (work.cut, *_trained(work.model))]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        by_model = {work.model: loss.detach() for work, loss in zip(ordered, losses, strict=True)}
        return [by_model[work.model] for work in works]

    def _forward(self, works: Sequence[MicroBatch]) -> list[Tensor]:
        """Summed losses of micro-batches in the order of their split points."""
        length = max(work.cut.shape[1] for work in works)
        # No token sees what is right of it, so padding to the longest may count as tokens. As padding it could leave a
        # position that is far to the right with nothing in its sliding window, and some models make that nan.
        device, home = works[0].cut.device, works[0].labels.device
        masks = torch.cat([_padded(to_device(work.attention_mask, device), length, 1) for work in works])
        labels = torch.cat([_padded(work.labels.to(home), length, IGNORED) for work in works])
        entering: dict[int, list[MicroBatch]] = defaultdict(list)
        for work in works:
            entering[work.model.split].append(work)
        hidden = works[0].cut.new_empty(0, length, works[0].cut.shape[2])
        shares: list[Share] = []
        for part, batch in self._parts_from(works):
            new = entering[part.first_block]
            joining = (pad(work.cut, (0, 0, 0, length - work.cut.shape[1])) for work in new)
            hidden = torch.cat([tensor.to(part.device) for tensor in (hidden, *joining)])
            shares += [Share(len(work.cut), work.cut.shape[1], self._layers[work.model]) for work in new]
            batch.shares = list(shares)
            if isinstance(part, ServerModel):
                losses, rows = part.token_losses(hidden, masks.to(part.device), labels)
            else:
                hidden = part(hidden, masks[: len(hidden)].to(part.device))
        of_rows = rows.bincount(minlength=len(labels)).split([share.examples for share in shares])
        return [own.sum() for own in losses.split([int(each.sum()) for each in of_rows])]

    def _parts_from(self, works: Sequence[MicroBatch]) -> Iterator[tuple[BodyModel | ServerModel, AdapterBatch]]:
        """The model from the lowest split point of ``works`` up, in parts that begin at split points."""
        if not self._segments:
            self._segments = self._cut()
        lowest = works[0].model.split
        return ((part, batch) for part, batch in self._segments if part.first_block >= lowest)

    def _cut(self) -> list[tuple[BodyModel | ServerModel, AdapterBatch]]:
        splits = sorted({model.split for model in self._layers})
        parts: list[BodyModel | ServerModel] = [
            self._base.middle_part(first, last).train() for first, last in pairwise(splits)
        ]
        parts.append(self._base.server_part(splits[-1]).train())
        batches = [batch_adapters(part) for part in parts]
        for part in parts if self._checkpointing else ():
            checkpoint_blocks(part)
        return list(zip(parts, batches, strict=True))


def _trained(model: ServerModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _padded(tensor: Tensor, length: int, value: int) -> Tensor:
    return pad(tensor, (0, length - tensor.shape[1]), value=value)
