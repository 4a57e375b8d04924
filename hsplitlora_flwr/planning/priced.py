"""The server's memory, handed out to halves of the clients' own.

A byte of it has a price, the lowest at which all choices together fit: at a price every client takes the split, and the
ranks of its half, that are worth most beyond what they cost. What is left goes to one client after another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.bound import gains
from hsplitlora_flwr.planning.frontier import Frontier, add_block
from hsplitlora_flwr.planning.problem import Problem, Way

_HALVINGS = 60  # of the price
_FILLED = 64  # clients that may take what is left
_POINTS = 1000  # choices of a half that are kept
_SAME = 1e-12  # of a value, which is rounding


class Handed(NamedTuple):
    """What every client got: its split, ranks of its half, the value of all, and the price of a byte."""

    splits: Index
    ranks: Ranks
    value: float
    price: float


class _Chosen(NamedTuple):
    """``(clients,)`` each: split, choice of its frontier, and the server's bytes for both."""

    split: Index
    point: Index
    taken: Array


def half_frontiers(problem: Problem, way: Way) -> list[Frontier]:
    """The choices of ranks of one client's half, from every split up."""
    fronts: list[Frontier] = []
    front, splits = Frontier.empty(len(problem.block), 1, _POINTS), set(problem.splits.tolist())
    for block in range(problem.cost.num_blocks - 1, int(problem.splits[0]) - 1, -1):
        front = add_block(front, problem, block, way.prices, way.inputs, problem.values, math.inf)
        if block in splits:
            fronts.insert(0, front)
    return fronts


class Market:
    """The clients and what the server has for them.

    Parameters
    ----------
    problem : Problem
    way : Way
        How the server serves.
    fronts : list of Frontier
        Of :func:`half_frontiers`.
    values, allowed : Array, NDArray[np.bool_]
        ``(clients, splits)``; what clients' ranks are worth below a split, and where they may be split.
    """

    def __init__(
        self, problem: Problem, way: Way, fronts: list[Frontier], values: Array, allowed: NDArray[np.bool_]
    ) -> None:
        self._problem, self._way, self._fronts = problem, way, fronts
        self._below = np.where(allowed, problem.share[:, None] * np.where(allowed, values, 0.0), -np.inf)
        self._corners = [_corners(front.cost[:, 0], front.value) for front in fronts]
        self._shares, self._share = np.unique(problem.share, return_inverse=True)

    def bound(self, price: float) -> float:
        """Nothing that can be handed out is worth more, whatever the price."""
        p, way = self._problem, self._way
        halves = gains(p, way.prices, way.inputs, price / np.maximum(self._shares, 1e-300))
        above = np.cumsum(halves[:, ::-1], axis=1)[:, ::-1][:, p.splits] * self._shares[:, None]
        reached = (self._below + above[self._share] - price * way.taken[p.splits]).max(axis=1)
        return float(reached.sum()) + (price * way.room if price else 0.0)

    def hand_out(self) -> Handed | None:
        """The best choices that were found; None where there is no room for them."""
        room, low, high = self._way.room, 0.0, 1e-18
        chosen = more = self._choose(0.0)
        if scarce := chosen.taken.sum() > room:
            while (chosen := self._choose(high)).taken.sum() > room:
                low, high, more = high, high * 1e3, chosen
                if high > 1e6:
                    return None
            for _ in range(_HALVINGS):
                price = math.sqrt(low * high) if low else high / 1e3
                tried = self._choose(price)
                if tried.taken.sum() > room:
                    low, more = price, tried
                else:
                    high, chosen = price, tried
                if high <= low * (1 + 1e-9):
                    break
            chosen = self._fill(chosen, more)
        each = list(zip(chosen.split.tolist(), chosen.point.tolist(), strict=True))
        ranks = np.stack([self._fronts[s].ranks[k] for s, k in each])
        value = sum(
            b[s] + share * self._fronts[s].value[k]
            for b, share, (s, k) in zip(self._below, self._problem.share, each, strict=True)
        )
        return Handed(chosen.split, ranks, float(value), high if scarce else 0.0)

    def _choose(self, price: float) -> _Chosen:
        p, clients = self._problem, np.arange(len(self._below))
        worth, taken = np.empty_like(self._below), np.empty_like(self._below)
        points = np.empty(worth.shape, np.intp)
        for s, (front, corners) in enumerate(zip(self._fronts, self._corners, strict=True)):
            cost, value = front.cost[corners, 0], front.value[corners]
            slopes = np.diff(value) / np.diff(cost)
            at = np.searchsorted(-slopes, -price / np.maximum(self._shares, 1e-300), "right")[self._share]
            points[:, s], taken[:, s] = corners[at], cost[at] + self._way.taken[p.splits[s]]
            worth[:, s] = self._below[:, s] + p.share * value[at]
        left = worth - price * taken
        best = left.max(axis=1, keepdims=True)
        # Of splits that are worth the same the lowest: its ranks serve the others too.
        split = (left >= best - _SAME * np.abs(best)).argmax(axis=1)
        return _Chosen(split, points[clients, split], taken[clients, split])

    def _fill(self, chosen: _Chosen, more: _Chosen) -> _Chosen:
        """What is left: first as a lower price would have it, then whatever is worth most to a client."""
        (split, point, taken), p = chosen, self._problem
        left = self._way.room - float(taken.sum())
        for i in np.flatnonzero(more.taken > taken).tolist():
            if (extra := float(more.taken[i] - taken[i])) <= left:
                split[i], point[i], taken[i], left = more.split[i], more.point[i], more.taken[i], left - extra
        for i in 2 * np.argsort(-p.share, kind="stable")[:_FILLED].tolist():
            room, best = left + float(taken[i]), (-math.inf, 0, 0, 0.0)
            for s in np.flatnonzero(np.isfinite(self._below[i])).tolist():
                front, fixed = self._fronts[s], float(self._way.taken[p.splits[s]])
                k = int(np.searchsorted(front.cost[:, 0], room - fixed, "right")) - 1
                if k >= 0:
                    value = float(self._below[i, s] + p.share[i] * front.value[k])
                    best = max(best, (value, s, k, float(front.cost[k, 0]) + fixed))
            _, split[i], point[i], taken[i] = best
            left = room - float(taken[i])
        return chosen


def _corners(cost: Array, value: Array) -> Index:
    """Indices of the choices that some price makes best, of a frontier by rising cost and value."""
    corners: list[int] = []
    for k in range(len(cost)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (value[b] - value[a]) * (cost[k] - cost[b]) > (value[k] - value[b]) * (cost[b] - cost[a]):
                break
            corners.pop()
        corners.append(k)
    return np.array(corners)
