"""What clients can have below their split: for every split point, the choices of ranks that no other beats.

A client trains with one of them, or has no adapters there and computes forward alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.frontier import BYTES, OPERATIONS, PARAMETERS, SAME, Frontier
from hsplitlora_flwr.planning.problem import Prices, Problem

_FEW_LAYERS = 16  # where single ranks weigh in the time

RESTS = -1
"""The choice of no adapters."""


class Below:
    """The choices of all clients. Clients with the same cost model share tables, whatever their budgets.

    Parameters
    ----------
    problem : Problem
    timed : bool
        Whether time is limited, so that operations count as memory does.
    """

    def __init__(self, problem: Problem, timed: bool) -> None:
        self._problem = p = problem
        limited = {BYTES: True, PARAMETERS: np.isfinite(p.adapters).any(), OPERATIONS: timed}
        sides = tuple(side for side, is_so in limited.items() if is_so or len(p.block) <= _FEW_LAYERS)
        self._tables = [(index, self._table(index, prices, sides)) for index, prices in p.groups]
        self.held = np.empty((len(p.names), len(p.splits)), bool)
        """``(clients, splits)``; whether a client has the memory for a split."""
        self._forward = np.empty(self.held.shape)  # operations of a step without adapters
        for index, prices in p.groups:
            self.held[index] = prices.floor[p.splits] <= p.memory[index, None]
            self._forward[index] = prices.forward[p.splits]

    def _table(self, index: Index, prices: Prices, sides: tuple[int, ...]) -> list[Frontier]:
        """By split, the choices with at least one adapter. Blocks are added from the first one up.

        Every block above the lowest adapter keeps activations for the backward pass, whatever its own ranks: so choices
        pay for each block that is added, and the one without any adapter yet does not.
        """
        p = self._problem
        nothing = Frontier.start(len(p.block), sides)
        tables = [[Frontier.start(len(p.block), sides, 0)] for _ in p.splits]
        for costs in prices.costs if p.may_train else ():
            front, start = tables[0][0], nothing.plus(costs.block)
            for block in range(int(p.splits[-1])):
                split = max(block + 1, int(p.splits[0]))
                limit = np.array([p.memory[index].max() - costs.base[split], p.adapters[index].max(), np.inf])
                if limit[BYTES] < 0:
                    break
                front = front.plus(costs.block)
                front = front.with_block(p.by_block[block], costs.below, costs.inputs_below, p.values, limit, start)
                if block + 1 == split:
                    beside = np.array([costs.base[split], 0.0, prices.forward[split]])
                    tables[split - p.splits[0]].append(front.plus(beside))
        most = np.array([p.memory[index].max(), p.adapters[index].max(), np.inf])
        return [Frontier.of(fronts).thinned(most) if len(fronts) > 2 else fronts[-1] for fronts in tables]

    def best(self, seconds: Array | None = None) -> tuple[Array, Index]:
        """Values and choices, ``(clients, splits)``; the highest value in so many seconds of a round, ``(clients,)``,
        minus infinity where there is none."""
        p = self._problem
        rests, flops = self.held & p.may_rest, np.full(len(p.names), np.inf)
        if seconds is not None:
            rests &= p.own_seconds(self._forward, rests, p.speed) <= seconds[:, None] * (1 + SAME)
            flops = (seconds * (1 + SAME) / p.steps - p.wire) * p.speed * (1 + SAME)
        value, choice = np.where(rests, 0.0, -np.inf), np.full(rests.shape, RESTS)
        for index, s, table in self._each():
            at = table.best(np.column_stack([p.memory[index], p.adapters[index], flops[index]]))
            found = np.append(table.value, -np.inf)[at]
            more = self.held[index, s] & (found > value[index, s] + SAME)
            value[index[more], s], choice[index[more], s] = found[more], at[more]
        return value, choice

    def least(self, target: Array) -> tuple[Array, Index]:
        """Operations and choices, ``(clients, splits)``; the fewest for a value of ``target``, ``(clients, splits)``,
        infinity where there is none."""
        p = self._problem
        rests = self.held & p.may_rest & (target <= SAME)
        flops, choice = np.where(rests, self._forward, np.inf), np.full(rests.shape, RESTS)
        for index, s, table in self._each():
            trains = index[self.held[index, s] & ~rests[index, s]]
            at = table.least(np.column_stack([p.memory[trains], p.adapters[trains]]), target[trains, s])
            flops[trains, s], choice[trains, s] = np.append(table.cost[:, OPERATIONS], np.inf)[at], at
        return flops, choice

    def bound(self) -> Array:
        """``(clients, splits)``; no ranks of a client below a split are worth more."""
        p = self._problem
        bound = np.where(self.held, 0.0 if p.may_rest else -np.inf, -np.inf)
        for index, s, table in self._each():
            most = table.bound(np.column_stack([p.memory[index], p.adapters[index]]))
            bound[index, s] = np.where(self.held[index, s], np.maximum(bound[index, s], most), -np.inf)
        return bound

    def ranks(self, splits: Index, choice: Index) -> Ranks:
        """``(clients, layers)``; of a choice at a split for every client, ``(clients,)`` both."""
        ranks = np.zeros((len(splits), len(self._problem.block)), np.uint8)
        for index, s, table in self._each():
            some = index[(splits[index] == s) & (choice[index] != RESTS)]
            ranks[some] = table.ranks[choice[some]]
        return ranks

    def _each(self) -> Iterator[tuple[Index, int, Frontier]]:
        """Clients, split and choices of every table that has any."""
        for index, tables in self._tables:
            for s, table in enumerate(tables):
                if table.value.size:
                    yield index, s, table
