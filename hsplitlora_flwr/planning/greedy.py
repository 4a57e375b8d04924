"""The greedy rule of the paper (HSplitLoRA, section ARMSC).

Weights are taken by importance, each with the largest rank that still fits; a client's split point is the deepest at
which the important weights of its part all get the highest rank. The server's memory bounds the ranks above the split
points in the same way. Time plays no part. A side computes activations again where that lets it have more.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.problem import AdapterCosts, Assignment, Choice, Counts, Problem


def solve(problem: Problem, important_share: float) -> Assignment:
    """Split and ranks by client; the most important weights that together hold ``important_share`` of the importance
    are the important ones.

    Raises
    ------
    PlanError
        If the server has no room for these splits; the text says how many bytes are missing.
    """
    order = np.argsort(-problem.importance, kind="stable")
    held = np.cumsum(problem.importance[order]) - problem.importance[order]  # by those before
    important = order[held < important_share * problem.importance.sum()]
    needed = [_bytes_needed(problem, costs, important) for costs in problem.costs]
    below = {}
    for number, each in enumerate(problem.classes):
        options = []
        for costs, bytes_needed in zip(problem.costs, needed, strict=True):
            fitting = (split for split in problem.splits if bytes_needed[split] <= each.memory)
            split = max(fitting, default=problem.splits[0])
            options.append((split, _fill_client(problem, costs, each.memory, split, order)))
        split, choice = max(options, key=lambda option: (option[0], problem.value(option[1])))
        below[number, split] = len(each.members), choice
    clients = np.zeros(problem.cost.num_blocks, dtype=np.int64)
    for (_, split), (members, _) in below.items():
        clients[split] += members
    above: list[Counts] = []
    shallowest = int(np.flatnonzero(clients)[0])
    for served in problem.serving([shallowest]):
        if served.server_room >= clients @ served.share:
            above.append(_fill_server(served, clients, order))
    if not above:
        raise problem.server_too_small(clients)
    return problem.assign(below, max(above, key=lambda counts: float((counts * problem.values).sum())))


def _bytes_needed(problem: Problem, costs: AdapterCosts, important: NDArray[np.intp]) -> dict[int, float]:
    """What a client needs at each split for the highest rank on the important layers below it."""
    rank = len(problem.ranks) - 1
    wanted = {split: {int(m): rank for m in important if problem.block[m] < split} for split in problem.splits}
    return {split: max(costs.base[split], problem.client_bytes(costs, split, wanted[split])) for split in wanted}


def _fill_client(problem: Problem, costs: AdapterCosts, memory: float, split: int, order: NDArray[np.intp]) -> Choice:
    """Ranks of the weights below the split: by importance, the largest that still fits."""
    choice: Choice = {}
    opened: set[int] = set()
    room, lowest = memory - costs.base[split], split
    for m in order.tolist():
        block, g = int(problem.block[m]), int(problem.input[m])
        if block >= split:
            continue
        kept = max(lowest - block, 0) * costs.block_bytes + (0.0 if g in opened else costs.input_bytes[g])
        fitting = np.flatnonzero(costs.prices[m] + kept <= room)
        if len(fitting):
            choice[m] = int(fitting[-1])
            room -= costs.prices[m, fitting[-1]] + kept
            lowest = min(lowest, block)
            opened.add(g)
    return choice


def _fill_server(problem: Problem, clients: Counts, order: NDArray[np.intp]) -> Counts:
    """Ranks of the weights above every split: by importance, for all clients alike, what still fits."""
    room = problem.server_room - float(clients @ problem.share)
    counts = np.zeros(problem.values.shape, dtype=np.int64)
    above = np.cumsum(clients)
    opened = np.zeros(len(problem.input_bytes), dtype=np.int64)  # clients whose pass an adapter makes keep an input
    for m in order.tolist():
        g = problem.input[m]
        shared = opened[g]
        for waiting, extra in ((shared, 0.0), (above[problem.block[m]] - shared, problem.input_bytes[g])):
            for k in reversed(range(len(problem.ranks))):
                price = problem.prices[m, k] + extra
                taking = waiting if math.isinf(room) else min(waiting, int(room // price))
                counts[m, k] += taking
                waiting, room = waiting - taking, room - taking * price
        opened[g] = max(shared, counts[m].sum())
    return counts
