"""The best plan: splits and ranks of the clients, and ranks of the server.

1. **Alone.** Every client gets the split point that it would have alone with the server: where its ranks below and the
   server's above are worth most or, within the tolerance, the round is shortest. That is a floor: what others have can
   move its cut deeper, but never above it, save for a deadline.
2. **The server's ranks.** With one shared half the server takes one rank for each of its weights, which counts for the
   clients whose split is at or below it; splits and these ranks follow each other until nothing changes. With a half
   for each client its memory has one price (:mod:`hsplitlora_flwr.planning.priced`).
3. **The shortest round** in which every client keeps, within the tolerance, what it would have alone. The server takes
   one client's step after another while the others compute, so a round takes ``max(sum_i S_i, max_i (O_i + S_i))``:
   ``S_i`` are the seconds of the server for client ``i``, ``O_i`` those of the client's own, computing and on the wire.
   A deeper cut takes work off the server, which all wait for, until some client's own turn takes longer than that.
4. **The clients' ranks**, the best at these splits in the time that the round takes anyway.

A deadline is met by more tolerance, as little as will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.below import RESTS, Below
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.frontier import BYTES, OPERATIONS, SAME, Frontier
from hsplitlora_flwr.planning.priced import Market, fronts_above
from hsplitlora_flwr.planning.problem import Assignment, Costs, Prices, Problem, Way

_TURNS = 6  # of splits and the server's ranks
_HALVINGS = 10  # of what a deadline takes
_SHARES = 3  # of its ranks that the server may keep within the tolerance
_SHARES_IN_TIME = 6  # and for a deadline

Mask = NDArray[np.bool_]


class Half(NamedTuple):
    """How the server serves, its ranks, ``(layers,)`` of a shared half or ``(clients, layers)``, and the clients'
    splits that they were chosen for, ``(clients,)``."""

    way: Way
    ranks: Ranks
    splits: Index


class Timed(NamedTuple):
    """A round: the server's half, everybody's split and the seconds that the server takes for it, ``(clients,)``, and
    those of the round."""

    half: Half
    splits: Index
    work: Array
    seconds: float


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
        self.shared = problem.cost.workload.half == "shared"
        self.below = Below(problem, deadline is not None)
        self.values, _ = self.below.best()
        self.above, self.above_bound, split = self._alone()
        self.value_alone = np.maximum((self.values + self.above).max(axis=1), 0.0)
        self._price = 0.0
        self._fronts: dict[tuple[bool, bool], list[Frontier]] = {}
        places, alone = np.arange(len(problem.splits)), len(problem.names) == 1
        floors = places == split[:, None] if alone else places >= split[:, None]
        self.allowed = self.below.held & (floors if deadline is None else True)

    def solve(self) -> Assignment:
        """The plan.

        Raises
        ------
        PlanError
            If no plan fits the server's memory or meets the deadline; the text says what is missing.
        """
        half = self._best_half()
        shares = np.unique(np.linspace(1 - self.tolerance, 1, _SHARES))
        rounds = (self._round(half, share, self.tolerance) for share in shares)
        timed = min(filter(None, rounds), key=lambda each: each.seconds)
        if self.deadline is None or timed.seconds <= self.deadline:
            return self._fill(timed, timed.seconds)
        return self._in_time(half, self.deadline)

    def bound(self) -> float:
        """No plan has more value."""
        p, most = self.problem, self.below.bound()
        alone = float(p.share @ (most + self.above_bound).max(axis=1))
        if self.shared:
            return alone
        return min(alone, max(self._market(way, most).bound(self._price) for way in self._ways()))

    # ------------------------------------------------------------------ a client alone with the server

    def _alone(self) -> tuple[Array, Array, Index]:
        """What the server's ranks are worth to each client alone, and can be worth at most, ``(clients, splits)``; and
        the split that it then has, ``(clients,)``."""
        p = self.problem
        above, bound, work = np.empty((3, *self.values.shape))
        for index, prices in p.groups:
            ways = [self._alone_by(prices, costs) for costs in prices.costs]
            best = np.argmax([value for value, _, _ in ways], axis=0)
            above[index], bound[index], work[index] = (np.choose(best, each) for each in zip(*ways, strict=True))
        reached = self.values + above
        least = (1 - self.tolerance) * np.maximum(reached.max(axis=1), 0.0)
        flops, choice = self.below.least(np.where(np.isfinite(above), least[:, None] - above, np.inf))
        own = p.own_seconds(flops, choice == RESTS, p.speed_alone)
        seconds = p.turn_seconds(own, p.steps * work / p.server_speed_alone[:, None], choice == RESTS)
        deepest, quickest = _last(self.below.held), _last(seconds == seconds.min(axis=1, keepdims=True))
        return above, bound, np.where(np.isfinite(reached).any(axis=1), quickest, deepest)

    def _alone_by(self, prices: Prices, costs: Costs) -> tuple[Array, Array, Array]:
        """``(splits,)``; what the server's ranks are worth, and at most, and its operations of a step."""
        p = self.problem
        rooms = p.memory_of_server - p.resting - prices.frames - costs.passing[p.splits]
        ranks, bound = self._best_above(costs, p.values, rooms)
        value, work = p.total(p.values, ranks), costs.served[p.splits] + p.total(costs.above, ranks)[:, OPERATIONS]
        return np.where(rooms < 0, -np.inf, value), np.where(rooms < 0, -np.inf, bound), work

    def _best_above(self, costs: Costs, values: Array, rooms: Array) -> tuple[Ranks, Array]:
        """The best ranks of one half from each split up in so many bytes, ``(splits,)``, and what none can exceed."""
        p = self.problem
        most = np.where(values[:, -1] > 0, len(p.ranks) - 1, 0)
        ranks = np.where(p.block >= p.splits[:, None], most, 0).astype(np.uint8)
        bound = p.total(values, ranks)
        taken = p.total(costs.above, ranks)[:, BYTES] + p.kept(costs.inputs_above, ranks)
        if (scarce := np.flatnonzero((taken > rooms) & (rooms >= 0))).size:
            fronts = fronts_above(p, costs.above, costs.inputs_above, values, float(rooms[scarce].max()), scarce[0])
            for s in scarce.tolist():
                front, limits = fronts[len(p.splits) - 1 - s], np.array([[rooms[s], np.inf, np.inf]])
                ranks[s], bound[s] = front.ranks[front.best(limits)[0]], front.bound(limits[:, :2])[0]
        return ranks, bound

    # ------------------------------------------------------------------ the server's ranks for all

    def _best_half(self) -> Half:
        """The half that is worth most, of all ways to serve.

        Raises
        ------
        PlanError
            If the server has no room for any.
        """
        p, best, missing, found = self.problem, -math.inf, math.inf, None
        for way in self._ways():
            allowed = self.allowed & (p.splits >= way.lowest)
            if not allowed.any(axis=1).all():
                continue
            missing = min(missing, float(way.taken[p.splits[_last(allowed)]].sum()) - way.room)
            hope = p.share @ np.where(allowed, self.values + self.above, -np.inf).max(axis=1)
            if hope > best + SAME and (offer := (self._shared if self.shared else self._sold)(way, allowed, best)):
                best, found = offer
        if found is None:
            raise p.server_too_small(missing)
        return found

    def _ways(self) -> Iterator[Way]:
        p = self.problem
        for costs in p.prices.costs:
            for lowest in p.splits.tolist():
                for way in p.ways(costs, lowest):
                    if self.shared or lowest == p.splits[0] or not way.every_pass:  # whose room depends on it
                        yield way

    def _shared(self, way: Way, allowed: Mask, beaten: float) -> tuple[float, Half] | None:
        """The ranks of a shared half, with what plans with them are worth, if that is more than ``beaten``."""
        p, found = self.problem, None
        rooms = np.where(p.splits == way.lowest, way.room - len(p.names) * p.prices.frames, -1.0)
        for splits in (allowed.argmax(axis=1), _last(allowed)) if rooms.max() >= 0 else ():
            for _ in range(_TURNS):
                served = np.cumsum(np.bincount(p.splits[splits], p.share, p.cost.num_blocks))  # share of the clients
                ranks = self._best_above(way.costs, p.values * served[p.block, None], rooms)[0][rooms.argmax()]
                reached = np.where(allowed, self.values + p.from_split_up(p.values, ranks), -np.inf)
                before, splits = splits, reached.argmax(axis=1)
                if (value := float(p.share @ reached.max(axis=1))) > beaten + SAME:
                    beaten, found = value, Half(way, ranks, splits)
                if (before == splits).all():
                    break
        return (beaten, found) if found else None

    def _sold(self, way: Way, allowed: Mask, beaten: float) -> tuple[float, Half] | None:
        """The same of halves of the clients' own."""
        market = self._market(way, np.where(allowed, self.values, -np.inf))
        if market.bound(self._price) <= beaten + SAME or not (sold := market.sell()):
            return None
        chosen, self._price = sold
        value = market.value(chosen)
        return (value, Half(way, market.ranks(chosen), chosen.split)) if value > beaten + SAME else None

    def _market(self, way: Way, below: Array) -> Market:
        p, key = self.problem, (way.costs.checkpointing, way.every_pass)
        if key not in self._fronts:
            self._fronts[key] = fronts_above(p, way.prices, way.inputs, p.values, math.inf)[::-1]
        return Market(p, way, self._fronts[key], np.where(p.splits >= way.lowest, below, -np.inf))

    # ------------------------------------------------------------------ time

    def _round(self, half: Half, share: float, tolerance: float) -> Timed | None:
        """The shortest round, if there is one, in which the server's ranks keep a share of their value, and every
        client, but for the tolerance, what it has alone or, if that is less, what the whole half gives it."""
        p, clients = self.problem, np.arange(len(self.values))
        given = (self.values + p.from_split_up(p.values, half.ranks))[clients, half.splits]
        target = np.minimum((1 - tolerance) * self.value_alone, given)
        half = half._replace(ranks=np.minimum(half.ranks, self._worthiest(share)))
        flops, choice = self.below.least(target[:, None] - p.from_split_up(p.values, half.ranks))
        return self._served(half, flops, choice == RESTS)

    def _worthiest(self, share: float) -> Ranks:
        """``(layers,)``; the ranks that are worth most for their operations and together hold a share of the value."""
        p = self.problem
        gain = np.diff(p.values, axis=1)
        order = np.argsort(-gain / np.diff(p.prices.parameters, axis=1), axis=None, kind="stable")
        reached = np.append(0.0, np.cumsum(gain.ravel()[order]))
        taken = np.zeros(gain.size, np.uint8)
        taken[order[: np.searchsorted(reached, share * reached[-1] - SAME)]] = 1
        ranks: Ranks = taken.reshape(gain.shape).sum(axis=1, dtype=np.uint8)
        return ranks

    def _served(self, half: Half, flops: Array, resting: Mask) -> Timed | None:
        """The shortest round that the server has room for, where a client's step takes ``flops`` operations on its own
        side, and it has no adapters where it is ``resting``, ``(clients, splits)`` both.

        Within a limit of the clients' turns every client takes the deepest split that keeps to it, which is what the
        server is done with first, and has most room for. A longer limit takes work off the server, one client after
        another.
        """
        p, way, clients = self.problem, half.way, np.arange(len(flops))
        work = way.costs.served[p.splits] + p.from_split_up(way.costs.above[..., OPERATIONS], half.ranks)
        work = np.broadcast_to(p.steps * work / p.server_speed, flops.shape)
        taken = p.bytes_from_split_up(way, half.ranks)
        if self.shared:  # by the lowest split of all
            passing = taken + way.costs.passing[p.splits] + len(p.names) * p.prices.frames
            allowed, taken = self.allowed & (passing <= p.memory_of_server - p.resting), np.zeros(1)
        else:
            allowed, taken = self.allowed & (p.splits >= way.lowest), taken + way.taken[p.splits]
        turns = p.turn_seconds(p.own_seconds(flops, resting, p.speed), work, resting)
        turns = np.where(allowed, turns, np.inf)
        order = np.argsort(turns, axis=1, kind="stable")
        limits = np.take_along_axis(turns, order, 1)
        limits = np.maximum(limits, limits[:, 0].max()).T.ravel()  # from when everybody has a split
        in_time = np.argsort(limits, kind="stable")
        deepest = np.maximum.accumulate(order, axis=1)

        def together(each: Array) -> Array:
            """The sum over clients within each limit."""
            of_split = np.take_along_axis(np.broadcast_to(each, turns.shape), deepest, 1)
            sums: Array = np.cumsum(np.diff(of_split, axis=1, prepend=0.0).T.ravel()[in_time])
            return sums[len(turns) - 1 :]

        limits = limits[in_time][len(turns) - 1 :]
        fits = np.isfinite(limits) & (together(taken) <= (math.inf if self.shared else way.room))
        if not fits.any():
            return None
        seconds = np.maximum(limits, together(work))
        best = np.where(fits, seconds, np.inf).argmin()
        splits = _last(turns <= limits[best])
        return Timed(half, splits, work[clients, splits], float(seconds[best]))

    def _in_time(self, half: Half, deadline: float) -> Assignment:
        """The plan for a deadline: clients give up the same share of their value, as little as will do beside what the
        server gives up, and take what time is left.

        Raises
        ------
        PlanError
            If there is none.
        """
        quickest = self._quickest()
        if quickest.seconds > deadline * (1 + SAME):
            raise PlanError(
                f"no plan meets the deadline of {deadline:g} s: the shortest possible round takes "
                f"{quickest.seconds:.3g} s. Raise plan.deadline, or lower train.steps, train.batch_size or "
                "data.max_length"
            )
        plans = []
        for each, share in [(quickest.half, 0.0), *((half, share) for share in np.linspace(0, 1, _SHARES_IN_TIME))]:
            if timed := self._least_given_up(each, share, deadline * (1 + SAME)):
                plans.append(self._fill(timed, deadline))
        return max(plans, key=self.problem.objective)

    def _least_given_up(self, half: Half, share: float, deadline: float) -> Timed | None:
        """The round of :meth:`_round` for the smallest tolerance that meets the deadline, if one does."""
        low, high, found = self.tolerance, 1.0, None
        tolerance = high
        for _ in range(_HALVINGS):
            if (timed := self._round(half, share, tolerance)) and timed.seconds <= deadline:
                high, found = tolerance, timed
            elif not found:
                return None
            else:
                low = tolerance
            tolerance = (low + high) / 2
        return found

    def _quickest(self) -> Timed:
        """The shortest round of all, in which nobody has ranks that it can do without."""
        none = np.zeros(len(self.problem.block), np.uint8)
        flops, choice = self.below.least(np.zeros_like(self.values))
        anywhere = np.zeros(len(flops), np.intp)
        rounds = (self._served(Half(way, none, anywhere), flops, choice == RESTS) for way in self._ways())
        found = min(filter(None, rounds), key=lambda timed: timed.seconds)
        return found._replace(half=found.half._replace(splits=found.splits))

    def _fill(self, timed: Timed, seconds: float) -> Assignment:
        """The best ranks of clients at their splits, for whom a round may take so many seconds."""
        p, clients = self.problem, np.arange(len(timed.splits))
        _, choice = self.below.best(seconds - timed.work)
        below, splits = self.below.ranks(timed.splits, choice[clients, timed.splits]), p.splits[timed.splits]
        return Assignment(splits, np.where(p.block < splits[:, None], below, timed.half.ranks).astype(np.uint8))


def _last(mask: Mask) -> Index:
    """``(clients,)``; the last split of each that holds."""
    last: Index = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return last
