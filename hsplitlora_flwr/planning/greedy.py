"""The greedy rule of the paper (HSplitLoRA, ARMSC; docs/method.md, section 2): ``plan.planner=greedy``.

Weights are taken in the order of importance over cost, ``J_m / c_m`` (:func:`unit_cost`), each with the largest rank
that still fits. A client's split point is the deepest at which the important weights of its part all get the highest
rank. The server's memory bounds the ranks above the split points in the same way. Time and link play no part; a limit
on the adapters that a client sends does. A side uses activation checkpointing where that lets it have more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hsplitlora_flwr.planning.arrays import Index, Ranks
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.planning.frontier import BYTES, PARAMETERS
from hsplitlora_flwr.planning.problem import Assignment, Problem, Serving
from hsplitlora_flwr.planning.tables import CostTables, TrainingCosts


def solve(problem: Problem, important_share: float, resource: str = "parameters") -> Assignment:
    """The plan of the greedy rule.

    Parameters
    ----------
    problem : Problem
    important_share : float
        The important weights are the most important ones that together hold this share of the importance.
    resource : {"parameters", "flops"}
        What the importance is divided by; see :func:`unit_cost`.

    Raises
    ------
    PlanError
        If the server has no room for these splits; the text says how many bytes are missing.
    """
    orders = {split: _order(problem, resource, split) for split in problem.splits.tolist()}
    above = _order(problem, resource, 0)
    scores = problem.importance[above] / problem.importance.sum()
    important = above[np.cumsum(scores) - scores < important_share]  # the share of those before it
    chosen = Assignment(
        np.zeros(len(problem.names), np.intp), np.zeros((len(problem.names), len(problem.block)), np.uint8)
    )
    reached = np.full(len(problem.names), -np.inf)
    for (index, tables), costs in ((group, costs) for group in problem.groups for costs in group[1].costs):
        splits = _deepest(problem, index, tables, costs, important)
        for split in np.unique(splits).tolist():
            clients = index[splits == split]
            ranks = _fill_clients(problem, costs, split, orders[split], clients)
            value, before = problem.total(problem.values, ranks), chosen.splits[clients]
            better = (split > before) | ((split == before) & (value > reached[clients]))
            reached[clients[better]] = value[better]
            chosen.splits[clients[better]], chosen.ranks[clients[better]] = split, ranks[better]
    lowest, missing, plans = int(chosen.splits.min()), math.inf, []
    for serving in (each for costs in problem.tables.costs for each in problem.servings(costs, lowest)):
        room = serving.room - serving.per_client[chosen.splits].sum()
        missing = min(missing, -room)
        if room >= 0:
            plans.append(_fill_server(problem, serving, chosen, room, above))
    if not plans:
        raise problem.server_too_small(missing)
    return max(plans, key=problem.objective)


def unit_cost(
    layers: Sequence[Layer], resource: str = "parameters", rank: int = 8, *, server: bool = False
) -> dict[str, float]:
    """``c_m``: what one unit of rank on each weight of a side costs (docs/method.md, section 1).

    An adapter's own cost is proportional to ``in + out`` in parameters and in FLOPs alike. What differs in FLOPs is how
    far the frozen backward pass must reach. It runs through block ``j`` of a client only if a weight below ``j`` has an
    adapter; on the server it reaches the cut in any case. So:

    - ``parameters``: ``in + out``.
    - ``flops``, per token: ``6 (in + out)`` for the products with ``A`` and ``B``, the gradients of both, and the
      gradient of the input; on a client, in addition, an equal share of the frozen backward pass through each block
      above the weight's own: ``F_j / (rank * n_j)`` for every block ``j > b(m)``, where ``F_j = 2 sum of in * out``
      over the block's linear layers and ``n_j`` is the number of weights below it. This is the Shapley value of the
      backward pass among the units of rank when every weight holds ``rank`` of them (the "airport game" of Littlechild
      and Owen, 1973). The way inside the weight's own block, attention scores, norms and activation functions are not
      counted.

    Parameters
    ----------
    layers : Sequence[Layer]
        All linear layers of the side's blocks, in their order.
    resource : {"parameters", "flops"}
        What is counted.
    rank : int
        Rank of the adapters that share the backward pass; only ``flops`` depends on it.
    server : bool
        Whether the side is the server's.

    Returns
    -------
    dict[str, float]
        By absolute layer name.

    Raises
    ------
    ValueError
        If ``resource`` is unknown or ``rank`` is below 1.
    """
    if resource not in ("parameters", "flops"):
        raise ValueError(f"resource={resource!r} is not known; choose 'parameters' or 'flops'")
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    sizes = {layer.name: float(layer.adapter_parameters(1)) for layer in layers}
    if resource == "parameters":
        return sizes
    costs: dict[str, float] = {}
    below, reach = len(layers), 0.0
    for block in sorted({layer.block for layer in layers}, reverse=True):
        of_block = [layer for layer in layers if layer.block == block]
        costs |= {layer.name: 6 * sizes[layer.name] + reach for layer in of_block}
        below -= len(of_block)
        if below and not server:
            reach += 2.0 * sum(layer.in_features * layer.out_features for layer in of_block) / (rank * below)
    return costs


def _order(problem: Problem, resource: str, split: int) -> Index:
    """Layers by falling ``J_m / c_m``: those of a client with this split or, for split 0, those of the server."""
    layers = [layer for layer in problem.cost.all_layers if not split or layer.block < split]
    costs = unit_cost(layers, resource, int(problem.ranks[-1]), server=not split)
    mine = [m for m, layer in enumerate(problem.cost.layers) if layer.name in costs]
    scores = np.array([problem.importance[m] / costs[problem.cost.layers[m].name] for m in mine])
    order: Index = np.array(mine)[np.argsort(-scores, kind="stable")]
    return order


def _deepest(problem: Problem, clients: Index, tables: CostTables, costs: TrainingCosts, important: Index) -> Index:
    """``(clients,)``; the deepest split at which the important layers of each client get the highest rank; the lowest
    split if there is none, or clients have no adapters."""
    if not problem.may_train:
        return np.full(len(clients), problem.splits[0])
    wanted = np.zeros((len(problem.splits), len(problem.block)), np.uint8)
    wanted[:, important] = len(problem.ranks) - 1
    wanted[problem.block >= problem.splits[:, None]] = 0
    lowest = np.where(wanted > 0, problem.block, problem.cost.num_blocks).min(axis=1)
    reaching = np.maximum(problem.splits - lowest, 0)[:, None] * costs.block
    cost = problem.total(costs.below, wanted) + reaching
    needed = costs.base[problem.splits] + cost[:, BYTES] + problem.kept(costs.inputs_below, wanted)
    needed = np.maximum(needed, tables.floor[problem.splits])
    fits = needed <= problem.memory[clients, None]
    fits &= cost[:, PARAMETERS] <= problem.adapters[clients, None]
    deepest = len(problem.splits) - 1 - fits[:, ::-1].argmax(axis=1)
    splits: Index = np.where(fits.any(axis=1), problem.splits[deepest], problem.splits[0])
    return splits


def _fill_clients(problem: Problem, costs: TrainingCosts, split: int, order: Index, clients: Index) -> Ranks:
    """Ranks below the split, ``(clients, layers)``: in ``order``, the largest that still fits."""
    ranks = np.zeros((len(clients), len(problem.block)), np.uint8)
    if not problem.may_train:
        return ranks
    room, spare = problem.memory[clients] - costs.base[split], problem.adapters[clients].copy()
    lowest, opened = np.full(len(clients), split), np.zeros((len(clients), len(costs.inputs_below)), bool)
    for m in order.tolist():
        block, g = int(problem.block[m]), int(problem.input[m])
        kept = np.maximum(lowest - block, 0) * costs.block[BYTES] + ~opened[:, g] * costs.inputs_below[g]
        price, parameters = costs.below[m, :, BYTES], costs.below[m, :, PARAMETERS]
        fits = (price + kept[:, None] <= room[:, None]) & (parameters <= spare[:, None])
        k = np.maximum(fits.sum(axis=1) - 1, 0)
        taken = k > 0
        ranks[:, m] = k
        room -= np.where(taken, price[k] + kept, 0.0)
        spare -= parameters[k]
        lowest, opened[:, g] = np.where(taken, np.minimum(lowest, block), lowest), opened[:, g] | taken
    return ranks


def _fill_server(problem: Problem, serving: Serving, plan: Assignment, room: float, order: Index) -> Assignment:
    """The plan with ranks above the splits: in ``order``, the largest that still fits, for all clients alike."""
    ranks, shared = plan.ranks.copy(), problem.cost.workload.half == "shared"
    opened = np.zeros((len(plan.splits), len(serving.inputs)), bool)
    for m in order.tolist():
        g, above = problem.input[m], plan.splits <= problem.block[m]
        for cheap in (True, False):
            waiting = np.flatnonzero(above & (opened[:, g] == cheap))
            for k in range(len(problem.ranks) - 1, 0, -1):
                price = serving.adapters[m, k, BYTES] + (0.0 if cheap else serving.inputs[g])
                units = 1 if shared else len(waiting)
                taking = units if math.isinf(room) else min(units, int(room // price))
                takers, waiting = (waiting, waiting[:0]) if shared and taking else np.split(waiting, [taking])
                ranks[takers, m], opened[takers, g] = k, True
                room -= price * taking if len(takers) else 0.0
    return Assignment(plan.splits, ranks)
