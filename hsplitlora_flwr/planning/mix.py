"""What the program over all clients pursues, and what it finds: counts of clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hsplitlora_flwr.planning.problem import Array, Counts, Problem

Splits = Mapping[tuple[int, int], int]
"""How many clients, by (class, split)."""


@dataclass(frozen=True)
class Aim:
    """The most value, or the fewest operations of the server, within limits on the totals of all clients.

    Parameters
    ----------
    fewest_flops : bool
        Minimise the operations instead of maximising the value.
    memory : float
        Most bytes of the server for its clients.
    flops : float
        Most operations of the server in a step.
    value : float
        Least value.
    """

    fewest_flops: bool
    memory: float
    flops: float = math.inf
    value: float = -math.inf

    @property
    def weights(self) -> Array:
        """The goal, to be minimised, is ``weights @ (value, memory, flops)``."""
        return np.array([0.0, 0.0, 1.0] if self.fewest_flops else [-1.0, 0.0, 0.0])

    @property
    def rows(self) -> list[tuple[Array, float]]:
        """The limits as ``weights @ (value, memory, flops) <= limit``."""
        rows = [([0.0, 1.0, 0.0], self.memory), ([0.0, 0.0, 1.0], self.flops), ([-1.0, 0.0, 0.0], -self.value)]
        return [(np.array(weights), limit) for weights, limit in rows if math.isfinite(limit)]


@dataclass(frozen=True)
class Mix:
    """Whole counts, and what is proven.

    Parameters
    ----------
    goal : float
        What was minimised: minus the value, or the server's operations; infinite when no plan was found.
    splits : Splits
        Clients by class and split.
    ranks : Counts
        ``(layers, ranks)``; clients that take a rank on a layer above their split.
    bound : float
        No plan has a lower goal; infinite when there is no plan.
    misses : float
        Above 0 where no plan was found, the more the further from one.
    """

    goal: float
    splits: Splits
    ranks: Counts
    bound: float = -math.inf
    misses: float = 0.0

    @classmethod
    def none(cls, bound: float = -math.inf, misses: float = math.inf) -> Mix:
        """No plan."""
        return cls(math.inf, {}, np.zeros((0, 0), dtype=np.int64), bound, misses)

    @property
    def penalty(self) -> tuple[float, float]:
        """For comparison: first by how far from a plan, then by the goal."""
        return self.misses, self.goal


def split_prices(problem: Problem, below: Array, prices: Array) -> Array:
    """Price of a client at each split, ``(classes, L)``, at prices of (value, memory, flops), without adapters above.

    Parameters
    ----------
    problem : Problem
        The costs.
    below : Array
        ``(classes, L)``; the value below each split, minus infinity where a class cannot take it.
    prices : Array
        ``(3,)``; of value, which is 0 or less, memory and flops.
    """
    possible = np.isfinite(below)
    price = prices[0] * np.where(possible, below, 0.0) + prices[1] * problem.share + prices[2] * problem.server_flops
    return np.where(possible, price, math.inf)


def rank_profits(problem: Problem, prices: Array) -> Array:
    """Value less cost of a rank on a layer, ``(layers, ranks)``, at prices of (value, memory, flops)."""
    profits: Array = -(prices[0] * problem.values + prices[1] * problem.prices + prices[2] * problem.flops)
    return profits
