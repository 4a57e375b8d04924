"""A frame of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from hsplitlora_flwr.transport.frames import (
    Activation,
    Failure,
    Finish,
    Finished,
    Frame,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
    Ping,
    Pong,
)


def every_frame(values: Tensor, scale: Tensor, number: float = 0.5, last: bool = True) -> list[Frame]:
    """With these numbers, ``(rows, tokens, hidden)``, on the wire."""
    rows, tokens, _ = values.shape
    ids = torch.arange(rows * tokens).reshape(rows, tokens)
    return [
        Activation(3, values, scale, ids % 2, ids - 100, rows, last, number),
        Activation(3, values, scale, ids % 2, torch.empty(0, dtype=torch.long), rows, last, number),
        Gradient(values, scale, number, -number),
        Hidden(values, scale),
        HiddenGradient(values, scale, number),
        Loss(number),
        Finish(number),
        Finished(),
        Failure("ValueError: ü"),
        Ping(ids.to(torch.uint8), tokens),
        Pong(torch.tensor(7, dtype=torch.uint8)),
    ]
