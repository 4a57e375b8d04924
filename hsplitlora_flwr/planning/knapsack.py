"""The best ranks of one client below its split point: a multiple-choice knapsack with kept activations.

Activations are kept from the lowest adapted block ``b`` up, or computed again, so memory and time of a client are
linear in its ranks once ``b`` and which of the two are fixed. Bounds come from the linear relaxation, which is solved
for every capacity at once: weights by value per byte, cumulated, are a concave function of the capacity. Most bounds
are reached by rounding; what is left is a small integer program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from hsplitlora_flwr.planning.problem import AdapterCosts, Array, Choice, Problem

EPS = 1e-9
"""Relative slack of comparisons of seconds, which are not whole numbers as bytes are."""
_GAP = 2e-5  # of an integer program
_NODES = 100  # of its search tree; what is proven by then stands


@dataclass(frozen=True)
class Ranks:
    """Ranks below a split, their value, and an upper bound of the best value."""

    choice: Choice
    value: float
    bound: float


class Knapsack:
    """Bounds and solutions for all classes and splits of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._packings = [_Packing(problem, costs) for costs in problem.costs]
        self._solved: dict[tuple[int, int, float], Ranks] = {}

    @cached_property
    def shortest(self) -> Array:
        """Seconds of a round of a client without adapters, ``(classes, L)``; infinite where its memory is too small."""
        problem = self.problem
        seconds = np.full((len(problem.classes), problem.cost.num_blocks), math.inf)
        for number, each in enumerate(problem.classes):
            for split in problem.splits:
                if each.memory >= problem.floor[split]:
                    seconds[number, split] = problem.own_seconds(number, problem.forward[split])
        return seconds

    def bounds(self, limit: float) -> Array:
        """Upper bounds of the value below every split, ``(classes, L)``, when a round may take ``limit`` seconds of a
        client; minus infinity where a client cannot hold the split."""
        problem = self.problem
        memory = np.array([each.memory for each in problem.classes], float)
        possible = np.isfinite(self.shortest) & (self.shortest <= limit * (1 + EPS))
        best = np.where(possible, 0.0, -math.inf)
        flops = np.array([self._step_flops(number, limit) for number in range(len(problem.classes))])
        for split in problem.splits:
            able = possible[:, split]
            if not able.any():
                break
            most = self._packings[0].most(split)
            for lowest, packing in product(range(split), self._packings):
                value = packing.bounds(lowest, split, memory[able], flops[able])
                best[able, split] = np.maximum(best[able, split], value)
                if lowest == 0 and (best[able, split] >= most).all():
                    break
        for (number, split, solved_limit), ranks in self._solved.items():
            if solved_limit == limit:
                best[number, split] = min(best[number, split], ranks.bound)
        return best

    def solve(self, number: int, split: int, limit: float, slack: float) -> Ranks:
        """Ranks whose value is the best to within ``slack``, absolute."""
        unlimited = self._solved.get((number, split, math.inf))
        if unlimited and not math.isinf(limit) and self.problem.seconds(number, split, unlimited.choice) <= limit:
            limit = math.inf
        key = number, split, limit
        if (known := self._solved.get(key)) and known.bound - known.value <= slack:
            return known
        solved = self._improve(number, split, limit, None, 0.0)
        if solved.bound - solved.value > slack:
            solved = self._improve(number, split, limit, solved, slack)
        self._solved[key] = solved
        return solved

    def _step_flops(self, number: int, limit: float) -> float:
        """Operations that a step of a class may take."""
        each = self.problem.classes[number]
        return (limit / self.problem.steps - each.wire) * each.flops * (1 + EPS)

    def _improve(self, number: int, split: int, limit: float, known: Ranks | None, slack: float) -> Ranks:
        """The best over the lowest adapted blocks, activations kept or not: rounded when ``known`` is None, else by
        integer programs."""
        candidates = []
        memory, flops = np.array([self.problem.classes[number].memory]), np.array([self._step_flops(number, limit)])
        for lowest, packing in product(range(split), self._packings):
            bound = float(packing.bounds(lowest, split, memory, flops)[0])
            if bound >= 0:
                room, work = (float(array[0]) for array in packing.rooms(lowest, split, memory, flops))
                candidates.append((bound, lowest, packing, room, work))
        best, value = (known.choice, known.value) if known else ({}, 0.0)
        bounds = [0.0]
        for bound, lowest, packing, room, work in sorted(candidates, key=itemgetter(0, 1), reverse=True):
            if bound <= value + slack:
                bounds.append(bound)
                break
            if known:
                choice, bound = packing.integer_program(lowest, split, room, work, bound, value)
            else:
                choice = packing.fill(lowest, split, room, work)
            bounds.append(bound)
            if choice is not None and (total := self.problem.value(choice)) > value:
                best, value = choice, total
        return Ranks(best, value, max(*bounds, value))


class _Packing:
    """Ranks of blocks ``lowest .. split - 1`` where activations are kept, or where they are computed again."""

    def __init__(self, problem: Problem, costs: AdapterCosts) -> None:
        self.problem, self.costs = problem, costs
        self._memory = Relaxation(problem, costs.prices, costs.input_bytes)
        self._time = Relaxation(problem, costs.flops, np.zeros_like(costs.input_bytes))

    def most(self, split: int) -> float:
        """The value of the highest rank on every layer below ``split``."""
        return self._memory.total(split)

    def rooms(self, lowest: int, split: int, memory: Array, flops: Array) -> tuple[Array, Array]:
        """Bytes and operations for adapters, of clients that have ``memory`` bytes and ``flops`` operations a step."""
        costs, blocks = self.costs, split - lowest
        room: Array = memory - costs.base[split] - blocks * costs.block_bytes
        work: Array = flops - self.problem.forward[split] - blocks * costs.backward
        return room, work

    def bounds(self, lowest: int, split: int, memory: Array, flops: Array) -> Array:
        """Upper bounds of the value by client; minus infinity where there is no room."""
        room, work = self.rooms(lowest, split, memory, flops)
        bounds = self._memory(lowest, split, room)
        return bounds if np.isinf(work).all() else np.minimum(bounds, self._time(lowest, split, work))

    def fill(self, lowest: int, split: int, memory: float, flops: float) -> Choice:
        """Raise ranks by value per byte while they fit: all that the relaxation takes whole, then what is left room
        for."""
        problem, costs = self.problem, self.costs
        taken, rest = self._memory.take(lowest, split, memory)
        choice = dict(taken)  # of a layer's raises the last, which is the highest, stays
        opened = {int(problem.input[m]) for m in choice}
        memory -= sum(costs.prices[m, k] for m, k in choice.items()) + sum(costs.input_bytes[g] for g in opened)
        flops -= sum(costs.flops[m, k] for m, k in choice.items())
        while flops < 0:  # the time row binds first
            m, k = choice.popitem()
            memory, flops = memory + costs.prices[m, k], flops + costs.flops[m, k]
            if not any(problem.input[m] == problem.input[other] for other in choice):
                opened.discard(int(problem.input[m]))
                memory += costs.input_bytes[problem.input[m]]
            rest = [*taken, *rest]
        for m, k in rest:
            before = choice.get(m, -1)
            if k <= before:
                continue
            g = int(problem.input[m])
            price = costs.prices[m, k] - (costs.prices[m, before] if before >= 0 else 0.0)
            price += 0.0 if g in opened else costs.input_bytes[g]
            work = costs.flops[m, k] - (costs.flops[m, before] if before >= 0 else 0.0)
            if price <= memory and work <= flops:
                memory, flops = memory - price, flops - work
                choice[m] = k
                opened.add(g)
        return choice

    def integer_program(
        self, lowest: int, split: int, memory: float, flops: float, bound: float, value: float
    ) -> tuple[Choice | None, float]:
        """Ranks of blocks from ``lowest`` up that beat ``value``, and a bound; ranks that cannot are left out.

        Variables: ``x[m, k]`` and ``z[g]`` (an input is kept), all 0 or 1.
        """
        problem, costs = self.problem, self.costs
        slope = self._memory.slope(lowest, split, memory)
        losses = rank_losses(problem, problem.values - slope * costs.prices, slope * costs.input_bytes)
        inside = (problem.block >= lowest) & (problem.block < split)
        at_memory = float(self._memory(lowest, split, np.array([memory]))[0])
        useful = inside[:, None] & (problem.values > 0)
        layers, ranks = np.nonzero(useful & (losses <= (at_memory - value) * (1 + EPS) + EPS))
        inputs = np.unique(problem.input[layers])
        rows, of_layer = np.unique(layers, return_inverse=True)
        x, z = len(layers), len(inputs)
        if not x:
            return None, value
        index = np.arange(x)
        taken = sparse.csr_matrix((np.ones(x), (of_layer, index)), shape=(len(rows), x))
        kept = sparse.csr_matrix(
            (np.ones(len(rows)), (np.arange(len(rows)), np.searchsorted(inputs, problem.input[rows]))),
            shape=(len(rows), z),
        )
        unit, unit_flops = float(costs.prices.min()), float(costs.flops.min())
        joint = [np.concatenate([costs.prices[layers, ranks], costs.input_bytes[inputs]]) / unit]
        most = [memory / unit]
        if not math.isinf(flops):
            joint.append(np.concatenate([costs.flops[layers, ranks], np.zeros(z)]) / unit_flops)
            most.append(flops / unit_flops)
        result = milp(
            -np.concatenate([problem.values[layers, ranks], np.zeros(z)]),
            integrality=np.ones(x + z),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(sparse.hstack([taken, -kept], format="csr"), -np.inf, 0),
                LinearConstraint(np.array(joint), -np.inf, most),
            ],
            options={"mip_rel_gap": _GAP, "node_limit": _NODES, "presolve": False},  # little is left for presolve to do
        )
        if result.x is None:
            return None, bound
        chosen = np.flatnonzero(result.x[:x] > 0.5)
        choice = {int(layers[i]): int(ranks[i]) for i in chosen}
        bound = max(value, min(bound, -float(result.mip_dual_bound)))
        return (choice if self._fits(choice, memory, flops) else None), bound

    def _fits(self, choice: Choice, memory: float, flops: float) -> bool:
        problem, costs = self.problem, self.costs
        inputs = {int(problem.input[m]) for m in choice}
        price = sum(costs.prices[m, k] for m, k in choice.items()) + sum(costs.input_bytes[g] for g in inputs)
        return bool(price <= memory and sum(costs.flops[m, k] for m, k in choice.items()) <= flops)


def rank_losses(problem: Problem, profits: Array, input_prices: Array) -> Array:
    """What taking a rank on a layer costs, at prices, against the best for its input; ``(layers, ranks)``, from 0 up.

    Parameters
    ----------
    problem : Problem
        The layers and their inputs.
    profits : Array
        ``(layers, ranks)``; value less price.
    input_prices : Array
        ``(inputs,)``; of keeping an input.
    """
    best = np.maximum(profits.max(axis=1), 0.0)
    of_input = np.bincount(problem.input, best) - input_prices
    losses: Array = best[:, None] - profits + np.maximum(-of_input, 0.0)[problem.input][:, None]
    return losses


class Relaxation:
    """Value of blocks ``lowest .. split - 1`` as a function of the capacity, fractions of adapters allowed.

    A step raises one layer to its next rank. Steps of a layer have falling value per price, as ``log2(1 + r)`` is
    concave. The first step on an input pays for it too, together with as many further steps as make that the best buy.
    """

    def __init__(self, problem: Problem, prices: Array, input_prices: Array) -> None:
        values = problem.values
        step_values, step_prices = np.diff(values, axis=1, prepend=0.0), np.diff(prices, axis=1, prepend=0.0)
        steps: list[tuple[float, float, float, int, list[tuple[int, int]]]] = []
        for g, input_price in enumerate(input_prices):
            members = np.flatnonzero((problem.input == g) & (problem.importance > 0))
            own = sorted(
                (
                    (step_values[m, k] / step_prices[m, k], step_prices[m, k], step_values[m, k], int(m), int(k))
                    for m in members
                    for k in range(values.shape[1])
                ),
                key=lambda step: (-step[0], step[4]),
            )
            merged = 0
            if input_price and own:
                price = input_price + np.cumsum([step[1] for step in own])
                value = np.cumsum([step[2] for step in own])
                merged = int(np.argmax(value / price)) + 1
                block = int(problem.input_block[g])
                first = [(step[3], step[4]) for step in own[:merged]]
                steps.append(
                    (value[merged - 1] / price[merged - 1], price[merged - 1], value[merged - 1], block, first)
                )
            steps += [(d, price, value, int(problem.block[m]), [(m, k)]) for d, price, value, m, k in own[merged:]]
        steps.sort(key=lambda step: -step[0])
        self._price, self._value = np.array([s[1] for s in steps]), np.array([s[2] for s in steps])
        self._block = np.array([s[3] for s in steps])
        self.raises = [s[4] for s in steps]
        self._cheapest = [min(step_prices[m, k] for m, k in raises) for raises in self.raises]
        self._curves: dict[tuple[int, int], tuple[Array, Array]] = {}

    def __call__(self, lowest: int, split: int, capacity: Array) -> Array:
        """The bound for each capacity; minus infinity below 0."""
        if (lowest, split) not in self._curves:
            steps = self._steps(lowest, split)
            self._curves[lowest, split] = (
                np.concatenate([[0.0], np.cumsum(self._price[steps])]),
                np.concatenate([[0.0], np.cumsum(self._value[steps])]),
            )
        value: Array = np.where(capacity >= 0, np.interp(capacity, *self._curves[lowest, split]), -math.inf)
        return value

    def total(self, split: int) -> float:
        """The value of the highest rank on every layer below ``split``."""
        return float(self._value[self._block < split].sum()) * (1 - EPS)

    def slope(self, lowest: int, split: int, capacity: float) -> float:
        """Value of one more byte at a capacity."""
        steps = self._steps(lowest, split)
        last = int(np.searchsorted(np.cumsum(self._price[steps]), capacity, side="right"))
        return float(self._value[steps[last]] / self._price[steps[last]]) if last < len(steps) else 0.0

    def take(self, lowest: int, split: int, capacity: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Raises ``(layer, rank)`` by falling value per price: those that fit as a whole, and the further ones of which
        at least the step fits into what they leave."""
        steps = self._steps(lowest, split)
        used = np.cumsum(self._price[steps])
        last = int(np.searchsorted(used, capacity, side="right"))
        left = capacity - (float(used[last - 1]) if last else 0.0)
        rest = [step for step in steps[last:] if self._cheapest[step] <= left]
        taken = [raised for step in steps[:last] for raised in self.raises[step]]
        return taken, [raised for step in rest for raised in self.raises[step]]

    def _steps(self, lowest: int, split: int) -> NDArray[np.intp]:
        return np.flatnonzero((self._block >= lowest) & (self._block < split))
