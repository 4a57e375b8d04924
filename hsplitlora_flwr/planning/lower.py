"""What clients can hold: for every split point the choices of ranks below it.

One table a split serves all clients with rows of like length, whatever their budgets: each looks up what its own
allows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.frontier import Frontier, add_block, join
from hsplitlora_flwr.planning.problem import Costs, Problem

_WORK = 8000  # choices that are kept, over the blocks below a split
_FEWEST, _MOST = 300, 2000
_FEW_LAYERS = 64  # where the ranks of each weigh in the time
_CELLS = 4_000_000  # clients times choices that are compared at once


class Lower:
    """What every client can hold; each group of clients has tables of its own.

    Parameters
    ----------
    problem : Problem
    timed : bool
        Whether time is limited, so that operations count as memory does.

    Attributes
    ----------
    whole : bool
        Nothing was thinned out.
    """

    def __init__(self, problem: Problem, timed: bool) -> None:
        self._shape = len(problem.names), len(problem.splits)
        self._layers = len(problem.block)
        self._parts = [(index, Tables(group, timed)) for index, group in problem.groups]
        self.whole = all(tables.whole for _, tables in self._parts)

    def best(self, limit: Array | float = np.inf) -> tuple[Array, Index]:
        """Values and choices, ``(clients, splits)``; the highest value in so many operations, ``(clients,)``, minus
        infinity where there is none."""
        limits = np.broadcast_to(limit, self._shape[:1])
        found, choice = np.empty(self._shape), np.empty(self._shape, np.intp)
        for index, tables in self._parts:
            found[index], choice[index] = tables.best(limits[index])
        return found, choice

    def least(self, target: Array) -> tuple[Array, Index]:
        """Operations and choices, ``(clients, splits)``; the fewest for a value of ``target``, ``(clients, splits)``,
        infinity where there is none."""
        found, choice = np.empty(self._shape), np.empty(self._shape, np.intp)
        for index, tables in self._parts:
            found[index], choice[index] = tables.least(target[index])
        return found, choice

    def is_without(self, choice: Index) -> NDArray[np.bool_]:
        """``(clients, splits)``; whether choices are of no adapters."""
        found = np.empty(self._shape, bool)
        for index, tables in self._parts:
            found[index] = tables.is_without(choice[index])
        return found

    def else_least(self, value: Array, choice: Index) -> Index:
        """The choices, and where none was found the one that takes least: of no adapters, if there may be none."""
        found = np.empty(self._shape, np.intp)
        for index, tables in self._parts:
            found[index] = tables.else_least(value[index], choice[index])
        return found

    def ranks(self, splits: Index, choice: Index) -> Ranks:
        """``(clients, layers)``; of the choices at these splits, ``(clients,)`` each."""
        found = np.empty((self._shape[0], self._layers), np.uint8)
        for index, tables in self._parts:
            found[index] = tables.ranks(splits[index], choice[index])
        return found


class Tables:
    """The choices of a group below every split point; their ``cost`` is bytes, parameters and operations of a step.

    Parameters
    ----------
    problem : Problem
    timed : bool
        Whether time is limited, so that operations count as memory does.
    """

    def __init__(self, problem: Problem, timed: bool) -> None:
        self._problem = problem
        several = timed or np.isfinite(problem.adapters).any() or len(problem.block) <= _FEW_LAYERS
        self._counted = 3 if several else 1
        held = problem.splits[problem.floor[problem.splits] <= problem.memory.max()]  # the lowest ones
        self.tables = {split: self._table(split) for split in held.tolist()}
        self.whole = all(table.whole for table in self.tables.values())
        self._least = np.zeros(len(problem.splits), np.intp)  # the choice of the fewest bytes, by split
        for s, table in enumerate(self.tables.values()):
            self._least[s] = np.lexsort(table.cost[:, 1::-1].T)[0]

    def _table(self, split: int) -> Frontier:
        p, most = self._problem, float(self._problem.memory.max())
        points = int(np.clip(_WORK // split, _FEWEST, _MOST))
        nothing = Frontier.empty(len(p.block), self._counted, _MOST)
        fronts = [replace(nothing, cost=np.array([[p.floor[split], 0.0, p.forward[split]]]))]
        if not p.may_rest and (p.block < split).any():
            fronts = [join([self._single(costs, split, nothing) for costs in p.costs], most)]
        for costs in p.costs if p.may_train else ():
            front = Frontier.empty(len(p.block), min(self._counted, 2), points)
            for block in range(split - 1, -1, -1):
                fixed = costs.base[split] + (split - block) * costs.block_bytes
                if fixed > most:
                    break
                front = add_block(front, p, block, costs.below, costs.inputs_below, p.values, most - fixed)
                taken = np.maximum(front.cost[:, 0] + fixed, p.floor[split])
                flops = p.forward[split] + (split - block) * costs.backward + costs.work * front.cost[:, 1]
                some = front.cost[:, 1] > 0  # adapters; none at all are cheaper by what they keep
                cost = np.stack([taken, front.cost[:, 1], flops], axis=1)[some]
                own = replace(front, cost=cost, value=front.value[some], ranks=front.ranks[some])
                fronts = [join([*fronts, replace(own, counted=self._counted, points=_MOST)], most)]
        return fronts[0]

    def _single(self, costs: Costs, split: int, nothing: Frontier) -> Frontier:
        """One adapter of the lowest rank, in the highest block below the split, however little it is worth."""
        p = self._problem
        highest = p.block[p.block < split].max()
        m = np.flatnonzero(p.block == highest)
        taken = costs.base[split] + (split - highest) * costs.block_bytes + costs.below[m, 1]
        taken += costs.inputs_below[p.input[m]]
        flops = p.forward[split] + (split - highest) * costs.backward + costs.work * p.parameters[m, 1]
        cost = np.stack([np.maximum(taken, p.floor[split]), p.parameters[m, 1], flops], axis=1)
        ranks = np.zeros((len(m), len(p.block)), np.uint8)
        ranks[np.arange(len(m)), m] = 1
        return replace(nothing, cost=cost, value=p.values[m, 1], ranks=ranks)

    def best(self, limit: Array) -> tuple[Array, Index]:
        """As of :class:`Lower`."""
        p = self._problem
        own = np.stack(np.broadcast_arrays(p.memory, p.adapters, limit), axis=1)
        return self._look_up(np.broadcast_to(own[:, None], (len(own), len(p.splits), 3)), False)

    def least(self, target: Array) -> tuple[Array, Index]:
        """As of :class:`Lower`."""
        p = self._problem
        return self._look_up(
            np.stack(np.broadcast_arrays(p.memory[:, None], p.adapters[:, None], -target), axis=2), True
        )

    def _look_up(self, own: Array, least: bool) -> tuple[Array, Index]:
        """For every client and split the choice with the fewest operations or the highest value within limits ``own``,
        ``(clients, splits, 3)``: of bytes, of parameters, and of the other of the two, so that less is better."""
        none = np.inf if least else -np.inf
        found, choice = np.full(own.shape[:2], none), np.zeros(own.shape[:2], np.intp)
        for s, table in enumerate(self.tables.values()):
            flops, value = table.cost[:, 2], table.value
            if self._counted == 1:
                found[:, s], choice[:, s] = _along(table, own[:, s], least)
                continue
            order = np.argsort(flops if least else -value, kind="stable")
            needed = np.column_stack([table.cost[:, :2], -value if least else flops])[order]
            client = np.flatnonzero((own[:, s] >= needed.min(axis=0)).all(axis=1))
            # What every choice needs fits, or is compared.
            limits, of = np.unique(np.minimum(own[client, s], needed.max(axis=0)), axis=0, return_inverse=True)
            first, rows = np.full(len(limits), -1), max(_CELLS // len(order), 1)
            for part in (slice(start, start + rows) for start in range(0, len(limits), rows)):
                fits = np.ones((len(limits[part]), len(order)), bool)
                for side in range(3):
                    if limits[part, side].min() < needed[:, side].max():
                        fits &= needed[:, side] <= limits[part, side, None]
                first[part] = np.where(fits.any(axis=1), fits.argmax(axis=1), -1)
            some = first[of] >= 0
            at = order[first[of[some]]]
            found[client[some], s], choice[client[some], s] = (flops if least else value)[at], at
        return found, choice

    def is_without(self, choice: Index) -> NDArray[np.bool_]:
        """As of :class:`Lower`."""
        found = np.zeros(choice.shape, bool)
        for s, table in enumerate(self.tables.values()):
            found[:, s] = table.cost[choice[:, s], 1] == 0
        return found

    def else_least(self, value: Array, choice: Index) -> Index:
        """As of :class:`Lower`."""
        return np.where(np.isfinite(value), choice, self._least)

    def ranks(self, splits: Index, choice: Index) -> Ranks:
        """As of :class:`Lower`."""
        return np.stack([self.tables[s].ranks[c] for s, c in zip(splits.tolist(), choice.tolist(), strict=True)])


def _along(table: Frontier, own: Array, least: bool) -> tuple[Array, Index]:
    """The same where choices are in the order of their bytes and values, and parameters have no limit."""
    most = np.searchsorted(table.cost[:, 0], own[:, 0], "right") - 1
    if least:
        at = np.minimum(np.searchsorted(table.value, -own[:, 2]), len(table.value) - 1)
        none = (at > most) | (table.value[at] < -own[:, 2])
        return np.where(none, np.inf, table.cost[at, 2]), at
    at = most
    while (late := (at >= 0) & (table.cost[at, 2] > own[:, 2])).any():
        at = np.where(late, at - 1, at)
    return np.where(at < 0, -np.inf, table.value[at]), np.maximum(at, 0)
