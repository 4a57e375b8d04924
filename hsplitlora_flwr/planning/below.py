"""The clients' side of the planning problem: for every split point, the Pareto front of ranks below it.

With adapters, a client takes one choice of that front (:class:`~hsplitlora_flwr.planning.frontier.Frontier`); without
any, it computes forward alone (:data:`FORWARD_ONLY`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.frontier import BYTES, OPERATIONS, PARAMETERS, SAME, Frontier
from hsplitlora_flwr.planning.problem import Problem
from hsplitlora_flwr.planning.tables import CostTables

_FEW_LAYERS = 16  # in models this small, single ranks matter for the time

FORWARD_ONLY = -1
"""In place of the index of a choice: no adapters."""


class Least(NamedTuple):
    """What clients can do with at every split, ``(clients, splits)`` each.

    Parameters
    ----------
    flops, parameters : Array
        Operations of a step and parameters of the adapters; infinite and 0 where there is no choice.
    forward_only : NDArray[np.bool_]
        Whether that is no adapter at all.
    """

    flops: Array
    parameters: Array
    forward_only: NDArray[np.bool_]


class Below:
    """The fronts of all clients. Clients with the same cost model share fronts, whatever their budgets.

    Parameters
    ----------
    problem : Problem
    timed : bool
        Whether there is a deadline, so that choices are compared by operations as well.

    Attributes
    ----------
    held : NDArray[np.bool_]
        ``(clients, splits)``; whether a client's memory holds a split at all.
    """

    def __init__(self, problem: Problem, timed: bool) -> None:
        self._problem = p = problem
        limited = {BYTES: True, PARAMETERS: np.isfinite(p.adapters).any(), OPERATIONS: timed}
        sides = tuple(side for side, is_so in limited.items() if is_so or len(p.block) <= _FEW_LAYERS)
        self._groups = [(index, self._fronts(index, tables, sides)) for index, tables in p.groups]
        self.held = np.empty((len(p.names), len(p.splits)), bool)
        self._forward = np.empty(self.held.shape)  # operations of a step without adapters
        for index, tables in p.groups:
            self.held[index] = tables.floor[p.splits] <= p.memory[index, None]
            self._forward[index] = tables.forward[p.splits]

    def _fronts(self, index: Index, tables: CostTables, sides: tuple[int, ...]) -> list[Frontier]:
        """By split, the front of choices with at least one adapter, built from block 0 up.

        Every block from the lowest adapter up keeps activations for the backward pass, whatever its own ranks. So each
        choice pays for every block that is added; one whose first adapter is in this block begins from ``start``, which
        has paid for this block alone.
        """
        p = self._problem
        nothing = Frontier.start(len(p.block), sides)
        fronts = [[Frontier.start(len(p.block), sides, 0)] for _ in p.splits]
        for costs in tables.costs if p.may_train else ():
            front, start = fronts[0][0], nothing.plus(costs.block)
            for block in range(int(p.splits[-1])):
                split = max(block + 1, int(p.splits[0]))
                limit = np.array([p.memory[index].max() - costs.base[split], p.adapters[index].max(), np.inf])
                if limit[BYTES] < 0:
                    break
                front = front.plus(costs.block)
                front = front.with_block(p.by_block[block], costs.below, costs.inputs_below, p.values, limit, start)
                if block + 1 == split:
                    beside = np.array([costs.base[split], 0.0, tables.forward[split]])
                    fronts[split - p.splits[0]].append(front.plus(beside))
        most = np.array([p.memory[index].max(), p.adapters[index].max(), np.inf])
        return [Frontier.of(each).thinned(most) if len(each) > 2 else each[-1] for each in fronts]

    def best(self, seconds: Array | None = None, parameters: Array | None = None) -> tuple[Array, Index]:
        """The most valuable choice of every client at every split.

        Parameters
        ----------
        seconds : Array, optional
            ``(clients,)``; longest round of each client by itself; no limit when None.
        parameters : Array, optional
            ``(clients,)``; the most of its adapters; no limit but that of its budget when None.

        Returns
        -------
        values : Array
            ``(clients, splits)``; minus infinity where nothing fits.
        choices : Index
            The same shape.
        """
        p = self._problem
        forward_only, flops = self.held & p.may_only_forward, np.full(len(p.names), np.inf)
        if seconds is not None:
            forward_only &= p.own_seconds(self._forward, forward_only, p.speed) <= seconds[:, None] * (1 + SAME)
            flops = (seconds * (1 + SAME) / p.steps - p.wire) * p.speed * (1 + SAME)
        sent = p.adapters if parameters is None else np.minimum(p.adapters, parameters * (1 + SAME))
        value, choice = np.where(forward_only, 0.0, -np.inf), np.full(forward_only.shape, FORWARD_ONLY)
        for index, s, front in self._each():
            at = front.best(np.column_stack([p.memory[index], sent[index], flops[index]]))
            found = np.append(front.value, -np.inf)[at]
            more = self.held[index, s] & (found > value[index, s] + SAME)
            value[index[more], s], choice[index[more], s] = found[more], at[more]
        return value, choice

    def least(self, target: Array) -> Least:
        """The choices of the fewest operations of a step that are worth at least ``target``, ``(clients, splits)``."""
        p = self._problem
        forward_only = self.held & p.may_only_forward & (target <= SAME)
        flops, parameters = np.where(forward_only, self._forward, np.inf), np.zeros(forward_only.shape)
        for index, s, front in self._each():
            trains = index[self.held[index, s] & ~forward_only[index, s]]
            at = front.least(np.column_stack([p.memory[trains], p.adapters[trains]]), target[trains, s])
            flops[trains, s] = np.append(front.cost[:, OPERATIONS], np.inf)[at]
            parameters[trains, s] = np.append(front.cost[:, PARAMETERS], 0.0)[at]
        return Least(flops, parameters, forward_only)

    def bound(self) -> Array:
        """Upper bounds, ``(clients, splits)``, of what any ranks of a client below a split are worth."""
        p = self._problem
        bound = np.where(self.held, 0.0 if p.may_only_forward else -np.inf, -np.inf)
        for index, s, front in self._each():
            most = front.bound(np.column_stack([p.memory[index], p.adapters[index]]))
            bound[index, s] = np.where(self.held[index, s], np.maximum(bound[index, s], most), -np.inf)
        return bound

    def ranks(self, splits: Index, choice: Index) -> Ranks:
        """The ranks, ``(clients, layers)``, of each client's choice at its split, both ``(clients,)``."""
        ranks = np.zeros((len(splits), len(self._problem.block)), np.uint8)
        for index, s, front in self._each():
            some = index[(splits[index] == s) & (choice[index] != FORWARD_ONLY)]
            ranks[some] = front.ranks[choice[some]]
        return ranks

    def _each(self) -> Iterator[tuple[Index, int, Frontier]]:
        """Clients, split and front of every front that has choices."""
        for index, fronts in self._groups:
            for s, front in enumerate(fronts):
                if front.value.size:
                    yield index, s, front
