"""What clients can hold: for every split point the choices of ranks below it.

One table a split serves all clients, whatever their budgets: each looks up what its own allows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hsplitlora_flwr.planning.frontier import Array, Frontier, Index, Ranks, add_block, join
from hsplitlora_flwr.planning.problem import Problem

_WORK = 8000  # choices that are kept, over the blocks below a split
_FEWEST, _MOST = 300, 2000
_FEW_LAYERS = 64  # where the ranks of each weigh in the time
_CELLS = 4_000_000  # clients times choices that are compared at once


class Lower:
    """The choices below every split point; in its tables ``cost`` is bytes, parameters and operations of a step.

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

    def _table(self, split: int) -> Frontier:
        p, most = self._problem, float(self._problem.memory.max())
        points = int(np.clip(_WORK // split, _FEWEST, _MOST))
        nothing = Frontier.empty(len(p.block), self._counted, _MOST)
        fronts = [replace(nothing, cost=np.array([[p.floor[split], 0.0, p.forward[split]]]))]
        for costs in p.costs:
            front = Frontier.empty(len(p.block), min(self._counted, 2), points)
            for block in range(split - 1, -1, -1):
                fixed = costs.base[split] + (split - block) * costs.block_bytes
                if fixed > most:
                    break
                front = add_block(front, p, block, costs.below, costs.inputs_below, p.values, most - fixed)
                taken = np.maximum(front.cost[:, 0] + fixed, p.floor[split])
                flops = p.forward[split] + (split - block) * costs.backward + costs.work * front.cost[:, 1]
                cost = np.stack([taken, front.cost[:, 1], flops], axis=1)
                fronts = [join([*fronts, replace(front, cost=cost, counted=self._counted, points=_MOST)], most)]
        return fronts[0]

    def best(self, limit: Array | float = np.inf) -> tuple[Array, Index]:
        """Values and choices, ``(clients, splits)``; the highest value in so many operations, ``(clients,)``, minus
        infinity where there is none."""
        p = self._problem
        own = np.stack(np.broadcast_arrays(p.memory, p.adapters, limit), axis=1)
        return self._look_up(np.broadcast_to(own[:, None], (len(own), len(p.splits), 3)), False)

    def least(self, target: Array) -> tuple[Array, Index]:
        """Operations and choices, ``(clients, splits)``; the fewest for a value of ``target``, ``(clients, splits)``,
        infinity where there is none."""
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

    def ranks(self, splits: Index, choice: Index) -> Ranks:
        """``(clients, layers)``; of the choices at these splits."""
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
