"""The server's memory, handed out to halves of the clients' own.

A byte of it has a price, the lowest at which all choices together fit: at a price every client takes the split, and the
ranks of its half, that are worth most beyond what they cost. What is left goes to one client after another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.frontier import BYTES, SAME, Frontier, corners
from hsplitlora_flwr.planning.problem import Problem, Way

_HALVINGS = 60  # of the price
_FILLED = 64  # clients that may take what is left


def fronts_above(
    problem: Problem, prices: Array, inputs: Array, values: Array, room: float, lowest: int = 0
) -> list[Frontier]:
    """The server's choices of ranks from every split up, the deepest split first, as far as the ``lowest``.

    Parameters
    ----------
    prices, values : Array
        ``(layers, ranks, 3)`` and ``(layers, ranks)``; what an adapter costs and is worth.
    inputs : Array
        ``(inputs,)``; bytes that the first adapter on an input adds.
    room : float
        Bytes that there are.
    """
    limit, front = np.array([room, math.inf, math.inf]), Frontier.start(len(problem.block))
    fronts = []
    for block in range(problem.cost.num_blocks - 1, int(problem.splits[lowest]) - 1, -1):
        front = front.with_block(problem.by_block[block], prices, inputs, values, limit)
        if block <= problem.splits[-1]:
            fronts.append(front)
    return fronts


class Chosen(NamedTuple):
    """``(clients,)`` each: split, choice of the half from there up, and the server's bytes for both."""

    split: Index
    choice: Index
    taken: Array


class Market:
    """Clients that buy bytes of the server's memory.

    Parameters
    ----------
    problem : Problem
    way : Way
        How the server serves.
    fronts : list of Frontier
        One client's choices of a half from every split up.
    below : Array
        ``(clients, splits)``; what clients' ranks are worth below a split; minus infinity where they may not be split.
    """

    def __init__(self, problem: Problem, way: Way, fronts: list[Frontier], below: Array) -> None:
        self._room, self._share, self._fronts = way.room, problem.share, fronts
        self._fixed = way.taken[problem.splits]
        self._below = np.where(
            np.isfinite(below), problem.share[:, None] * np.where(np.isfinite(below), below, 0.0), -np.inf
        )
        self._corners = [corners(front.cost[:, BYTES], front.value) for front in fronts]

    def sell(self) -> tuple[Chosen, float] | None:
        """What every client gets, and the price of a byte; None where not even halves without ranks find room."""
        low, high = 0.0, 1e-18
        chosen = more = self._at(0.0)
        if self._fits(chosen):
            return chosen, 0.0
        while not self._fits(chosen := self._at(high)):
            low, high, more = high, high * 1e3, chosen
            if high > 1e6:
                return None
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high) if low else high / 1e3
            if self._fits(tried := self._at(price)):
                high, chosen = price, tried
            else:
                low, more = price, tried
            if high <= low * (1 + 1e-9):
                break
        return self._fill(chosen, more), high

    def value(self, chosen: Chosen) -> float:
        """What the choices of all are worth."""
        above = [self._fronts[s].value[k] for s, k in zip(chosen.split.tolist(), chosen.choice.tolist(), strict=True)]
        return float(np.take_along_axis(self._below, chosen.split[:, None], 1).sum() + self._share @ above)

    def ranks(self, chosen: Chosen) -> Ranks:
        """``(clients, layers)``."""
        each = zip(chosen.split.tolist(), chosen.choice.tolist(), strict=True)
        return np.stack([self._fronts[s].ranks[k] for s, k in each])

    def bound(self, price: float) -> float:
        """Nothing that can be sold is worth more, whatever the price."""
        worth, _, _ = self._offers(price)
        lost = self._share[:, None] * [front.lost for front in self._fronts]
        return float((worth + lost).max(axis=1).sum()) + (price * self._room if price else 0.0)

    def _offers(self, price: float) -> tuple[Array, Index, Array]:
        """``(clients, splits)``; what the best half of each split is worth beyond its price, that choice, and bytes."""
        worth, taken, choice = (
            np.empty_like(self._below),
            np.empty_like(self._below),
            np.empty(self._below.shape, np.intp),
        )
        limit = price / np.maximum(self._share, 1e-300)
        for s, (front, corner) in enumerate(zip(self._fronts, self._corners, strict=True)):
            cost, value = front.cost[corner, BYTES], front.value[corner]
            at = np.searchsorted(-np.diff(value) / np.diff(cost), -limit, "right")
            choice[:, s], taken[:, s] = corner[at], cost[at] + self._fixed[s]
            worth[:, s] = self._below[:, s] + self._share * value[at] - price * taken[:, s]
        return worth, choice, taken

    def _at(self, price: float) -> Chosen:
        worth, choice, taken = self._offers(price)
        best, clients = worth.max(axis=1, keepdims=True), np.arange(len(worth))
        # Of splits that are worth the same the lowest: its ranks serve the others too.
        split = (worth >= best - SAME * np.abs(best)).argmax(axis=1)
        return Chosen(split, choice[clients, split], taken[clients, split])

    def _fits(self, chosen: Chosen) -> bool:
        return bool(chosen.taken.sum() <= self._room)

    def _fill(self, chosen: Chosen, more: Chosen) -> Chosen:
        """What is left: first as a lower price would have it, then whatever is worth most to a client."""
        split, choice, taken = chosen
        left = self._room - float(taken.sum())
        for i in np.flatnonzero(more.taken > taken).tolist():
            if (extra := float(more.taken[i] - taken[i])) <= left:
                split[i], choice[i], taken[i], left = more.split[i], more.choice[i], more.taken[i], left - extra
        for i in 2 * np.argsort(-self._share, kind="stable")[:_FILLED].tolist():
            room, best = left + float(taken[i]), (-math.inf, 0, 0, 0.0)
            for s in np.flatnonzero(np.isfinite(self._below[i])).tolist():
                front, fixed = self._fronts[s], float(self._fixed[s])
                k = int(np.searchsorted(front.cost[:, BYTES], room - fixed, "right")) - 1
                if k >= 0:
                    value = float(self._below[i, s] + self._share[i] * front.value[k])
                    best = max(best, (value, s, k, float(front.cost[k, BYTES]) + fixed))
            _, split[i], choice[i], taken[i] = best
            left = room - float(taken[i])
        return chosen
