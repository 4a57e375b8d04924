"""The program over all clients as an integer program, for a few of them.

Variables: ``y[c, l]`` clients of class ``c`` split at ``l``; ``w[m, k]`` clients with rank ``k`` on layer ``m`` above
their split; ``u[g]`` clients with an adapter that keeps input ``g``; ``n[b]`` clients with a split of at most ``b``.
Rows: every client has a split; ``sum_k w[m, k]`` is at most ``n[b(m)]`` and at most ``u[g(m)]``; the limits of the aim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

from hsplitlora_flwr.planning.knapsack import rank_losses
from hsplitlora_flwr.planning.mix import Aim, Mix, rank_profits, split_prices
from hsplitlora_flwr.planning.problem import Array, Problem

_NODES = 20  # of the search tree; what is proven by then stands, and more of them seldom prove more
_VARIABLES = 2500  # a larger program takes its time, and has so many adapters that rounding loses next to nothing

_INFEASIBLE = 2  # status of scipy.optimize.milp


def solve_counts(problem: Problem, below: Array, aim: Aim, prices: Array, width: float, gap: float) -> Mix:
    """The best counts, and a bound.

    Parameters
    ----------
    problem, below, aim
        As for :func:`hsplitlora_flwr.planning.program.solve_program`.
    prices : Array
        ``(3,)``; of (value, memory, flops). They prove a bound of the goal.
    width : float
        How far a known plan is from that bound. A split or a rank that costs more at the prices than the cheapest is
        in no better plan, and is left out.
    gap : float
        Share of the goal that may be missed.
    """
    width *= 1 + 1e-9
    profits = rank_profits(problem, prices)
    profit = np.maximum(profits.max(axis=1), 0.0)
    of_input = np.bincount(problem.input, profit) - prices[1] * problem.input_bytes
    of_block = np.bincount(problem.input_block, np.maximum(of_input, 0.0), problem.cost.num_blocks)
    price = split_prices(problem, below, prices) - np.cumsum(of_block[::-1])[::-1]
    number, split = np.nonzero(np.isfinite(price) & (price - price.min(axis=1, keepdims=True) <= width))
    losses = rank_losses(problem, profits, prices[1] * problem.input_bytes)
    layer, rank = np.nonzero((losses <= width) & (problem.values > 0))

    y, w = len(number), len(layer)
    if y + w > _VARIABLES:
        return Mix.none()

    layers, inputs, blocks = len(problem.values), len(problem.input_bytes), problem.cost.num_blocks
    taken = _ones(layer, np.arange(w), layers, w)
    of_layer = np.arange(layers)
    constraints = [
        _rows([_ones(number, np.arange(y), len(problem.sizes), y), (len(problem.sizes), w + inputs + blocks)]),
        _rows([_ones(split, np.arange(y), blocks, y), (blocks, w + inputs), _chain(blocks)]),
        _rows([(layers, y), taken, (layers, inputs), -_ones(of_layer, problem.block, layers, blocks)]),
        _rows([(layers, y), taken, -_ones(of_layer, problem.input, layers, inputs), (layers, blocks)]),
    ]
    lower = [problem.sizes, np.zeros(blocks), np.full(2 * layers, -np.inf)]
    upper = [problem.sizes, np.zeros(blocks), np.zeros(2 * layers)]
    none, tail = np.zeros(inputs), np.zeros(blocks)
    totals = np.array(
        [
            np.concatenate([below[number, split], problem.values[layer, rank], none, tail]),
            np.concatenate([problem.share[split], problem.prices[layer, rank], problem.input_bytes, tail]),
            np.concatenate([problem.server_flops[split], problem.flops[layer, rank], none, tail]),
        ]
    )
    # The solver's tolerances are absolute: in units of the cheapest adapter they are far below one.
    units = np.array([1.0, problem.prices.min(), problem.flops.min()])
    for weights, limit in aim.rows:
        unit = float(np.abs(weights) @ units)
        constraints.append(sparse.csr_matrix((weights @ totals / unit)[None]))
        lower.append(np.array([-np.inf]))
        upper.append(np.array([limit / unit]))
    goal = aim.weights @ totals
    unit = float(np.abs(goal).max())
    result = milp(
        goal / unit,
        integrality=np.arange(totals.shape[1]) < y + w,
        constraints=LinearConstraint(
            sparse.vstack(constraints, format="csr"), np.concatenate(lower), np.concatenate(upper)
        ),
        options={"mip_rel_gap": gap / 2, "node_limit": _NODES},
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * unit
    if result.x is None:
        return Mix.none(np.inf if result.status == _INFEASIBLE else bound)
    clients = np.round(result.x[: y + w]).astype(np.int64)
    ranks = np.zeros(problem.values.shape, dtype=np.int64)
    ranks[layer, rank] = clients[y:]
    kept = np.zeros(inputs)
    np.maximum.at(kept, problem.input, ranks.sum(axis=1))
    sums = totals @ np.concatenate([clients, kept, tail])
    if any(weights @ sums > limit + (1e-12 * abs(limit) if weights[0] else 0.0) for weights, limit in aim.rows):
        return Mix.none(bound)  # by rounding a solution that keeps to a limit only within the solver's tolerance
    splits = {(int(number[j]), int(split[j])): int(clients[j]) for j in np.flatnonzero(clients[:y])}
    return Mix(float(aim.weights @ sums), splits, ranks, bound)


def _ones(rows: NDArray[Any], columns: NDArray[Any], height: int, width: int) -> Any:
    """A sparse matrix of ones at these places."""
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(height, width))


def _chain(blocks: int) -> Any:
    """``n[b] - n[b - 1]``, negated."""
    return sparse.eye(blocks, k=-1, format="csr") - sparse.eye(blocks, format="csr")


def _rows(parts: list[Any]) -> Any:
    """Matrices side by side; a shape stands for zeros."""
    return sparse.hstack([sparse.csr_matrix(part) for part in parts], format="csr")
