"""The optimizers of adapters: how each is made, and how many states it keeps per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.config.names import KNOWN_OPTIMIZERS
from hsplitlora_flwr.registry import Registry


def _anywhere(train: TrainConfig, rates: float, entries: int) -> float:
    return math.inf


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of adapters; both sides of the cut make one each.

    Parameters
    ----------
    make : Callable[[Sequence[nn.Parameter], TrainConfig], torch.optim.Optimizer]
        Makes it over parameters, from the settings. The learning rate of its groups (``lr``) is set before every step,
        and what it keeps of a parameter is tensors and numbers, which may go on in another process.
    states : int
        Tensors as large as the parameter that it keeps of each: what it costs in memory.
    momentum : bool
        It keeps one more where ``train.momentum`` is set.
    farthest : Callable[[TrainConfig, float, int], float]
        The farthest, as a Frobenius norm, that it moves a tensor of so many entries over steps whose learning rates add
        up to the second argument, whatever the gradients are. The server refuses updates that went farther; without it
        there is no such bound.
    """

    make: Callable[[Sequence[nn.Parameter], TrainConfig], torch.optim.Optimizer]
    states: int
    momentum: bool = False
    farthest: Callable[[TrainConfig, float, int], float] = _anywhere


OPTIMIZERS: Registry[Optimizer] = KNOWN_OPTIMIZERS
"""Optimizers by name."""


def register_optimizer(name: str, optimizer: Optimizer) -> Optimizer:
    """Make an optimizer known as ``train.optimizer=<name>``; returns it.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return OPTIMIZERS.register(name, optimizer)


_BETAS = 0.9, 0.999
"""Of AdamW: how much of the past the means of the gradient and of its square keep."""


def _adamw(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=train.lr, betas=_BETAS, weight_decay=train.weight_decay)


def _adamw_farthest(train: TrainConfig, rates: float, entries: int) -> float:
    """By the inequality of Cauchy and Schwarz a step moves an entry by no more than the learning rate times
    ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``, which is 7.3."""
    b1, b2 = _BETAS
    return rates * (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2)) * math.sqrt(entries)


def _sgd(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay, momentum=train.momentum)


def _sgd_farthest(train: TrainConfig, rates: float, entries: int) -> float:
    """A step is as long as its gradient, which clipping bounds, and momentum adds up to ``1 / (1 - momentum)`` of
    them; with both momentum and weight decay nothing bounds it."""
    if not train.clip or (train.momentum and train.weight_decay):
        return math.inf
    return rates * train.clip / (1 - train.momentum)


register_optimizer("adamw", Optimizer(_adamw, states=2, farthest=_adamw_farthest))
register_optimizer("sgd", Optimizer(_sgd, states=0, momentum=True, farthest=_sgd_farthest))
