"""Pareto fronts of rank choices: which combinations of ranks are worth keeping for a knapsack.

A *choice* gives every layer a rank. It has a value, ``sum_m J_m log2(1 + r_m)``, and a cost in bytes, adapter
parameters and operations. Choices are built one layer after another: every rank of the layer is added to every choice
so far, and a choice that costs at least as much as another one and is worth no more is dropped.

That is exact while choices are few. Of many, two samples stay: the corners of the upper concave hull of value over
cost, each of which is the best choice at some price per unit of cost, and as many choices spread evenly over the front.
The hull of a sum is the sum of hulls, so the curve through the corners bounds the value of any choice, kept or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks

BYTES, PARAMETERS, OPERATIONS = range(3)
"""Columns of a cost: bytes of memory, adapter parameters, and operations of a step."""
SAME = 1e-12
"""Values that differ by less count as equal."""
_FEW = 300  # up to so many choices are compared pairwise, by all costs at once
_POINTS = 600  # most corners that stay, and most others


@dataclass(frozen=True)
class Frontier:
    """A set of choices of ranks, of which none dominates another.

    Parameters
    ----------
    cost : Array
        ``(choices, 3)``; see :data:`BYTES`.
    value : Array
        ``(choices,)``.
    ranks : Ranks
        ``(choices, layers)``.
    sides : tuple of int
        The columns of ``cost`` by which choices are compared; the others are carried along.
    whole : bool
        No choice was dropped that no other dominates, so the front is exact.
    lost : float
        By how much the curve through the kept corners may lie below the true hull.
    """

    cost: Array
    value: Array
    ranks: Ranks
    sides: tuple[int, ...] = (BYTES,)
    whole: bool = True
    lost: float = 0.0

    @classmethod
    def start(cls, layers: int, sides: tuple[int, ...] = (BYTES,), choices: int = 1) -> Frontier:
        """The front of one choice without any adapter, or (``choices=0``) of none."""
        return cls(np.zeros((choices, 3)), np.zeros(choices), np.zeros((choices, layers), np.uint8), sides)

    @classmethod
    def of(cls, fronts: Sequence[Frontier]) -> Frontier:
        """The union of fronts, not thinned."""
        cost, value, ranks = (np.concatenate([getattr(f, name) for f in fronts]) for name in ("cost", "value", "ranks"))
        whole, lost = all(f.whole for f in fronts), max(f.lost for f in fronts)
        return cls(cost, value, ranks, fronts[0].sides, whole, lost)

    def plus(self, cost: Array) -> Frontier:
        """The same choices, each with ``cost``, ``(3,)``, added."""
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
        """The front with the layers of one more block.

        Parameters
        ----------
        layers_by_input : dict[int, list[int]]
            The block's layers by the input that they read.
        items, values : Array
            ``(layers, ranks, 3)`` and ``(layers, ranks)``; cost and value of an adapter.
        inputs : Array
            ``(inputs,)``; bytes that the first adapter on an input adds, as autograd then keeps it.
        limit : Array
            ``(3,)``; choices that cost more are of no use to anybody.
        start : Frontier, optional
            The choice without adapters so far, where every choice of this front is to have at least one.
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
        """The front without what is dominated, in order of the first of ``sides``."""
        kept, whole, lost = self._select(self.cost, self.value, limit)
        return Frontier(self.cost[kept], self.value[kept], self.ranks[kept], self.sides, whole, lost)

    def _select(self, cost: Array, value: Array, limit: Array) -> tuple[Index, bool, float]:
        """Indices of the choices that stay, by rising cost of the first side, and the new ``whole`` and ``lost``."""
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

    # ------------------------------------------------------------------ the best choice within limits

    def best(self, limits: Array) -> Index:
        """The most valuable choice within each client's ``limits``, ``(clients, 3)``.

        Returns
        -------
        Index
            ``(clients,)``; index of the choice, -1 where none fits.
        """
        return _first_fitting(np.lexsort((self.cost[:, BYTES], -self.value)), self.cost, limits)

    def least(self, limits: Array, values: Array) -> Index:
        """The choice of the fewest operations that is worth at least ``values``, ``(clients,)``, within ``limits`` of
        bytes and parameters, ``(clients, 2)``; returned as by :meth:`best`."""
        worth = np.column_stack([self.cost[:, :OPERATIONS], -self.value])
        order = np.lexsort((-self.value, self.cost[:, OPERATIONS]))
        return _first_fitting(order, worth, np.column_stack([limits, SAME - values]))

    def bound(self, limits: Array) -> Array:
        """Upper bounds, ``(clients,)``, of what any choice within ``limits`` of bytes and parameters, ``(clients, 2)``,
        is worth, whether it was kept or not."""
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
    """``(clients,)``; the first choice in ``order`` within each client's limits, -1 where none fits.

    Clients whose limits lie between the same costs have the same answer, which is found once.
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
    """Indices of the Pareto front in one cost, by rising cost and value."""
    order = np.lexsort((-value, cost))
    best = np.maximum.accumulate(value[order])
    kept: Index = order[np.append(True, value[order][1:] > best[:-1] + SAME)[: len(order)]]
    return kept


def corners(cost: Array, value: Array) -> Index:
    """Indices of the corners of the upper concave hull, of choices by rising cost and value.

    Each corner is the best choice, value less price times cost, at some price.
    """
    kept = np.arange(len(cost))
    while len(kept) > 2:
        slope = np.diff(value[kept]) / np.diff(cost[kept])
        under = slope[1:] >= slope[:-1]  # on or below the line between its neighbours
        if not under.any():
            break
        kept = kept[np.concatenate([[True], ~under, [True]])]
    return kept


def _spread(index: Index, points: int) -> Index:
    """At most ``points`` of ``index``, evenly spread."""
    return index if len(index) <= points else index[np.linspace(0, len(index) - 1, points).astype(int)]
