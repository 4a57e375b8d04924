"""What a client's last reply must be before it counts.

A client's machine is not the server's. Whatever comes from it is held against the plan and against plain sense first,
so that a bad reply costs that client its round and nobody else anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from hsplitlora_flwr.control import Outcome, ReplyError
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.planning.planner import ClientPlan

TRAFFIC = ("bytes-up", "bytes-down")
TRAINING = ("resident-parameters", "measured-bytes", "tokens", "label-tokens", "seconds", "seconds-before", *TRAFFIC)
"""Figures that the summary needs of a client."""


def check_training(outcome: Outcome, layers: Iterable[Layer], plan: ClientPlan) -> None:
    """Raise :class:`ReplyError` unless the adapters are those of ``plan`` and finite.

    Parameters
    ----------
    layers : Iterable[Layer]
        All that may have an adapter.
    """
    below = (layer for layer in layers if layer.block < plan.split and plan.ranks.get(layer.name))
    expected = {
        layer.name: ((layer.out_features, plan.ranks[layer.name]), (plan.ranks[layer.name], layer.in_features))
        for layer in below
    }
    if expected != {name: (tuple(b.shape), tuple(a.shape)) for name, (b, a) in outcome.adapters.items()}:
        raise ReplyError("its adapters are not those of its plan")
    if not all(factor.isfinite().all() for pair in outcome.adapters.values() for factor in pair):
        raise ReplyError("its adapters are not finite; lower train.lr or set train.clip")
    _check_metrics(outcome, TRAINING)
    if not (outcome.losses and outcome.metrics["tokens"] and outcome.metrics["seconds"]):
        raise ReplyError("it says that it trained on nothing")


def check_scores(outcome: Outcome, names: Collection[str]) -> None:
    """Raise :class:`ReplyError` unless there is an importance of each of ``names``, and of nothing else."""
    _check_metrics(outcome, TRAFFIC)
    if outcome.importance.keys() != set(names):
        raise ReplyError("its scores are not those of the weights that it was to score")
    if wrong := [name for name, score in outcome.importance.items() if not 0 <= score < math.inf]:
        raise ReplyError(f"its importance of {wrong[0]} is {outcome.importance[wrong[0]]}; lower train.lr")


def check_evaluation(outcome: Outcome) -> None:
    """Raise :class:`ReplyError` unless the loss that it measured has a perplexity."""
    _check_metrics(outcome, ("nll", "label-tokens"))
    nll, tokens = outcome.metrics["nll"], outcome.metrics["label-tokens"]
    if not (tokens and nll / tokens < 700):  # beyond that the perplexity is beyond fp64
        raise ReplyError(f"a loss of {nll} over {tokens:.0f} tokens has no perplexity")


def _check_metrics(outcome: Outcome, names: Iterable[str]) -> None:
    for name in names:
        value = outcome.metrics.get(name, math.nan)
        if not 0 <= value < math.inf:
            raise ReplyError(f"it says {name}={value}")
