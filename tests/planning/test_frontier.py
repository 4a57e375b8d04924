"""Frontiers of ranks against every combination of ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hsplitlora_flwr.planning import frontier
from hsplitlora_flwr.planning.frontier import Frontier

LAYERS, RANKS = 6, np.array([0, 2, 4, 8])
UNLIMITED = np.full(3, math.inf)


def knapsack(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What ranks cost, ``(layers, ranks, 3)``, and are worth, ``(layers, ranks)``."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 50, (LAYERS, 1, 3)) * RANKS[:, None], rng.exponential(size=(LAYERS, 1)) * np.log2(1 + RANKS)


def built(seed: int, sides: tuple[int, ...], start: Frontier | None = None, inputs: int = 0) -> Frontier:
    costs, values = knapsack(seed)
    front = Frontier.start(LAYERS, sides, 0 if start else 1)
    layers = {0: list(range(LAYERS // 2)), 1: list(range(LAYERS // 2, LAYERS))}
    return front.with_block(layers, costs, np.array([0.0, inputs]), values, UNLIMITED, start)


def every(seed: int, inputs: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs, values and ranks of all combinations."""
    costs, values = knapsack(seed)
    ranks = np.array(list(itertools.product(range(len(RANKS)), repeat=LAYERS)))
    layers = np.arange(LAYERS)
    cost = costs[layers, ranks].sum(axis=1).astype(float)
    cost[:, 0] += inputs * (ranks[:, LAYERS // 2 :] > 0).any(axis=1)
    return cost, values[layers, ranks].sum(axis=1), ranks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inputs", [0, 150])
def test_a_whole_frontier_has_the_best_choice_for_every_budget(seed: int, inputs: int) -> None:
    front, (cost, value, _) = built(seed, (0,), inputs=inputs), every(seed, inputs)
    assert front.whole
    budgets = np.linspace(0, cost[:, 0].max(), 40)
    at = front.best(np.column_stack([budgets, np.full((40, 2), math.inf)]))
    assert front.value[at] == pytest.approx([value[cost[:, 0] <= budget].max() for budget in budgets])
    assert (front.cost[at, 0] <= budgets).all()
    asked = np.linspace(0, value.max(), 40)
    least = front.least(np.full((40, 2), math.inf), asked)
    assert (front.value[least] >= asked - 1e-9).all()


def test_choices_must_have_an_adapter_where_they_start_from_none() -> None:
    start = Frontier.start(LAYERS, (0, 1, 2)).plus(np.array([5.0, 0.0, 7.0]))
    front, (cost, _, ranks) = built(0, (0, 1, 2), start), every(0)
    assert (front.ranks > 0).any(axis=1).all()
    some = ranks.any(axis=1)
    assert front.cost.min(axis=0) == pytest.approx(cost[some].min(axis=0) + np.array([5.0, 0.0, 7.0]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sides", [(0,), (0, 1)])
def test_what_a_thinned_frontier_lost_is_bounded(
    seed: int, sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier, "_FEW", 10)
    monkeypatch.setattr(frontier, "_POINTS", 12)
    front, (cost, value, _) = built(seed, sides), every(seed)
    assert not front.whole and len(front.value) <= 4 * 12
    limits = np.random.default_rng(seed).uniform(0, cost.max(axis=0)[:2], (40, 2))
    if sides == (0,):
        limits[:, 1] = math.inf
    best = np.array([value[(cost[:, :2] <= limit).all(axis=1)].max() for limit in limits])
    found = front.value[front.best(np.column_stack([limits, np.full(40, math.inf)]))]
    bound = front.bound(limits)
    assert (found <= best + 1e-9).all() and (best <= bound + 1e-9).all()
    assert bound.mean() < 1.5 * best.mean()
    if sides == (0,):
        assert found.mean() > 0.9 * best.mean()
