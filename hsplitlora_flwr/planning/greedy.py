"""The greedy rule of the paper (HSplitLoRA, section ARMSC).

Weights are taken by importance, each with the largest rank that still fits; a client's split point is the deepest at
which the important weights of its part all get the highest rank. The server's memory bounds the ranks above the split
points in the same way. Time plays no part.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.problem import Assignment, Choice, Counts, Problem


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
    needed = _bytes_needed(problem, important)
    below = {}
    for number, each in enumerate(problem.classes):
        split = max((split for split in problem.splits if needed[split] <= each.memory), default=problem.splits[0])
        below[number, split] = len(each.members), _fill_client(problem, each.memory, split, order)
    clients = np.zeros(problem.cost.num_blocks, dtype=np.int64)
    for (_, split), (members, _) in below.items():
        clients[split] += members
    return problem.assign(below, _fill_server(problem, clients, order))


def _bytes_needed(problem: Problem, important: NDArray[np.intp]) -> dict[int, float]:
    """What a client needs at each split for the highest rank on the important layers below it."""
    rank = len(problem.ranks) - 1
    needed = {}
    for split in problem.splits:
        wanted = {int(m): rank for m in important if problem.block[m] < split}
        needed[split] = max(problem.floor[split], problem.base[split] + problem.training_bytes(split, wanted))
    return needed


def _fill_client(problem: Problem, memory: float, split: int, order: NDArray[np.intp]) -> Choice:
    """Ranks of the weights below the split: by importance, the largest that still fits."""
    choice: Choice = {}
    opened: set[int] = set()
    room, lowest = memory - problem.base[split], split
    for m in order.tolist():
        block, g = int(problem.block[m]), int(problem.input[m])
        if block >= split:
            continue
        kept = max(lowest - block, 0) * problem.cost.block_bytes + (0.0 if g in opened else problem.input_bytes[g])
        fitting = np.flatnonzero(problem.prices[m] + kept <= room)
        if len(fitting):
            choice[m] = int(fitting[-1])
            room -= problem.prices[m, fitting[-1]] + kept
            lowest = min(lowest, block)
            opened.add(g)
    return choice


def _fill_server(problem: Problem, clients: Counts, order: NDArray[np.intp]) -> Counts:
    """Ranks of the weights above every split: by importance, for all clients alike, what still fits."""
    room = problem.server_room - float(clients @ problem.share)
    if room < 0:
        raise problem.server_too_small(clients)
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
