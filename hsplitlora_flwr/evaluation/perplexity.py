"""Perplexity of held-out text: on the server under the whole model, and of a client's own text over the cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hsplitlora_flwr.copies import to_device, to_host
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.models.parts import ClientModel, HeadModel, WholeModel
from hsplitlora_flwr.training.cut import SeededCut
from hsplitlora_flwr.transport.codecs import pack, unpack
from hsplitlora_flwr.transport.frames import Activation, Frame, Hidden, Loss
from hsplitlora_flwr.transport.link import Link

MAX_NLL = 700.0
"""Nats per token, beyond which a perplexity is beyond fp64."""


@dataclass(frozen=True)
class Evaluation:
    """Summed negative log-likelihood in nats, and the number of labelled tokens that it is summed over.

    Parameters
    ----------
    nll : float
    tokens : int
    rows : Sequence[tuple[float, int]]
        Both of every row, in the order of :func:`hsplitlora_flwr.data.collate.evaluation_batches`, which is the same
        for the same text; empty where rows were not looked at.
    """

    nll: float
    tokens: int
    rows: Sequence[tuple[float, int]] = ()

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean per token, pooled over all text (not a mean of batches' perplexities)."""
        return math.exp(self.nll / self.tokens)

    def interval(self, share: float = 0.95, resamples: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of the perplexity over the rows: where it lies on as many rows, drawn with replacement.

        Percentiles of so many ``resamples``, which are the same in every run. It tells how far other text of the same
        kind may move the perplexity, not how far another seed may.
        """
        nll, tokens = np.array(self.rows).T
        drawn = np.random.default_rng(0).integers(len(nll), size=(resamples, len(nll)))
        mean = nll[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
        low, high = np.exp(np.quantile(mean, [(1 - share) / 2, (1 + share) / 2]))
        return float(low), float(high)


@torch.no_grad()
def evaluate(model: WholeModel, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate a whole model, in evaluation mode."""
    model.eval()
    device, threads = model.device, torch.get_num_threads()
    torch.set_num_threads(all_cores())  # no client trains now
    found: list[tuple[float, int]] = []
    for batch in batches:
        ids, mask = (to_device(each, device) for each in (batch.input_ids, batch.attention_mask))
        losses, rows = model.token_losses(ids, mask, batch.labels)
        sums = torch.zeros(len(ids), dtype=torch.float64, device=losses.device)
        sums.index_add_(0, to_device(rows, losses.device), losses.double())
        found += zip(to_host(sums).tolist(), rows.bincount(minlength=len(ids)).tolist(), strict=True)
    torch.set_num_threads(threads)
    return Evaluation(math.fsum(nll for nll, _ in found), sum(tokens for _, tokens in found), found)


class ClientEvaluator:
    """Measures a client's own text, forward only; the server computes the blocks above the cut.

    Parameters
    ----------
    model : ClientModel
        The client's part.
    head : HeadModel, optional
        Norm, head and loss, where labels stay with the client.
    batches : Sequence[Batch]
        The text.
    up, down : str
        Codecs, each way; see :func:`hsplitlora_flwr.transport.codecs.pack`.
    transform : SeededCut, optional
        What is done to the cut activation before it leaves.
    """

    def __init__(
        self,
        model: ClientModel,
        head: HeadModel | None,
        batches: Sequence[Batch],
        up: str = "float32",
        down: str | None = None,
        transform: SeededCut | None = None,
    ) -> None:
        self._model, self._head, self._batches, self._up = model.eval(), head and head.eval(), batches, up
        self._down, self._transform = down, transform
        self._device = model.device
        self._nll = 0.0

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @torch.no_grad()
    def ask(self, index: int) -> Activation:
        """A batch at the cut."""
        batch = self._batches[index]
        cut = self._model(*(to_device(each, self._device) for each in (batch.input_ids, batch.attention_mask)))
        if self._transform:
            cut = self._transform(cut, 0, index)
        labels = batch.labels if self._head is None else torch.empty(0, dtype=torch.int64)
        return Activation(0, *pack(cut, self._up), batch.attention_mask, labels, batch.label_tokens, True, 0.0)

    @torch.no_grad()
    def take(self, index: int, answer: Frame) -> None:
        """What the server answered: the loss, or the hidden state that it follows from."""
        if isinstance(answer, Hidden):
            assert self._head is not None
            shape = (*self._batches[index].input_ids.shape, int(self._model.decoder.config.hidden_size))
            state = unpack(answer.hidden, answer.scale, self._model.dtype, self._device, self._down, shape)
            self._nll += float(self._head(state, self._batches[index].labels, 1).loss)
        else:
            assert isinstance(answer, Loss)
            self._nll += answer.total

    def found(self) -> Evaluation:
        """The result, once every batch has its answer."""
        return Evaluation(self._nll, sum(batch.label_tokens for batch in self._batches))


def evaluate_client(evaluator: ClientEvaluator, link: Link) -> Evaluation:
    """Measure all of a client's text, together with the server behind ``link``."""
    for index in range(len(evaluator)):
        link.send(evaluator.ask(index))
        evaluator.take(index, link.receive())
    return evaluator.found()
