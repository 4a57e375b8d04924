"""The directions of a cut activation that matter for the loss, learnt from public text.

To second order a change ``d`` of an activation costs ``d^T F d`` of loss, with ``F`` the second moment of the loss's
gradient there. Of all bottlenecks of a width the one that costs least keeps the leading directions of
``F^(1/2) S F^(1/2)``, ``S`` being the covariance of the activations: those along which they both vary and matter. The
decoder is that of least squares.

The first token of a text is a matter of its own: in many models its activation is a hundred times as long as any other,
says nothing of the token, and everything above relies on it. One direction, the first, is there for it: a switch.

Codes are scaled so that noise of the same strength on all of their numbers costs the same loss, and a usual token's
has a norm of about 1: a ``split.clip`` of 1 suits every model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Batch, Tokens, evaluation_batches
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.transport.bottleneck import Bottleneck

ROWS = 8
"""Rows of one pass."""
MASSIVE = 5
"""A token is one of the massive ones whose norm is so many times the median."""
LEAST = 1e-6
"""Eigenvalues of the gradient's second moment count as no less than this share of the largest."""


def learn(base: SharedBase, rows: Sequence[Tokens], splits: Sequence[int], width: int) -> dict[int, Bottleneck]:
    """The bottlenecks of split points, one pass forward and back for all of them.

    Parameters
    ----------
    base : SharedBase
    rows : Sequence[Tokens]
        Public text, with labels.
    splits : Sequence[int]
        Rising.
    width : int
        Directions of each; no more than the hidden size.

    Returns
    -------
    dict[int, Bottleneck]
        By split point.
    """
    moments = [_Moments() for _ in splits]
    for batch in evaluation_batches(rows, ROWS):
        for moment, (cut, gradient) in zip(moments, _passed(base, batch, splits), strict=True):
            moment.add(cut[batch.attention_mask.bool()], gradient[batch.attention_mask.bool()])
    return {split: moment.bottleneck(width) for split, moment in zip(splits, moments, strict=True)}


def _passed(base: SharedBase, batch: Batch, splits: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The activations of a batch at every split point, ``(batch, seq, hidden)``, and the loss's gradients there."""
    with torch.no_grad():
        cut = base.client_part(splits[0]).eval()(batch.input_ids, batch.attention_mask)
    cuts = [cut.requires_grad_()]
    for split, after in pairwise(splits):
        cuts.append(base.middle_part(split, after).eval()(cuts[-1], batch.attention_mask))
    loss = base.server_part(splits[-1]).eval()(cuts[-1], batch.attention_mask, batch.labels, 1).loss
    yield from zip([cut.detach() for cut in cuts], torch.autograd.grad(loss, cuts), strict=True)


class _Moments:
    """First and second moments of a split point's activations, of massive tokens apart, and of gradients; fp64."""

    def __init__(self) -> None:
        self._usual, self._massive = _Sums(), _Sums()
        self._gradients = _Sums()

    def add(self, cut: Tensor, gradient: Tensor) -> None:
        """Count tokens, ``(tokens, hidden)`` each."""
        norm = torch.linalg.vector_norm(cut, dim=1)
        massive = norm > MASSIVE * norm.median()
        self._massive.add(cut[massive])
        self._usual.add(cut[~massive])
        self._gradients.add(gradient[~massive])

    def bottleneck(self, width: int) -> Bottleneck:
        """What is to be kept."""
        mean = self._usual.mean()
        covariance = self._usual.about(mean) / self._usual.count
        root = _root(self._gradients.outer / self._gradients.count)
        worth, kept = torch.linalg.eigh(root @ covariance @ root)
        worth, encoder = worth.flip(0).clamp_min(0), (root @ kept).flip(1)  # a column each
        scale = (worth / worth.sum()).sqrt()
        count, everything = self._usual.count + self._massive.count, self._usual.about(mean)
        if self._massive.count:
            everything = everything + self._massive.about(mean)
            encoder = torch.cat([(self._massive.mean() - mean)[:, None], encoder], dim=1)
            # so that a massive token's code is as long as another's
            scale = torch.cat([scale.new_tensor([(self._massive.count / count) ** 0.5]), scale])
        everything, encoder, scale = everything / count, encoder[:, :width], scale[:width]
        everything.diagonal().add_(LEAST * LEAST * everything.diagonal().mean())  # rounding must not make it singular
        # each uncorrelated with those before it, and of unit variance
        lower = torch.linalg.cholesky(encoder.T @ everything @ encoder)
        encoder = torch.linalg.solve_triangular(lower, encoder.T, upper=False)
        decoder = encoder @ everything
        scale = scale.clamp_min(LEAST)[:, None]
        matrices = (scale * encoder).float(), (decoder / scale).float()
        return Bottleneck(mean.float(), *matrices, switches=int(self._massive.count > 0))


class _Sums:
    """Of vectors, and of their outer products."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor = torch.zeros(())
        self.outer: Tensor = torch.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Count more, ``(number, hidden)``."""
        vectors = vectors.double().cpu()
        self.count += len(vectors)
        self._sum = self._sum + vectors.sum(0)
        self.outer = self.outer + vectors.T @ vectors

    def mean(self) -> Tensor:
        return self._sum / self.count

    def about(self, point: Tensor) -> Tensor:
        """The sum of outer products of what vectors differ from a point by."""
        cross = torch.outer(self._sum, point)
        return self.outer - cross - cross.T + self.count * torch.outer(point, point)


def _root(moment: Tensor) -> Tensor:
    """The symmetric square root of a positive matrix."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(float(values.max()) * LEAST).sqrt() @ vectors.T
    return root
