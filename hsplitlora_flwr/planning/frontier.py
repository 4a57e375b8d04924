"""Choices of ranks that no other beats, found layer after layer.

Every rank of a layer is offered to every choice so far; what costs as much as another choice and is worth no more is
dropped. That is exact while choices are few. Of many, the corners of the curve of value over cost stay, which are best
at some price, and a sample of the rest. Corners of a sum are sums of corners: so the curve through them bounds what any
choice is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks

BYTES, PARAMETERS, OPERATIONS = range(3)
"""Columns of a cost; operations are those of a step."""
SAME = 1e-12
"""Values that differ by less are alike."""
_FEW = 300  # choices that are compared each with each
_POINTS = 600  # corners that stay, and as many others


@dataclass(frozen=True)
class Frontier:
    """Choices of ranks.

    Parameters
    ----------
    cost : Array
        ``(choices, 3)``; see :data:`BYTES`.
    value : Array
        ``(choices,)``.
    ranks : Ranks
        ``(choices, layers)``.
    sides : tuple of int
        Columns of ``cost`` by which choices are compared.
    whole : bool
        Nothing was dropped but what another choice beats.
    lost : float
        What the curve through the corners may be too low by.
    """

    cost: Array
    value: Array
    ranks: Ranks
    sides: tuple[int, ...] = (BYTES,)
    whole: bool = True
    lost: float = 0.0

    @classmethod
    def start(cls, layers: int, sides: tuple[int, ...] = (BYTES,), choices: int = 1) -> Frontier:
        """The choice of no adapter at all, or no choice."""
        return cls(np.zeros((choices, 3)), np.zeros(choices), np.zeros((choices, layers), np.uint8), sides)

    @classmethod
    def of(cls, fronts: Sequence[Frontier]) -> Frontier:
        """The choices of all."""
        cost, value, ranks = (np.concatenate([getattr(f, name) for f in fronts]) for name in ("cost", "value", "ranks"))
        whole, lost = all(f.whole for f in fronts), max(f.lost for f in fronts)
        return cls(cost, value, ranks, fronts[0].sides, whole, lost)

    def plus(self, cost: Array) -> Frontier:
        """The same choices at a higher cost, ``(3,)``."""
        return replace(self, cost=self.cost + cost)

    def with_block(
        self,
        layers_by_input: dict[int, list[int]],
        items: Array,
        inputs: Array,
        values: Array,
        limit: Array,
        start: Frontier | None = None,
    ) -> Frontier:
        """Offer the ranks of all layers of a block.

        Parameters
        ----------
        items, values : Array
            ``(layers, ranks, 3)`` and ``(layers, ranks)``; what a rank costs and is worth.
        inputs : Array
            ``(inputs,)``; bytes that the first adapter on an input adds.
        limit : Array
            ``(3,)``; choices that cost more are of no use.
        start : Frontier, optional
            That of no adapter yet, where choices must have one.
        """
        front = self
        for number, layers in layers_by_input.items():
            opening = np.array([inputs[number], 0.0, 0.0])
            opened, begun = front.plus(opening), start and start.plus(opening)
            for m in layers:
                opened = opened._with_layer(m, items[m], values[m], limit, begun)
            front = Frontier.of([front, opened]).thinned(limit) if inputs[number] else opened
        return front

    def _with_layer(self, layer: int, cost: Array, values: Array, limit: Array, start: Frontier | None) -> Frontier:
        parents = Frontier.of([start, self]) if start else self
        pairs = np.arange(1 if start else 0, parents.value.size * values.size)  # without rank 0 for the start
        parent, rank = np.divmod(pairs, values.size)
        kept, whole, lost = parents._select(
            parents.cost[parent] + cost[rank], parents.value[parent] + values[rank], limit
        )
        parent, rank = parent[kept], rank[kept]
        ranks = parents.ranks[parent]
        ranks[:, layer] = rank
        return Frontier(
            parents.cost[parent] + cost[rank], parents.value[parent] + values[rank], ranks, self.sides, whole, lost
        )

    def thinned(self, limit: Array) -> Frontier:
        """The choices that stay."""
        kept, whole, lost = self._select(self.cost, self.value, limit)
        return Frontier(self.cost[kept], self.value[kept], self.ranks[kept], self.sides, whole, lost)

    def _select(self, cost: Array, value: Array, limit: Array) -> tuple[Index, bool, float]:
        """Indices of the choices that stay, and the new ``whole`` and ``lost``. By one side they are in its order."""
        if len(self.sides) > 1 and len(value) <= _FEW:
            order = np.lexsort((-value, *cost.T[::-1]))
            c, v = cost[order], value[order]
            beaten = np.tril((v >= v[:, None] - SAME) & (c <= c[:, None]).all(axis=2), -1).any(axis=1)
            return order[~beaten], self.whole, self.lost
        points, lost = _POINTS // len(self.sides), 0.0
        stay: list[Index] = []
        whole = self.whole and len(self.sides) == 1
        for side in self.sides:
            line = _unbeaten(cost[:, side], value)
            if len(line) <= points:
                stay.append(line)
                continue
            at = line[corners(cost[line, side], value[line])]
            at = at[: np.searchsorted(cost[at, side], limit[side], "right") + 1]  # and the first beyond
            line = line[(cost[line] <= limit).all(axis=1)]
            some, others = _spread(at, points), _spread(line, points)
            curve = np.interp(cost[at, side], cost[some, side], value[some])
            lost = max(lost, float((value[at] - curve).max(initial=0.0)))
            stay += [some, others]
            whole &= len(others) == len(line)
        kept = np.unique(np.concatenate(stay))
        return kept[np.argsort(cost[kept, self.sides[0]], kind="stable")], whole, self.lost + lost

    # ------------------------------------------------------------------ what clients, or servers, choose

    def best(self, limits: Array) -> Index:
        """``(clients,)``; the choice of the highest value within each client's ``limits``, ``(clients, 3)``; -1 where
        there is none."""
        return _first_fitting(np.lexsort((self.cost[:, BYTES], -self.value)), self.cost, limits)

    def least(self, limits: Array, values: Array) -> Index:
        """The same of the fewest operations for a value, ``(clients,)``, within ``limits``, ``(clients, 2)``."""
        worth = np.column_stack([self.cost[:, :OPERATIONS], -self.value])
        order = np.lexsort((-self.value, self.cost[:, OPERATIONS]))
        return _first_fitting(order, worth, np.column_stack([limits, SAME - values]))

    def bound(self, limits: Array) -> Array:
        """``(clients,)``; no choice within the limits, ``(clients, 2)``, is worth more, whether it was kept or not."""
        if self.whole:
            return np.append(self.value, -np.inf)[self.best(np.column_stack([limits, np.full(len(limits), np.inf)]))]
        bounds = np.full(len(limits), np.inf)
        for side in set(self.sides) - {OPERATIONS}:
            line = _unbeaten(self.cost[:, side], self.value)
            line = line[corners(self.cost[line, side], self.value[line])]
            curve = np.interp(limits[:, side], self.cost[line, side], self.value[line])
            bounds = np.minimum(bounds, curve + self.lost)
        return bounds


def _first_fitting(order: Index, cost: Array, limits: Array) -> Index:
    """``(clients,)``; the first choice in ``order`` within each client's limits, -1 where there is none.

    Choices are compared once for all clients whose limits lie between the same ones.
    """
    levels = [np.searchsorted(np.sort(side), limit, "right") for side, limit in zip(cost.T, limits.T, strict=True)]
    alike = np.ravel_multi_index(levels, (len(cost) + 1,) * len(levels))
    _, one, of = np.unique(alike, return_index=True, return_inverse=True)
    fits = np.ones((len(one), len(cost)), bool)
    for side, limit in zip(cost[order].T, limits[one].T, strict=True):
        fits &= side <= limit[:, None]
    found: Index = np.where(fits.any(axis=1), order[fits.argmax(axis=1)], -1)[of]
    return found


def _unbeaten(cost: Array, value: Array) -> Index:
    """Indices of what costs less than all that is worth as much, by rising cost and value."""
    order = np.lexsort((-value, cost))
    best = np.maximum.accumulate(value[order])
    kept: Index = order[np.append(True, value[order][1:] > best[:-1] + SAME)[: len(order)]]
    return kept


def corners(cost: Array, value: Array) -> Index:
    """Indices of the choices that some price makes best, of choices by rising cost and value."""
    kept = np.arange(len(cost))
    while len(kept) > 2:
        slope = np.diff(value[kept]) / np.diff(cost[kept])
        under = slope[1:] >= slope[:-1]  # the line between its neighbours
        if not under.any():
            break
        kept = kept[np.concatenate([[True], ~under, [True]])]
    return kept


def _spread(index: Index, points: int) -> Index:
    """As many of them at most, evenly."""
    return index if len(index) <= points else index[np.linspace(0, len(index) - 1, points).astype(int)]
