"""The best plan: splits and ranks of the clients, and ranks of the server.

Every client first gets the split point that it would have alone with the server, where its ranks below and the server's
above are worth most and, within the tolerance, the round is shortest. That is a floor: what others have can move its
cut deeper but never above it, save for a deadline. With one shared half the server takes one rank for each of its
weights, which counts for the clients whose split is at or below it; splits and these ranks follow each other until
nothing changes. With a half for each client :mod:`hsplitlora_flwr.planning.priced` hands the server's memory out. Last,
the round is made as short as it gets while every client keeps its own value within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.bound import bound_below
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.frontier import Frontier, add_block
from hsplitlora_flwr.planning.lower import Lower
from hsplitlora_flwr.planning.priced import Market, half_frontiers
from hsplitlora_flwr.planning.problem import Assignment, Costs, Problem

SAME = 1e-12
"""Values that differ by less are alike."""
_POINTS = 2000  # choices of the server's ranks that are kept
_TURNS = 6  # of splits and the server's ranks
_HALVINGS = 16  # of what a deadline takes
_SERVER_GIVES = 5  # shares of the tolerance that the server's ranks may give up

Mask = NDArray[np.bool_]


class Upper(NamedTuple):
    """The server's ranks, ``(layers,)`` of a shared half or ``(clients, layers)``; with them clients may be split where
    ``allowed``, ``(clients, splits)``."""

    costs: Costs
    ranks: Ranks
    allowed: Mask


class Solver:
    """Plans a problem. Splits are indices into ``Problem.splits``.

    Parameters
    ----------
    problem : Problem
    tolerance : float
        Share of its value that every client may give up for a shorter round.
    deadline : float or None
        Longest round in seconds.
    """

    def __init__(self, problem: Problem, tolerance: float, deadline: float | None) -> None:
        self.problem, self.tolerance, self.deadline = problem, tolerance, deadline
        self.lower = Lower(problem, deadline is not None)
        self.values, _ = self.lower.best()
        self.alone, self.outlook, self.floor = self._alone()
        self.proven = math.inf

    def solve(self) -> Assignment:
        """The plan.

        Raises
        ------
        PlanError
            If no plan fits the server's memory or meets the deadline; the text says what is missing.
        """
        p = self.problem
        alone = self.alone[int(self.floor[0])]
        if len(p.names) == 1 and self.deadline is None and math.isfinite(alone[1]):
            upper = Upper(alone[0], alone[2], np.arange(len(p.splits)) == self.floor[:, None])
        elif p.cost.workload.half == "shared":
            upper = self._shared()
        else:
            upper = self._per_client()
        fewer, splits, limit, seconds = self._shortest(upper, self.tolerance)
        if self.deadline is None or seconds <= self.deadline:
            return self._fill(fewer, splits, limit)
        return self._in_time(upper, self.deadline)

    def bound(self) -> float:
        """No plan has more value."""
        p, held = self.problem, np.isfinite(self.values)
        more = 0.0 if self.lower.whole else np.where(held, bound_below(p) - np.where(held, self.values, 0.0), 0.0)
        reached = self.values + more + self.outlook
        return float(min(p.share @ reached.max(axis=1), self.proven + p.share @ np.max(more + 0.0 * held, axis=1)))

    # ------------------------------------------------------------------ the server's ranks

    def best_above(self, costs: Costs, weights: Array, rooms: Array) -> Ranks:
        """``(splits, layers)``; the best ranks of the server from each split up in so many bytes, ``(splits,)``, where
        the values of a block's layers count ``weights``, ``(L,)``."""
        p = self.problem
        values = p.values * weights[p.block, None]
        most = np.where(values[:, -1] > 0, len(p.ranks) - 1, 0)
        ranks = np.where(p.block >= p.splits[:, None], most, 0).astype(np.uint8)
        scarce = p.total(costs.above, ranks) + p.kept(costs.inputs_above, ranks) > rooms
        if not (scarce & (rooms >= 0)).any():
            return ranks
        front, splits = Frontier.empty(len(p.block), 1, _POINTS), p.splits.tolist()
        ranks[scarce] = 0
        for block in range(p.cost.num_blocks - 1, splits[int(np.argmax(scarce))] - 1, -1):
            front = add_block(front, p, block, costs.above, costs.inputs_above, values, float(rooms[scarce].max()))
            if block in splits and scarce[s := splits.index(block)] and rooms[s] >= 0:
                ranks[s] = front.ranks[np.searchsorted(front.cost[:, 0], rooms[s], "right") - 1]
        return ranks

    def _frontier_above(self, upper: Upper) -> Frontier:
        """The server's choices from the lowest split up, where all that it serves count alike."""
        p = self.problem
        front, lowest = Frontier.empty(len(p.block), 1, _POINTS), int(p.splits[upper.allowed.any(axis=0).argmax()])
        for block in range(p.cost.num_blocks - 1, lowest - 1, -1):
            front = add_block(front, p, block, upper.costs.above, upper.costs.inputs_above, p.values, math.inf)
        return front

    def weights(self, splits: Index) -> Array:
        """``(L,)``; share of the clients whose split is at or below each block."""
        p = self.problem
        return np.cumsum(np.bincount(p.splits[splits], p.share, p.cost.num_blocks))

    def _alone(self) -> tuple[list[tuple[Costs, float, Ranks]], Array, Index]:
        """The server's way, value and ranks for a client alone, by split, of the last group; that value of every
        client, ``(clients, splits)``; and its split."""
        p, (above, work) = self.problem, np.empty((2, *self.values.shape))
        for index, group in p.groups:
            alone = self._alone_with(group)
            above[index] = [value for _, value, _ in alone]
            parameters = np.diag(p.from_split_up(p.parameters, np.stack([ranks for *_, ranks in alone])))
            work[index] = [c.served[s] + c.work * n for (c, *_), s, n in zip(alone, p.splits, parameters, strict=True)]
        reached = self.values + above
        least = self._least((1 - self.tolerance) * reached.max(axis=1), above, np.isfinite(reached))
        seconds = p.own_seconds(*least, p.speed_alone) + p.steps * work / p.server_speed_alone[:, None]
        deepest_first = seconds[:, ::-1].argmin(axis=1)
        none = ~np.isfinite(reached).any(axis=1)  # not even alone
        deepest = np.isfinite(self.values)[:, ::-1].argmax(axis=1)
        return alone, above, len(p.splits) - 1 - np.where(none, deepest, deepest_first)

    def _alone_with(self, group: Problem) -> list[tuple[Costs, float, Ranks]]:
        """The server's way, value and ranks for one client of a group, by split."""
        p = self.problem
        ways: list[list[tuple[Costs, float, Ranks]]] = []
        for costs in group.costs:
            rooms = room(group, costs, 1)
            ranks = self.best_above(costs, np.ones(p.cost.num_blocks), rooms)
            value = np.where(rooms < 0, -np.inf, np.diag(p.from_split_up(p.values, ranks)))
            ways.append(list(zip([costs] * len(value), value.tolist(), ranks, strict=True)))
        return [max(way, key=lambda each: each[1]) for way in zip(*ways, strict=True)]

    def _shared(self) -> Upper:
        """The ranks that all clients share, and where they may be split."""
        p, count, best = self.problem, len(self.problem.splits), -math.inf
        held = np.isfinite(self.values)
        places, floor = np.arange(count), 0 if self.deadline else self.floor[:, None]
        missing, found = math.inf, None
        for costs in p.costs:
            rooms = room(p, costs, len(p.names))
            for lowest in range(count):
                allowed = held & (places >= np.maximum(floor, lowest))
                if not allowed.any(axis=1).all():
                    break
                missing = min(missing, -rooms[lowest])
                if (
                    rooms[lowest] < 0
                    or p.share @ np.where(allowed, self.values + self.outlook, -np.inf).max(axis=1) <= best
                ):
                    continue
                only = np.where(places == lowest, rooms, -1.0)
                for start in (allowed.argmax(axis=1), count - 1 - allowed[:, ::-1].argmax(axis=1)):
                    splits = start
                    for _ in range(_TURNS):
                        ranks = self.best_above(costs, self.weights(splits), only)[lowest]
                        reached = np.where(allowed, self.values + p.from_split_up(p.values, ranks), -np.inf)
                        if (value := float(p.share @ reached.max(axis=1))) > best + SAME:
                            best, found = value, Upper(costs, ranks, allowed)
                        before, splits = splits, reached.argmax(axis=1)
                        if (before == splits).all():
                            break
        if found is None:
            raise p.server_too_small(missing)
        return found

    def _per_client(self) -> Upper:
        """The ranks of every client's own half, and where it may be split."""
        p, places = self.problem, np.arange(len(self.problem.splits))
        held, floor = np.isfinite(self.values), 0 if self.deadline else self.floor[:, None]
        best, price, missing, found = -math.inf, 0.0, math.inf, None
        fronts: dict[tuple[bool, int], list[Frontier]] = {}
        self.proven = -math.inf
        for lowest in places.tolist():
            allowed = held & (places >= np.maximum(floor, lowest))
            if not allowed.any(axis=1).all() or (found and not price):
                break
            deepest = p.splits[len(places) - 1 - allowed[:, ::-1].argmax(axis=1)]
            for costs in p.costs:
                for number, way in enumerate(p.ways(costs, int(p.splits[lowest]))):
                    missing = min(missing, float(way.taken[deepest].sum()) - way.room)
                    if (key := (costs.recompute, number)) not in fronts:
                        fronts[key] = half_frontiers(p, way)
                    market = Market(p, way, fronts[key], self.values, allowed)
                    if market.bound(price) > best + SAME and (handed := market.hand_out()):
                        self.proven = max(self.proven, market.bound(handed.price))
                        if handed.value > best + SAME:
                            best, price = handed.value, handed.price
                            deeper = places >= (handed.splits[:, None] if price else 0)
                            found = Upper(costs, handed.ranks, allowed & deeper)
        if found is None:
            raise p.server_too_small(missing)
        return found

    # ------------------------------------------------------------------ time

    def _least(self, target: Array, above: Array, allowed: Mask) -> tuple[Array, Mask]:
        """``(clients, splits)``; the fewest operations of a client for so much value, ``(clients,)``, with the server's
        ranks, and whether these are those of no adapters."""
        possible = allowed & np.isfinite(above)
        flops, choice = self.lower.least(
            np.where(possible, target[:, None] - np.where(possible, above, 0.0) - SAME, np.inf)
        )
        return flops, self.lower.is_without(choice)

    def _shortest(self, upper: Upper, tolerance: float) -> tuple[Upper, Index, float, float]:
        """The shortest round in which every client keeps its value within the tolerance: the server's ranks, splits,
        and seconds of the slowest client and of the round. The server may give up ranks too."""
        p, found = self.problem, []
        above, lowest = p.from_split_up(p.values, upper.ranks), int(upper.allowed.any(axis=0).argmax())
        reached = (self.values + above)[:, lowest:].max(axis=1)
        # Where the server has room for all, also what a client would have with a lower split than any has.
        free = above[..., lowest] >= self.outlook[:, lowest] - SAME
        best = np.where(free, (self.values + self.outlook).max(axis=1), reached)
        target = np.minimum((1 - tolerance) * best, np.where(upper.allowed, self.values + above, -np.inf).max(axis=1))
        frontier = self._frontier_above(upper) if tolerance else Frontier.empty(len(p.block), 1, 1)
        for given in np.linspace(0, tolerance, _SERVER_GIVES if tolerance else 1):
            ranks = upper.ranks
            if given:
                enough = (1 - given) * frontier.value[-1] - SAME
                ranks = np.minimum(ranks, frontier.ranks[np.argmax(frontier.value >= enough)])
            above = p.from_split_up(p.values, ranks)
            own = p.own_seconds(*self._least(target, above, upper.allowed), p.speed)
            if np.isfinite(own).any(axis=1).all():
                work = upper.costs.served[p.splits] + upper.costs.work * p.from_split_up(p.parameters, ranks)
                served = np.broadcast_to(p.steps * work / p.server_speed, own.shape)
                found.append((upper._replace(ranks=ranks), *_sweep(own, served)))
        return min(found, key=lambda each: each[3])

    def _fill(self, upper: Upper, splits: Index, limit: float) -> Assignment:
        """The best ranks of clients at their splits, for whom a round may take so many seconds."""
        p, clients = self.problem, np.arange(len(splits))
        value, choice = self.lower.best((limit * (1 + SAME) / p.steps - p.wire) * p.speed * (1 + SAME))
        choice = self.lower.else_least(value, choice)  # without adapters less comes over the wire
        at = p.splits[splits]
        below = self.lower.ranks(at, choice[clients, splits])
        return Assignment(at, np.where(p.block < at[:, None], below, upper.ranks).astype(np.uint8))

    def _in_time(self, upper: Upper, deadline: float) -> Assignment:
        """The plan for a deadline: everybody gives up the same share of its value, as little as will do, and clients
        take what time is left.

        Raises
        ------
        PlanError
            If there is none.
        """
        plans, shortest = [], math.inf
        for each in (upper, *self._lowest_cuts()):
            done = self._shortest(each, 1.0)
            shortest = min(shortest, done[3])
            if done[3] > deadline * (1 + SAME):
                continue
            low, high = self.tolerance, 1.0
            for _ in range(_HALVINGS):
                tolerance = (low + high) / 2
                tried = self._shortest(each, tolerance)
                if tried[3] <= deadline:
                    high, done = tolerance, tried
                else:
                    low = tolerance
            fewer, splits, limit, seconds = done
            plans.append(self._fill(fewer, splits, limit + max(deadline - seconds, 0.0)))
        if not plans:
            raise PlanError(
                f"no plan meets the deadline of {deadline:g} s: the shortest possible round takes {shortest:.3g} s. "
                "Raise plan.deadline, or lower train.steps, train.batch_size or data.max_length"
            )
        return max(plans, key=self.problem.objective)

    def _lowest_cuts(self) -> Iterator[Upper]:
        """Without any ranks on the server: clients split in all places that it has room for, if all of them are, or
        nowhere above the splits with which the slowest of them is done first."""
        p, clients = self.problem, len(self.problem.names)
        ranks, held = np.zeros(len(p.block), np.uint8), np.isfinite(self.values)
        for costs in p.costs:
            allowed = held & [self._serves(costs, np.full(clients, split)) for split in p.splits]
            if allowed.any(axis=1).all():
                yield Upper(costs, ranks, allowed)
            if (least := self._first_served(costs, held)) is not None:
                yield Upper(costs, ranks, held & (np.arange(len(p.splits)) >= least[:, None]))

    def _first_served(self, costs: Costs, held: Mask) -> Index | None:
        """``(clients,)``; the deepest splits within the shortest time of the slowest client that the server has room
        for. Deeper splits take less of its memory and of its time, and more time lets clients be split deeper."""
        p = self.problem
        own = p.own_seconds(*self._least(np.zeros(len(held)), np.zeros(held.shape), held), p.speed)
        limits = np.unique(own[own >= own.min(axis=1).max()])

        def deepest(limit: float) -> Index:
            splits: Index = own.shape[1] - 1 - (own <= limit)[:, ::-1].argmax(axis=1)
            return splits

        low, high = 0, int(np.isfinite(limits).sum())
        while low < high:
            middle = (low + high) // 2
            if self._serves(costs, p.splits[deepest(limits[middle])]):
                high = middle
            else:
                low = middle + 1
        return deepest(limits[low]) if low < np.isfinite(limits).sum() else None

    def _serves(self, costs: Costs, splits: Index) -> bool:
        """Whether the server has room for clients with these splits, ``(clients,)``, without any ranks."""
        return any(way.taken[splits].sum() <= way.room for way in self.problem.ways(costs, int(splits.min())))


def room(problem: Problem, costs: Costs, clients: int) -> Array:
    """``(splits,)``; bytes that the server has for adapters of a shared half when the lowest split is this one."""
    return problem.memory_of_server - problem.resting - clients * problem.frames - costs.passing[problem.splits]


def _sweep(own: Array, served: Array) -> tuple[Index, float, float]:
    """Everybody's split, the seconds of the slowest client and those of the round, which are the least.

    Within a limit every client takes the split, among those that take it no longer (``own``), that the server is done
    with first (``served``). A longer limit takes time off the server, one client after another.
    """
    order = np.argsort(own, axis=1, kind="stable")
    own_, served_ = np.take_along_axis(own, order, 1), np.minimum.accumulate(np.take_along_axis(served, order, 1), 1)
    least = float(own_[:, 0].max())
    times, saved = np.maximum(own_[:, 1:].ravel(), least), -np.diff(served_, axis=1).ravel()
    by_time = np.argsort(times, kind="stable")
    limits = np.concatenate([[least], times[by_time]])
    rounds = limits + served_[:, 0].sum() - np.concatenate([[0.0], np.cumsum(saved[by_time])])
    best = int(np.argmin(rounds))
    deepest = np.where(own <= limits[best], served, np.inf)[:, ::-1].argmin(axis=1)
    return own.shape[1] - 1 - deepest, float(limits[best]), float(rounds[best])
