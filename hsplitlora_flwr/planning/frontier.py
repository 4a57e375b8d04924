"""What a set of ranks costs and is worth: the choices that no other beats, found layer after layer.

A frontier starts with no adapter at all. :func:`add_layer` offers every rank of one more layer to every choice, and
drops what costs as much as another choice and is worth no more. So it is exact until there are too many choices; then
those that stand out most stay (:func:`select`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.problem import Problem

_PAIRS = 300  # choices with several costs that are compared each with each
_SAME = 1e-12  # values that differ by less are alike


@dataclass(frozen=True)
class Frontier:
    """Choices of ranks.

    Parameters
    ----------
    cost : Array
        ``(choices, costs)``; bytes first, then what else is limited.
    value : Array
        ``(choices,)``.
    ranks : Ranks
        ``(choices, layers)``.
    counted : int
        How many of the costs may make up for each other; the others are carried along.
    points : int
        Choices that are kept.
    whole : bool
        Nothing was thinned out, so that the best choice is among these.
    """

    cost: Array
    value: Array
    ranks: Ranks
    counted: int
    points: int
    whole: bool = True

    @classmethod
    def empty(cls, layers: int, counted: int, points: int) -> Frontier:
        """No adapter; costs are bytes and parameters."""
        return cls(np.zeros((1, 2)), np.zeros(1), np.zeros((1, layers), np.uint8), counted, points)


def add_block(
    front: Frontier, problem: Problem, block: int, prices: Array, inputs: Array, values: Array, limit: float
) -> Frontier:
    """Offer the ranks of all layers of a block.

    Parameters
    ----------
    prices, values : Array
        ``(layers, ranks)``; what a rank costs in bytes, and is worth.
    inputs : Array
        ``(inputs,)``; bytes that the first adapter on an input adds.
    limit : float
        Bytes that no choice may exceed.
    """
    for number, layers in problem.by_block[block].items():
        opened = replace(front, cost=front.cost + np.array([inputs[number], 0.0])) if inputs[number] else front
        for m in layers:
            cost = np.stack([prices[m], problem.parameters[m]], axis=1)
            opened = add_layer(opened, m, cost, values[m], limit)
        front = join([front, opened], limit) if inputs[number] else opened
    return front


def add_layer(front: Frontier, layer: int, cost: Array, values: Array, limit: float) -> Frontier:
    """Offer the ranks of a layer; ``cost`` is ``(ranks, costs)``, ``values`` is ``(ranks,)``, of rank 0 first."""
    costs = (front.cost[:, None] + cost).reshape(-1, cost.shape[1])
    value = (front.value[:, None] + values).ravel()
    kept, whole = select(costs, value, limit, front.counted, front.points)
    parent, rank = np.divmod(kept, len(values))
    ranks = front.ranks[parent]
    ranks[:, layer] = rank
    return replace(front, cost=costs[kept], value=value[kept], ranks=ranks, whole=front.whole and whole)


def join(fronts: list[Frontier], limit: float) -> Frontier:
    """The choices of all that no other beats."""
    first = fronts[0]
    cost, value = np.concatenate([f.cost for f in fronts]), np.concatenate([f.value for f in fronts])
    kept, whole = select(cost, value, limit, first.counted, first.points)
    ranks = np.concatenate([f.ranks for f in fronts])[kept]
    return replace(first, cost=cost[kept], value=value[kept], ranks=ranks, whole=whole and all(f.whole for f in fronts))


def select(cost: Array, value: Array, limit: float, counted: int, points: int) -> tuple[Index, bool]:
    """Indices of the choices that stay, and whether they are all that no other beats.

    With one cost they are in the order of it, and of their value.
    """
    within = np.flatnonzero(cost[:, 0] <= limit)
    cost, value = cost[within, :counted], value[within]
    if counted == 1:
        kept = _unbeaten(cost[:, 0], value)
        return within[_thinned(kept, cost[:, 0], value, points)], len(kept) <= points
    if len(within) <= _PAIRS:
        order = np.lexsort((-value, *cost.T[::-1]))
        c, v = cost[order], value[order]
        beaten = np.tril((v[None] >= v[:, None] - _SAME) & (c[None] <= c[:, None]).all(axis=2), -1).any(axis=1)
        return within[order[~beaten]], True
    sides = (cost[:, side] for side in range(counted))
    chosen = [_thinned(_unbeaten(side, value), side, value, points // counted) for side in sides]
    return within[np.unique(np.concatenate(chosen))], False


def _unbeaten(cost: Array, value: Array) -> Index:
    """Indices, by rising cost and value."""
    order = np.argsort(cost, kind="stable")
    value = value[order]
    best = np.maximum.accumulate(value)
    kept: Index = order[np.concatenate([[True], value[1:] > best[:-1] + _SAME])[: len(order)]]
    return kept


def _thinned(index: Index, cost: Array, value: Array, points: int) -> Index:
    """Of every stretch of a frontier the choice that stands out most, and both ends."""
    if len(index) <= points:
        return index
    cost, value = cost[index], value[index]
    rise = np.concatenate([np.geomspace(1e-3, 1, points // 2), np.linspace(0, 1, points // 2)])
    edges = np.unique(np.searchsorted(value, value[0] + rise * (value[-1] - value[0])))
    edges = edges[edges < len(index) - 1]
    stretch = np.searchsorted(edges, np.arange(len(index)), "right") - 1
    last = np.append(edges[1:], len(index) - 1)
    slope = (value[last] - value[edges]) / np.maximum(cost[last] - cost[edges], _SAME)
    order = np.lexsort((value - slope[stretch] * cost, stretch))
    best = order[np.append(np.flatnonzero(np.diff(stretch[order])), len(order) - 1)]
    kept: Index = index[np.union1d(best, [0, len(index) - 1])]
    return kept
