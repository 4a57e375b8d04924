"""Reading labels off the gradients of a client that keeps them (``split.labels=client``).

The server computed the hidden state ``h`` that enters the client's norm, head and loss, gets the gradient of the loss
with respect to it, and has copies of norm and head. The gradient at a position is ``J^T (W^T p - w_y)`` divided by the
number of labelled tokens, which the client states. ``J`` (of the norm) and the probabilities ``p`` follow from ``h``.
What is left is ``J^T w_y``, which belongs to exactly one token ``y``. So no training, public text or guess is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import IGNORED, Tokens, evaluation_batches
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.models.parts import HeadModel
from hsplitlora_flwr.models.split import head_part
from hsplitlora_flwr.transport.codecs import pack, unpack

ROWS = 4
"""Rows of one batch."""
CANDIDATES = 32
"""Tokens whose gradient is compared with the one that came."""


@dataclass(frozen=True)
class LabelLeakage:
    """What was read off the gradients.

    Parameters
    ----------
    recovered : float
        Share of the labels that were named right.
    labels : int
        How many there were.
    tokens : int
        All tokens of the text; without ``split.labels=client`` the server has the labels among them anyway.
    """

    recovered: float
    labels: int
    tokens: int


def measure_labels(base: SharedBase, rows: Sequence[Tokens], codec: str = "float32") -> LabelLeakage:
    """Attack the gradients of these rows' losses, as they travel by a codec."""
    head, body, first = head_part(base.model, base.family), base.body_part(1).eval(), base.client_part(1).eval()
    head.eval()
    right = labels = 0
    for batch in evaluation_batches(rows, ROWS):
        with torch.no_grad():
            hidden = body(first(batch.input_ids, batch.attention_mask), batch.attention_mask)
        state = hidden.detach().requires_grad_()
        head(state, batch.labels, batch.label_tokens).loss.backward()
        assert state.grad is not None
        came = unpack(*pack(state.grad, codec), hidden.dtype, hidden.device, codec)
        targets = torch.cat([batch.labels[:, 1:], torch.full_like(batch.labels[:, :1], IGNORED)], dim=1)
        said = targets != IGNORED
        found = labels_from_gradients(head, _head_weights(base), hidden[said], came[said] * batch.label_tokens)
        right, labels = right + int((found == targets[said]).sum()), labels + int(said.sum())
    return LabelLeakage(right / labels, labels, sum(map(len, rows)))


def labels_from_gradients(head: HeadModel, weights: Tensor, hidden: Tensor, gradients: Tensor) -> Tensor:
    """The labels ``(positions,)`` of losses with these gradients.

    Parameters
    ----------
    head : HeadModel
        Norm, head and loss.
    weights : Tensor
        The head's, ``(vocabulary, hidden)``.
    hidden : Tensor
        ``(positions, hidden)``, what the losses are of.
    gradients : Tensor
        Of each position's own loss, shaped as ``hidden``.
    """
    some = torch.zeros(len(hidden), dtype=torch.int64)
    leaf = hidden.detach().requires_grad_()
    (of_some,) = torch.autograd.grad(head.losses(head.norm(leaf), some).sum(), leaf)
    left = of_some - gradients + _through_norm(head, hidden, weights[some])  # J^T w_y
    likely = (left @ weights.T / torch.linalg.vector_norm(weights, dim=1)).topk(min(CANDIDATES, len(weights))).indices
    distances = [
        torch.linalg.vector_norm(_through_norm(head, hidden, weights[each]) - left, dim=1) for each in likely.unbind(1)
    ]
    best = torch.stack(distances, dim=1).argmin(1, keepdim=True)
    found: Tensor = likely.gather(1, best)[:, 0]
    return found


def _through_norm(head: HeadModel, hidden: Tensor, vectors: Tensor) -> Tensor:
    """``J^T v`` of the norm, position by position."""
    leaf = hidden.detach().requires_grad_()
    (product,) = torch.autograd.grad(head.norm(leaf), leaf, vectors)
    return product


def _head_weights(base: SharedBase) -> Tensor:
    weights: Tensor = base.model.get_output_embeddings().get_parameter("weight")
    return weights.detach()
