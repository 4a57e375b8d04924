"""From a mixture of plans to whole clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.knapsack import Relaxation
from hsplitlora_flwr.planning.mix import Aim, Mix, Splits
from hsplitlora_flwr.planning.problem import Array, Problem

Mixture = list[tuple[float, NDArray[np.intp]]]
"""Plans, a split by class each, with their shares."""

_ALL = 16  # ways to round that are all tried
_TIE = 1e-9


def round_mixture(problem: Problem, below: Array, aim: Aim, prices: Array, mixture: Mixture) -> Mix:
    """The best of whole clients near a mixture.

    Clients that all plans treat alike are settled. The others stand in a row, and the plans take their shares of it in
    the order of the memory that they cost the server. Where the shares meet is moved until the goal is lowest.
    """
    filler = _Filler(problem, below, aim, prices)
    mixture = sorted(mixture, key=lambda part: -float(problem.sizes @ problem.share[part[1]]))
    plans = np.array([plan for _, plan in mixture])
    differ = (plans != plans[0]).any(axis=0)
    units = np.repeat(np.flatnonzero(differ), problem.sizes[differ])
    settled = {(n, int(plans[0, n])): int(problem.sizes[n]) for n in np.flatnonzero(~differ).tolist()}

    def fill(choice: Sequence[int]) -> Mix:
        splits = dict(settled)
        for number, k in zip(units.tolist(), choice, strict=True):
            key = number, int(plans[k, number])
            splits[key] = splits.get(key, 0) + 1
        return filler.fill(splits)

    if len(plans) ** len(units) <= _ALL:
        return min(map(fill, product(range(len(plans)), repeat=len(units))), key=lambda mix: mix.penalty)
    meet = np.cumsum([share for share, _ in mixture])[:-1] * len(units)
    tried: dict[int, Mix] = {}

    def shifted(shift: int) -> Mix:
        if shift not in tried:
            tried[shift] = fill(np.searchsorted(meet + shift, np.arange(len(units)) + 0.5).tolist())
        return tried[shift]

    low, high = -len(units), len(units)
    while high - low > 2:  # the goal falls, then rises
        left = (low + high - 1) // 2
        if shifted(left).penalty <= shifted(left + 1).penalty:
            high = left + 1
        else:
            low = left
    return min((shifted(shift) for shift in range(low, high + 1)), key=lambda mix: mix.penalty)


class _Filler:
    """Gives ranks above fixed splits: by falling value per price, for as many clients as the limits allow."""

    def __init__(self, problem: Problem, below: Array, aim: Aim, prices: Array) -> None:
        self.problem, self.below, self.aim = problem, below, aim
        # Where nothing has a price, memory decides.
        memory = prices[1] + _TIE * max(float((-prices[0] * problem.values).max()), _TIE) / float(problem.prices.max())
        relaxation = Relaxation(
            problem, memory * problem.prices + prices[2] * problem.flops, memory * problem.input_bytes
        )
        self._steps = relaxation.raises
        self._single = [[raised] for step in self._steps for raised in step]
        self._gains = np.diff([problem.values, problem.prices, problem.flops], axis=2, prepend=0.0).tolist()
        self._block, self._input = problem.block.tolist(), problem.input.tolist()
        self._input_bytes = problem.input_bytes.tolist()

    def fill(self, splits: Splits) -> Mix:
        """The plan with these splits; none where they alone break a limit, or the value stays too low."""
        problem, aim = self.problem, self.aim
        number, split = np.array(list(splits)).T
        clients = np.array(list(splits.values()))
        value = float(clients @ self.below[number, split])
        memory = float(clients @ problem.share[split])
        flops = float(clients @ problem.server_flops[split])
        if memory > aim.memory or flops > aim.flops:
            return Mix.none(misses=1 + max(memory / aim.memory, flops / aim.flops))
        enough = aim.value if aim.fewest_flops else math.inf
        above = np.cumsum(np.bincount(split, clients, problem.cost.num_blocks)).astype(int).tolist()
        # By layer, clients with at least the k-th rank; the 0-th is to be above the split.
        at_least = [[above[block]] + [0] * len(problem.ranks) for block in self._block]
        opened = [0] * len(self._input_bytes)
        values, prices, work = self._gains

        def take(raises: Sequence[tuple[int, int]], clients: int, input_bytes: float) -> None:
            """Raise the ranks of as many of so many clients as the limits allow."""
            nonlocal value, memory, flops
            worth = math.fsum(values[m][k] for m, k in raises)
            if clients <= 0 or not worth or value >= enough:
                return
            price = math.fsum(prices[m][k] for m, k in raises) + input_bytes
            cost = math.fsum(work[m][k] for m, k in raises)
            if math.isfinite(aim.memory):
                clients = min(clients, int((aim.memory - memory) / price))
            if math.isfinite(aim.flops):
                clients = min(clients, int((aim.flops - flops) / cost))
            if clients * worth > enough - value:
                clients = math.ceil((enough - value) / worth)
            if clients > 0:
                for m, k in raises:
                    at_least[m][k + 1] += clients
                    opened[self._input[m]] = max(opened[self._input[m]], at_least[m][k + 1])
                value, memory, flops = value + clients * worth, memory + clients * price, flops + clients * cost

        for raises in self._steps:
            m, k = raises[0]
            g = self._input[m]
            if not opened[g] and self._input_bytes[g]:
                take(raises, at_least[m][0], self._input_bytes[g])
            else:
                take(raises, min(at_least[m][k], opened[g] or at_least[m][0]) - at_least[m][k + 1], 0.0)
        if any(row[-1] < row[0] for row in at_least):  # what is left may hold a part of a step
            for single in self._single:
                ((m, k),) = single
                take(single, min(at_least[m][k], opened[self._input[m]]) - at_least[m][k + 1], 0.0)
                take(single, at_least[m][k] - at_least[m][k + 1], self._input_bytes[self._input[m]])
        if value < aim.value:
            return Mix.none(misses=1 - value / aim.value)
        counts = -np.diff(np.array([[*row[1:], 0] for row in at_least]), axis=1)
        return Mix(flops if aim.fewest_flops else -value, splits, counts)
