"""The optimal plan, in two stages.

First the value ``sum_i sum_m J_m log2(1 + r_im)`` is maximised, then the predicted round is made as short as it gets
while the value stays within a tolerance. Importance is global, which cuts the problem in two: below its split point a
client is on its own (:mod:`hsplitlora_flwr.planning.knapsack`), above it clients are alike
(:mod:`hsplitlora_flwr.planning.program`).

A round lasts as long as the slowest client's own time plus the server's. For a fixed limit on the slowest client, the
splits and ranks that take longer drop out and the rest is as without it. The limit is one number, searched by branch
and bound: a longer limit never costs value, nor time of the server.

Where activations may be computed again, each knapsack says which of the two is worth more. The server's side is solved
for each way in which it may serve (:meth:`hsplitlora_flwr.planning.problem.Problem.serving`), unless one has room for
everything, and so is the second stage, with the shallowest split of each way that has enough value.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from hsplitlora_flwr.planning.cost import PlanError
from hsplitlora_flwr.planning.knapsack import EPS, Knapsack
from hsplitlora_flwr.planning.mix import Aim, Mix
from hsplitlora_flwr.planning.problem import Array, Assignment, Problem
from hsplitlora_flwr.planning.program import solve_program

GAP = 1e-4
"""The value is the best to within this share; ``Solution.bound`` proves it."""
TIME_GAP = 0.02
"""The round is the shortest to within this share."""
_KNAPSACKS = 240  # integer programs for single clients, largest gap first, over the number of classes
_SEARCHES = 30  # limits of the slowest client that are tried
_SERVINGS = 8  # ranges of the shallowest split that are tried for more value, once there is a plan


@dataclass(frozen=True)
class Solution:
    """A plan.

    Parameters
    ----------
    mix : Mix
        Counts of clients by split, and of ranks above it.
    limit : float
        Of the knapsacks below.
    value : float
        The objective.
    own : float
        Seconds of the slowest client.
    served : float
        Seconds of the server.
    bound : float
        No plan within the same limits has more value.
    """

    mix: Mix
    limit: float
    value: float
    own: float
    served: float
    bound: float = math.inf

    @property
    def seconds(self) -> float:
        """Of the round."""
        return self.own + self.served


def solve(problem: Problem, deadline: float | None, tolerance: float) -> tuple[Assignment, float]:
    """The shortest round among the plans whose value is within ``tolerance`` of the best.

    Returns
    -------
    assignment : Assignment
        Split and ranks by client.
    bound : float
        No plan has more value.

    Raises
    ------
    PlanError
        If no plan fits the server's memory or meets the deadline; the text says what is missing.
    """
    found, bound = _best(problem, deadline)
    target = (1 - tolerance) * max(best.value for _, best in found)
    reaching: dict[tuple[bool, bool], tuple[_Planner, Solution]] = {}
    for planner, best in found:
        if best.value >= target:  # the first of a way has the shallowest split, and so the most freedom
            reaching.setdefault((planner.problem.served.recompute, bool(planner.problem.shallowest)), (planner, best))
    rounds = [(planner, planner.shorten(best, target)) for planner, best in reaching.values()]
    planner, fastest = min(rounds, key=lambda each: each[1].seconds)
    # What the shortest round leaves room for goes back to the ranks, and so does a little of its time.
    spare = TIME_GAP / 4 * fastest.seconds
    richest = planner.maximise(fastest.own, min(fastest.served + spare, (deadline or math.inf) - fastest.own), 10 * GAP)
    chosen = max((s for s in (fastest, richest) if s), key=lambda s: s.value)
    return planner.assign(chosen), bound


def _best(problem: Problem, deadline: float | None) -> tuple[list[tuple[_Planner, Solution]], float]:
    """The most value for the ways of serving that are worth trying, and a bound of all.

    Nothing else is tried where one that forbids nothing and computes nothing twice has room for every adapter at its
    highest rank. Where the shallowest split decides about room, it is searched by branch and bound.
    """
    knapsack, order = Knapsack(problem), count()
    found: list[tuple[_Planner, Solution]] = []
    most, bound, late = -math.inf, -math.inf, None
    first, *deeper = problem.shallowest_splits()
    ways = [*problem.serving([first])] + [way for way in problem.serving(deeper) if way.shallowest]
    waiting = [(-math.inf, next(order), way) for way in ways]  # (-bound, tie, way)
    for tried in count():
        if not waiting or -waiting[0][0] <= most * (1 + GAP) or (found and tried >= len(ways) + _SERVINGS):
            break
        _, _, way = heapq.heappop(waiting)
        planner = _Planner(way, knapsack)
        try:
            best = planner.best(deadline)
        except PlanError as error:
            late = late or error
            continue
        if best is None:
            continue
        highest = max(best.bound, best.value)
        for part in way.parts(min(split for _, split in best.mix.splits)):
            heapq.heappush(waiting, (-highest, next(order), part))
        if len(way.shallowest) <= 1:  # else it is more than the server has room for, and its value a bound
            found.append((planner, best))
            most, bound = max(most, best.value), max(bound, highest)
            if way.served is problem.costs[0] and way.splits == problem.splits and planner.has_room_for_everything():
                waiting = []
    if not found:
        clients = np.bincount(planner.deepest(), problem.sizes, problem.cost.num_blocks).astype(np.int64)
        raise late or problem.server_too_small(clients)
    return found, max([bound, *(-highest for highest, _, _ in waiting)])


class _Planner:
    def __init__(self, problem: Problem, knapsack: Knapsack) -> None:
        self.problem, self.knapsack = problem, knapsack
        self._knapsacks = _KNAPSACKS // len(problem.classes)
        self._allowed = np.arange(problem.cost.num_blocks) >= problem.splits[0]
        self.shortest = np.where(self._allowed, knapsack.shortest, math.inf)

    def best(self, deadline: float | None) -> Solution | None:
        """The most value; None when the server's memory is too small.

        Raises
        ------
        PlanError
            If no plan meets the deadline.
        """
        best = self.maximise(math.inf, math.inf)
        return best if best is None or deadline is None or best.seconds <= deadline else self.maximise_within(deadline)

    def has_room_for_everything(self) -> bool:
        """Whether the server's memory holds the highest rank on every layer, wherever the clients are split."""
        problem, blocks = self.problem, self.problem.cost.num_blocks
        of_block = np.bincount(problem.block, problem.prices[:, -1], blocks)
        of_block += np.bincount(problem.input_block, problem.input_bytes, blocks)
        above = np.cumsum(of_block[::-1])[::-1]  # of the blocks from a split up
        splits = list(problem.splits)
        return bool(problem.sizes.sum() * (problem.share + above)[splits].max() <= problem.server_room)

    def maximise(self, limit: float, server_limit: float, gap: float = GAP) -> Solution | None:
        """The most value, to within a share ``gap``, when a client may take ``limit`` seconds and the server
        ``server_limit``; None when there is no such plan."""
        below = self._below(limit)
        flops = server_limit * (1 + EPS) / self.problem.server_seconds(1.0)
        aim = Aim(False, self.problem.server_room, flops=flops)
        bound = math.inf
        while True:
            mix = solve_program(self.problem, below, aim, gap / 2)
            bound = min(bound, -mix.bound)
            if math.isinf(mix.goal):
                return None
            if not self._tighten(mix, below, limit, gap / 2 * bound):
                return replace(self._solution(mix, limit), bound=bound)

    def fewest_seconds(self, limit: float, target: float) -> tuple[float, Solution | None]:
        """The least time of the server when a client may take ``limit`` seconds and the value is at least ``target``,
        as a lower bound in seconds, infinite when there is no such plan, and a plan when one was found."""
        below = self._below(limit)
        aim, bound, proves = Aim(True, self.problem.server_room, value=target), 0.0, True
        for _ in range(_SEARCHES):
            mix = solve_program(self.problem, below, aim, TIME_GAP / 2)
            if proves:
                bound = max(bound, self.problem.server_seconds(mix.bound))
            if math.isinf(mix.goal):
                break
            solution = self._solution(mix, limit)
            if solution.value >= target * (1 - EPS):
                return bound, solution
            if not self._tighten(mix, below, limit, 10 * GAP * target):
                # What is missing is small: the value below is taken as what was found, no longer as a bound.
                proves = False
                for number, split in mix.splits:
                    below[number, split] = self.knapsack.solve(number, split, limit, math.inf).value
        return bound, None

    def shorten(self, known: Solution, target: float) -> Solution:
        """The shortest round with at least ``target`` of value; at worst the ``known`` one."""
        best, order = known, count()
        low, high = float(self.shortest.min(axis=1).max()), self._longest()
        served, found = self.fewest_seconds(high, target)
        # (bound, tie, low, high, served): with limits in (low, high] the server takes at least `served`
        intervals = [(low + served, next(order), low, high, served)]
        for _ in range(_SEARCHES):
            best = min((s for s in (best, found) if s), key=lambda s: s.seconds)
            if not intervals or intervals[0][0] >= best.seconds * (1 - TIME_GAP):
                break
            _, _, low, high, served = heapq.heappop(intervals)
            middle = (low + min(high, best.seconds - served)) / 2
            heapq.heappush(intervals, (middle + served, next(order), middle, high, served))
            served, found = self.fewest_seconds(middle, target)
            if found:  # a limit between what was taken and what was given changes nothing
                heapq.heappush(intervals, (found.own + served, next(order), found.own, middle, served))
                middle = found.own
            if middle > low:
                heapq.heappush(intervals, (low + served, next(order), low, middle, served))
        return best

    def maximise_within(self, deadline: float) -> Solution:
        """The most value of a round within ``deadline`` seconds."""
        best = self._shortest_round()
        if best.seconds > deadline:
            raise PlanError(
                f"no plan meets the deadline of {deadline:g} s: the shortest possible round takes "
                f"{best.seconds:.3g} s. Raise plan.deadline, or lower train.steps, train.batch_size or data.max_length"
            )
        order = count()
        low, high = float(self.shortest.min(axis=1).max()), min(deadline, self._longest())
        # (-bound, tie, low, high): limits in [low, high]
        intervals = [(-math.inf, next(order), low, high)]
        settled = best.value
        for _ in range(_SEARCHES):
            if not intervals or -intervals[0][0] <= best.value * (1 + GAP):
                break
            _, _, low, high = heapq.heappop(intervals)
            loosest = self.maximise(high, deadline - low)
            if loosest is None:
                continue
            if loosest.seconds <= deadline:
                best = max(best, loosest, key=lambda s: s.value)
                settled = max(settled, loosest.bound)
                continue
            middle = (low + high) / 2
            if found := self.maximise(middle, deadline - middle):
                best = max(best, found, key=lambda s: s.value)
            for part in ((low, middle), (middle, high)):
                heapq.heappush(intervals, (-loosest.bound, next(order), *part))
        return replace(best, bound=max([best.value, settled, *(-interval[0] for interval in intervals)]))

    def deepest(self) -> list[int]:
        """The deepest split that each class can hold."""
        return [int(np.flatnonzero(np.isfinite(row))[-1]) for row in self.shortest]

    def _below(self, limit: float) -> Array:
        """Bounds of the value below every split, minus infinity at those that are not allowed."""
        return np.where(self._allowed, self.knapsack.bounds(limit), -math.inf)

    def _tighten(self, mix: Mix, below: Array, limit: float, slack: float) -> bool:
        """Solve the knapsacks of a plan until together they are within ``slack`` of the bounds that it was made with.
        True when a bound fell, and another plan may be better."""
        gaps = []
        for (number, split), clients in mix.splits.items():
            ranks = self.knapsack.solve(number, split, limit, math.inf)
            gaps.append((clients * (float(below[number, split]) - ranks.value), clients, number, split))
        total, fell = math.fsum(gap for gap, *_ in gaps), 0.0
        for gap, clients, number, split in sorted(gaps, reverse=True):
            if total <= slack or not self._knapsacks:
                break
            self._knapsacks -= 1
            ranks = self.knapsack.solve(number, split, limit, GAP / 4 * float(below[number, split]))
            fell += clients * (float(below[number, split]) - ranks.bound)
            below[number, split] = ranks.bound
            total += clients * (ranks.bound - ranks.value) - gap
        return fell > slack / 2

    def assign(self, solution: Solution) -> Assignment:
        """The plan by client."""
        below = {
            key: (clients, self.knapsack.solve(*key, solution.limit, math.inf).choice)
            for key, clients in solution.mix.splits.items()
        }
        return self.problem.assign(below, solution.mix.ranks)

    def _solution(self, mix: Mix, limit: float) -> Solution:
        problem = self.problem
        value, own = float((mix.ranks * problem.values).sum()), 0.0
        flops = float((mix.ranks * problem.flops).sum())
        for (number, split), clients in mix.splits.items():
            ranks = self.knapsack.solve(number, split, limit, math.inf)
            value += clients * ranks.value
            flops += clients * float(problem.server_flops[split])
            own = max(own, problem.seconds(number, split, ranks.choice))
        return Solution(mix, limit, value, own, problem.server_seconds(flops))

    def _longest(self) -> float:
        """Seconds of the slowest client at its deepest split with the highest ranks."""
        problem = self.problem
        every = {layer.name: int(problem.ranks[-1]) for layer in problem.cost.layers}
        again = problem.costs[-1].recompute
        flops = {split: problem.cost.client_flops(split, every, recompute=again) for split in problem.splits}
        return max(problem.own_seconds(number, flops[split]) for number, split in enumerate(self.deepest()))

    def _shortest_round(self) -> Solution:
        """The shortest round of all: with a limit on the slowest client, each client takes its deepest split, which
        also costs the server the least; no adapters above. The limit is the time of some client at some split."""
        problem, own = self.problem, self.shortest
        first, total = problem.splits[0], problem.sizes.sum()
        number, split = np.nonzero(np.isfinite(own))
        order = np.argsort(own[number, split], kind="stable")
        number, split = number[order], split[order]
        limits, size, deeper = own[number, split], problem.sizes[number], split > first
        saved = np.where(deeper, problem.server_flops[split - 1] - problem.server_flops[split], 0.0)
        released = np.where(deeper, problem.share[split - 1] - problem.share[split], 0.0)
        flops = total * problem.server_flops[first] - np.cumsum(size * saved)
        memory = total * problem.share[first] - np.cumsum(size * released)
        possible = (limits >= own[:, first].max()) & (memory <= problem.server_room)
        limit = float(limits[np.argmin(np.where(possible, limits + problem.server_seconds(1.0) * flops, math.inf))])
        deepest = [int(np.flatnonzero(row <= limit)[-1]) for row in own]
        splits = {(n, split): int(problem.sizes[n]) for n, split in enumerate(deepest)}
        none = np.zeros(problem.values.shape, dtype=np.int64)
        return self._solution(Mix(math.inf, splits, none), limit)
