"""A penalty by which a client's adapters learn to make the cut activation depend less on the tokens.

The client adds to the loss, which is the server's, the squared distance correlation between the embeddings of its
tokens and what it sends for them (Vepakomma et al., "NoPeek", 2020). It is 0 if they are independent and 1 if one is a
scaled rotation of the other. Its gradient needs no server: it is added to the gradient of the cut activation. Only
directions count, not lengths, since a few tokens of every text have activations a hundred times as long as others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MOST = 256
"""Tokens of a micro-batch that are compared, evenly spread: every one is with every other."""


def penalty_gradient(sent: Tensor, embeddings: Tensor, attention_mask: Tensor, weight: float) -> Tensor:
    """The gradient of ``weight`` times the squared distance correlation.

    Parameters
    ----------
    sent : Tensor
        What leaves, ``(batch, seq, width)``.
    embeddings : Tensor
        Of its tokens, ``(batch, seq, hidden)``.
    attention_mask : Tensor
        ``(batch, seq)``; padding does not count.
    weight : float

    Returns
    -------
    Tensor
        Shaped as ``sent``, in its dtype.
    """
    leaf = sent.detach().requires_grad_()
    with torch.enable_grad():
        real = attention_mask.to(sent.device).bool()
        tokens, sources = leaf[real], embeddings.detach()[real]
        some = torch.linspace(0, len(tokens) - 1, min(MOST, len(tokens)), device=sent.device).long()
        found = distance_correlation(sources[some], tokens[some])
        (gradient,) = torch.autograd.grad(weight * found, leaf)
    return gradient


def distance_correlation(one: Tensor, other: Tensor) -> Tensor:
    """The squared distance correlation of directions, a scalar from 0 to 1.

    Parameters
    ----------
    one, other : Tensor
        ``(samples, features)`` each; features may be of different number.

    References
    ----------
    Székely, Rizzo, Bakirov, "Measuring and testing dependence by correlation of distances", 2007, definition 3.
    """
    exact = torch.promote_types(one.dtype, torch.float32)
    first, second = (_centred_distances(each.to(exact)) for each in (one, other))
    shared = (first * second).mean()
    spread = (first.square().mean() * second.square().mean()).sqrt()
    return shared / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def _centred_distances(samples: Tensor) -> Tensor:
    """``(samples, samples)``; rows and columns have the mean 0."""
    directions = functional.normalize(samples, dim=1)
    square = 2 - 2 * directions @ directions.T
    distances = square.clamp_min(torch.finfo(square.dtype).eps).sqrt()
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
