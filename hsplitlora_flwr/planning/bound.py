"""What no plan can exceed: the value beyond a price for every byte, which any price bounds from above."""

from __future__ import annotations

import numpy as np

from hsplitlora_flwr.planning.arrays import Array
from hsplitlora_flwr.planning.problem import Problem

_PRICES = 96  # that are tried


def gains(problem: Problem, prices: Array, inputs: Array, price: Array) -> Array:
    """``(prices, L)``; what the best ranks of a block are worth beyond their cost.

    Parameters
    ----------
    prices, inputs : Array
        ``(layers, ranks)`` and ``(inputs,)``; what an adapter costs, and the first on an input.
    price : Array
        ``(prices,)``; of a unit of cost.
    """
    found = []
    for each in price.tolist():
        profit = (problem.values - each * prices).max(axis=1)
        of_input = np.maximum(np.bincount(problem.input, profit, len(inputs)) - each * inputs, 0.0)
        found.append(np.bincount(problem.input_block, of_input, problem.cost.num_blocks))
    return np.array(found)


def bound_below(problem: Problem) -> Array:
    """``(clients, splits)``; no ranks of a client below a split are worth more."""
    bound = np.empty((len(problem.names), len(problem.splits)))
    for index, group in problem.groups:
        bound[index] = _bound_of_group(group)
    return bound


def _bound_of_group(problem: Problem) -> Array:
    splits, blocks = problem.splits, problem.cost.num_blocks
    bounds = []
    for costs in problem.costs:
        price = _some_prices(problem, costs.below)
        sums = np.cumsum(gains(problem, costs.below, costs.inputs_below, price), axis=1)
        sums = np.concatenate([np.zeros((len(price), 1)), sums], axis=1)  # of the blocks below each
        paid = price[:, None] * costs.block_bytes * np.arange(blocks + 1)
        reached = sums - paid - np.minimum.accumulate(sums - paid, axis=1)  # from the best block up
        worth = np.maximum(
            reached[:, splits] - price[:, None] * costs.base[splits], -price[:, None] * problem.floor[splits]
        )
        bounds.append(_lowest(worth, price, problem.memory))
    bound: Array = np.maximum.reduce(bounds)
    if np.isfinite(problem.adapters).any():
        price = _some_prices(problem, problem.parameters.astype(float))
        worth = gains(problem, problem.parameters, np.zeros(len(problem.input_bytes)), price)
        worth = np.concatenate([np.zeros((len(price), 1)), np.cumsum(worth, axis=1)], axis=1)[:, splits]
        bound = np.minimum(bound, _lowest(worth, price, problem.adapters))
    return bound


def _lowest(worth: Array, price: Array, limit: Array) -> Array:
    """``(clients, splits)``; the lowest bound at any price, ``(prices, splits)``, for what clients have."""
    lowest = np.full((len(limit), worth.shape[1]), np.inf)
    for each, value in zip(price, worth, strict=True):
        lowest = np.minimum(lowest, value + (each * limit[:, None] if each else 0.0))
    return lowest


def _some_prices(problem: Problem, prices: Array) -> Array:
    slopes = problem.values[:, 1:] / prices[:, 1:]
    slopes = slopes[slopes > 0]
    return np.concatenate([[0.0], np.geomspace(slopes.min() / 10, slopes.max(), _PRICES)])
