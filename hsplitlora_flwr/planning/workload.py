"""What a training step works on, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hsplitlora_flwr.lora.optimizers import OPTIMIZERS
from hsplitlora_flwr.planning.budget import PlanError

LABELS = ("server", "client")
"""Who may hold the labels, and with them the final norm and the head."""
HALVES = ("shared", "per_client")
"""Whose the server's adapters are: one half that every client's step trains, or one for each client."""


@dataclass(frozen=True)
class Workload:
    """What one training step works on.

    Parameters
    ----------
    batch_size, sequence_length : int
        Rows of one micro-batch and tokens of its longest row, to which the others are padded.
    dtype : str
        Dtype of the frozen base.
    optimizer : str
        Optimizer of the adapters: a name in :data:`hsplitlora_flwr.lora.optimizers.OPTIMIZERS`.
    momentum : bool
        Whether SGD keeps a momentum buffer.
    labels : {"server", "client"}
        Who holds the labels, and with them the final norm, the head and the loss.
    in_flight : int
        Micro-batches of a client whose activations are kept at the same time. A server that computes the loss holds the
        activations of one of them.
    quantise : {"none", "8bit", "4bit"}
        How the linear layers of the blocks store their weights; products are computed in ``dtype``.
    passes : int, optional
        Clients whose activations the server keeps at the same time; all of them when None. A shared half serves one.
    half : {"shared", "per_client"}
        Whether the server has one adapter per weight, or one per weight and client.
    width : int
        Numbers per token that cross the cut, with a bottleneck; 0 sends the whole hidden state.
    scored : bool
        Whether weights are scored in some of the steps.

    Raises
    ------
    PlanError
        If a value is not one of these.
    """

    batch_size: int
    sequence_length: int
    dtype: str = "float32"
    optimizer: str = "adamw"
    momentum: bool = False
    labels: str = "server"
    in_flight: int = 1
    quantise: str = "none"
    passes: int | None = None
    half: Literal["shared", "per_client"] = "shared"
    width: int = 0
    scored: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise PlanError(f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        if self.labels not in LABELS:
            raise PlanError(f"labels={self.labels!r} is not possible; choose one of {', '.join(LABELS)}")
        if self.half not in HALVES:
            raise PlanError(f"half={self.half!r} is not possible; choose one of {', '.join(HALVES)}")
        if self.in_flight < 1:
            raise PlanError(f"in_flight={self.in_flight!r} is out of range; at least 1")
        if self.passes is not None and self.passes < 1:
            raise PlanError(f"passes={self.passes!r} is out of range; at least 1, or None for all clients")

    @property
    def adapter_parameter_bytes(self) -> int:
        """Bytes per adapter parameter: its value (fp32, or fp64 over fp64), its gradient and the optimizer's states."""
        optimizer = OPTIMIZERS[self.optimizer]
        return self.adapter_item * (2 + optimizer.states + (optimizer.momentum and self.momentum))

    @property
    def item(self) -> int:
        """Bytes of a number of the base."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def adapter_item(self) -> int:
        """Bytes of a number of an adapter."""
        return max(self.item, 4)
