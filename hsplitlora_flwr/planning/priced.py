"""The server's memory, divided between halves of the clients' own (``server.half=per_client``).

This is a knapsack with one constraint that all clients share, solved by Lagrangian relaxation: a byte of the server's
memory has a price, and at a given price every client takes the split, and the ranks of its half, that maximise their
value less what their bytes cost. Bisection finds the lowest price at which all choices together fit. What memory is
left then goes to one client after another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.frontier import BYTES, SAME, Frontier, corners
from hsplitlora_flwr.planning.problem import Problem, Serving

_HALVINGS = 60  # bisection steps of the price
_FILLED = 64  # most clients that are offered what is left


def fronts_above(
    problem: Problem, adapters: Array, inputs: Array, values: Array, room: float, lowest: int = 0
) -> list[Frontier]:
    """The Pareto fronts of the server's ranks from each split point up, the deepest split first.

    Parameters
    ----------
    adapters, values : Array
        ``(layers, ranks, 3)`` and ``(layers, ranks)``; cost and value of an adapter.
    inputs : Array
        ``(inputs,)``; bytes that the first adapter on an input adds.
    room : float
        Bytes that there are.
    lowest : int
        Index of the lowest split that is wanted.
    """
    limit, front = np.array([room, math.inf, math.inf]), Frontier.start(len(problem.block))
    fronts = []
    for block in range(problem.cost.num_blocks - 1, int(problem.splits[lowest]) - 1, -1):
        front = front.with_block(problem.by_block[block], adapters, inputs, values, limit)
        if block <= problem.splits[-1]:
            fronts.append(front)
    return fronts


class Chosen(NamedTuple):
    """For every client, ``(clients,)`` each: its split, the choice of its half's ranks in the front of that split, and
    the server's bytes for both."""

    split: Index
    choice: Index
    taken: Array


class PricedMemory:
    """The server's memory at a price per byte.

    Parameters
    ----------
    problem : Problem
    serving : Serving
        How the server serves.
    fronts : list of Frontier
        The choices of one client's half, by split.
    below : Array
        ``(clients, splits)``; value of the ranks below a split; minus infinity where the client cannot have that split.
    """

    def __init__(self, problem: Problem, serving: Serving, fronts: list[Frontier], below: Array) -> None:
        self._room, self._share, self._fronts = serving.room, problem.share, fronts
        self._fixed = serving.per_client[problem.splits]
        self._below = np.where(
            np.isfinite(below), problem.share[:, None] * np.where(np.isfinite(below), below, 0.0), -np.inf
        )
        self._corners = [corners(front.cost[:, BYTES], front.value) for front in fronts]

    def divide(self) -> tuple[Chosen, float] | None:
        """The choices of all clients, and the price of a byte; None if not even halves without ranks fit."""
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
        """The value of all choices, ``sum_i p_i (below + above)``."""
        above = [self._fronts[s].value[k] for s, k in zip(chosen.split.tolist(), chosen.choice.tolist(), strict=True)]
        return float(np.take_along_axis(self._below, chosen.split[:, None], 1).sum() + self._share @ above)

    def ranks(self, chosen: Chosen) -> Ranks:
        """The ranks of the halves, ``(clients, layers)``."""
        each = zip(chosen.split.tolist(), chosen.choice.tolist(), strict=True)
        return np.stack([self._fronts[s].ranks[k] for s, k in each])

    def bound(self, price: float) -> float:
        """The Lagrangian bound: no division of the memory is worth more, at whatever price it is computed."""
        worth, _, _ = self._offers(price)
        lost = self._share[:, None] * [front.lost for front in self._fronts]
        return float((worth + lost).max(axis=1).sum()) + (price * self._room if price else 0.0)

    def _offers(self, price: float) -> tuple[Array, Index, Array]:
        """For each split the best half at a price: its value less its cost, its choice, and its bytes, ``(clients,
        splits)`` each."""
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
        # Of splits that are worth the same, the lowest: its half holds the ranks of the others too.
        split = (worth >= best - SAME * np.abs(best)).argmax(axis=1)
        return Chosen(split, choice[clients, split], taken[clients, split])

    def _fits(self, chosen: Chosen) -> bool:
        return bool(chosen.taken.sum() <= self._room)

    def _fill(self, chosen: Chosen, more: Chosen) -> Chosen:
        """Hand out what is left: first the choices of a slightly lower price, then the best that still fits."""
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
