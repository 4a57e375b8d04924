"""The program that joins all clients: how many of a class take a split, how many take a rank on a layer above.

Above the split points clients are alike, so *how many* take a rank counts, not who. Two or three rows join the counts:
the server's memory, the time it may take, or a value to reach. Without them every client is on its own, so the program
is solved by Dantzig-Wolfe decomposition: prices on the rows make plans, a linear program of a few rows mixes the plans
and makes new prices, and the prices prove a bound. A mixture is then rounded to whole clients. With many clients that
loses next to nothing; with few, an integer program over the counts that the prices do not rule out closes the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from hsplitlora_flwr.planning.integer import solve_counts
from hsplitlora_flwr.planning.mix import Aim, Mix, rank_profits, split_prices
from hsplitlora_flwr.planning.problem import Array, Problem
from hsplitlora_flwr.planning.rounding import Mixture, round_mixture

_FEASIBLE = 1e-9  # violation of a row, as a share of what all clients can take at most
_CONVERGED = 1e-6
_ITERATIONS = 200
_FEW = 12  # clients, up to which rounding may lose more than a gap and an integer program is small


@dataclass(frozen=True)
class _Relaxed:
    prices: Array
    """Of (value, memory, flops) in units of the goal: the goal itself, and the dual prices of the rows."""
    bound: float
    mixture: Mixture


def solve_program(problem: Problem, below: Array, aim: Aim, gap: float) -> Mix:
    """Counts that pursue an aim to within a share ``gap`` where rounding or the integer program gets there.

    Parameters
    ----------
    problem : Problem
        The costs.
    below : Array
        ``(classes, L)``; the value below each split, minus infinity where a class cannot take it.
    aim : Aim
        Goal and limits.
    gap : float
        Share of the goal that may be missed.
    """
    if not np.isfinite(below).any(axis=1).all():
        return Mix.none(math.inf)
    relaxed = _Decomposition(problem, below, aim).solve()
    if relaxed is None:
        return Mix.none(math.inf)
    best, bound = round_mixture(problem, below, aim, relaxed.prices, relaxed.mixture), relaxed.bound
    if best.goal - bound > gap * abs(bound) and problem.sizes.sum() <= _FEW:
        found = solve_counts(problem, below, aim, relaxed.prices, best.goal - bound, gap)
        bound = max(bound, min(found.bound, best.goal))
        best = min(best, found, key=lambda mix: mix.penalty)
    return replace(best, bound=min(bound, best.goal))


class _Decomposition:
    def __init__(self, problem: Problem, below: Array, aim: Aim) -> None:
        self.problem, self.below = problem, below
        self._scale = problem.sizes.sum() * np.array(
            [
                problem.values[:, -1].sum(),
                problem.share.max() + problem.prices[:, -1].sum() + problem.input_bytes.sum(),
                problem.server_flops.max() + problem.flops[:, -1].sum(),
            ]
        )
        self._goal, self._goal_unit = self._unit_free(aim.weights)
        rows = [(*self._unit_free(weights), limit) for weights, limit in aim.rows]
        self._rows = np.array([weights for weights, _, _ in rows]).reshape(-1, 3)
        self._limits = np.array([limit / unit for _, unit, limit in rows])

    def solve(self) -> _Relaxed | None:
        """The optimum over mixtures of plans; None when there is none."""
        plans = [self._cheapest(weights) for weights in (self._goal, *self._rows)]
        if self._run(plans, np.zeros(3)) is None:
            return None
        return self._run(plans, self._goal)

    def _run(self, plans: list[tuple[NDArray[np.intp], Array]], goal: Array) -> _Relaxed | None:
        """Make plans until their best mixture is proven to be the best of all; without a goal, until one keeps to the
        rows, and None if there is none."""
        count = len(self._rows)
        slacks = 0 if goal.any() else count
        best = -math.inf, goal
        for _ in range(_ITERATIONS):
            totals = np.array([plan_totals for _, plan_totals in plans])
            master = linprog(
                np.concatenate([totals @ goal, np.ones(slacks)]),
                np.hstack([self._rows @ totals.T, -np.eye(count)[:, :slacks]]) if count else None,
                self._limits if count else None,
                np.concatenate([np.ones(len(plans)), np.zeros(slacks)])[None],
                [1.0],
                method="highs-ds",
                options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
            )
            if master.x is None:  # the rows are met only within the solver's tolerance
                return None
            dual = -np.asarray(master.ineqlin.marginals) if count else np.zeros(0)
            prices = goal + dual @ self._rows
            plan = self._cheapest(prices)
            best = max(best, (float(plan[1] @ prices - dual @ self._limits), prices), key=lambda pair: pair[0])
            if slacks and (master.fun <= _FEASIBLE or best[0] > _FEASIBLE):
                break
            known = any(np.array_equal(plan[0], split) and np.allclose(plan[1], t, 1e-12) for split, t in plans)
            if known or master.fun - best[0] <= _CONVERGED * abs(master.fun):
                break
            plans.append(plan)
        if slacks and master.fun > _FEASIBLE:
            return None
        mixture = [(float(share), split) for share, (split, _) in zip(master.x, plans, strict=False) if share > 1e-9]
        return _Relaxed(best[1] * self._goal_unit / self._scale, best[0] * self._goal_unit, mixture)

    def _unit_free(self, weights: Array) -> tuple[Array, float]:
        """Weights of totals that are shares of the scale, at most 1, and their unit."""
        unit = float(np.abs(weights) @ self._scale)
        return weights * self._scale / unit, unit

    def _cheapest(self, weights: Array) -> tuple[NDArray[np.intp], Array]:
        """The plan with the lowest price: a split by class, and its totals as shares of the scale."""
        problem, prices = self.problem, weights / self._scale
        profits = rank_profits(problem, prices)
        layers, rank = np.arange(len(profits)), np.argmax(profits, axis=1)
        profit = np.maximum(profits[layers, rank], 0.0)
        of_input = np.bincount(problem.input, profit) - prices[1] * problem.input_bytes
        opened = of_input > 0
        of_block = np.bincount(problem.input_block, np.maximum(of_input, 0.0), problem.cost.num_blocks)
        gain = np.cumsum(of_block[::-1])[::-1]  # of the blocks from a split up
        split = np.argmin(split_prices(problem, self.below, prices) - gain, axis=1)
        above = np.cumsum(np.bincount(split, problem.sizes, problem.cost.num_blocks))  # clients above, by block
        clients = above[problem.block] * (profit > 0) * opened[problem.input]
        kept = (above[problem.input_block] * opened) @ problem.input_bytes
        sizes = problem.sizes
        totals = np.array(
            [
                sizes @ self.below[np.arange(len(split)), split] + clients @ problem.values[layers, rank],
                sizes @ problem.share[split] + clients @ problem.prices[layers, rank] + kept,
                sizes @ problem.server_flops[split] + clients @ problem.flops[layers, rank],
            ]
        )
        return split, totals / self._scale
