"""The default planner: splits, ranks of the clients and ranks of the server (docs/method.md, section 2).

It maximises ``sum_i p_i sum_m J_m log2(1 + r_im)`` under all budgets and then, within a tolerance, shortens the round:

1. **Alone.** For every client as if it were alone with the server: the split point at which its ranks below and the
   server's above are worth most or, within the tolerance, the round is shortest. That is the floor of its split: what
   other clients have can move its cut deeper but never above it, except to meet a deadline.
2. **The server's ranks.** A shared half has one rank per weight, which counts for all clients whose split is at or
   below it. Ranks for given splits and splits for given ranks are chosen in turn until nothing changes. Halves of the
   clients' own share the server's memory by a price per byte (:mod:`hsplitlora_flwr.planning.priced`).
3. **The shortest round** in which every client keeps, within the tolerance, the value that it would have alone. The
   server takes one client's step after another while the others compute, so a round takes
   ``max(sum_i S_i, max_i (O_i + S_i))``, with ``S_i`` the seconds of the server for client ``i`` and ``O_i`` those of
   the client itself, computing and on the wire. A deeper cut takes work off the server, for which all wait, until some
   client's own turn takes longer. Before and after its steps stands what the slowest link takes to bring the update of
   the last round and to send adapters, which grows with the split.
4. **The clients' ranks**: the most valuable ones at these splits within the time that the round takes.

A deadline is met by raising the tolerance, as little as will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.below import Below, Least
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.frontier import BYTES, OPERATIONS, SAME, Frontier
from hsplitlora_flwr.planning.priced import PricedMemory, fronts_above
from hsplitlora_flwr.planning.problem import Assignment, Problem, Serving
from hsplitlora_flwr.planning.tables import CostTables, TrainingCosts

_TURNS = 6  # times that splits and a shared half's ranks are chosen in turn
_HALVINGS = 10  # bisection steps of the tolerance that meets a deadline
_SHARES = 3  # shares of the server's ranks that are tried within the tolerance
_SHARES_IN_TIME = 6  # and to meet a deadline
_EXCHANGES = 12  # limits that are tried on the time of the slowest client's update and adapters

Mask = NDArray[np.bool_]


class Half(NamedTuple):
    """What the server holds.

    Parameters
    ----------
    serving : Serving
        How it serves.
    ranks : Ranks
        ``(layers,)`` of a shared half, or ``(clients, layers)``.
    splits : Index
        ``(clients,)``; the splits that these ranks were chosen for.
    """

    serving: Serving
    ranks: Ranks
    splits: Index


class Timed(NamedTuple):
    """A round with its predicted time.

    Parameters
    ----------
    half : Half
    splits : Index
        ``(clients,)``.
    work, parameters : Array
        ``(clients,)``; seconds of the server for each client, ``S_i``, and parameters of the client's adapters.
    exchange : float
        Seconds of the update and the adapters of the slowest client.
    seconds : float
        Seconds of the round, those included.
    """

    half: Half
    splits: Index
    work: Array
    parameters: Array
    exchange: float
    seconds: float


class Solver:
    """Solves a planning problem. Splits are indices into ``Problem.splits`` here.

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
        """The best plan found.

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
        """An upper bound of the value of any plan."""
        p, most = self.problem, self.below.bound()
        alone = float(p.share @ (most + self.above_bound).max(axis=1))
        if self.shared:
            return alone
        return min(alone, max(self._priced(serving, most).bound(self._price) for serving in self._servings()))

    # ------------------------------------------------------------------ a client alone with the server

    def _alone(self) -> tuple[Array, Array, Index]:
        """Every client as if it were alone with the server.

        Returns
        -------
        values, bounds : Array
            ``(clients, splits)``; what the server's ranks are worth to it, and an upper bound of that.
        splits : Index
            ``(clients,)``; its split.
        """
        p = self.problem
        above, bound, work = np.empty((3, *self.values.shape))
        for index, tables in p.groups:
            found = [self._alone_by(tables, costs) for costs in tables.costs]
            best = np.argmax([value for value, _, _ in found], axis=0)
            above[index], bound[index], work[index] = (np.choose(best, each) for each in zip(*found, strict=True))
        reached = self.values + above
        least = (1 - self.tolerance) * np.maximum(reached.max(axis=1), 0.0)
        chosen = self.below.least(np.where(np.isfinite(above), least[:, None] - above, np.inf))
        own = p.own_seconds(chosen.flops, chosen.forward_only, p.speed_alone)
        seconds = p.turn_seconds(own, p.steps * work / p.server_speed_alone[:, None], chosen.forward_only)
        seconds += p.exchange_seconds(chosen.parameters, p.splits)
        deepest, quickest = _last(self.below.held), _last(seconds == seconds.min(axis=1, keepdims=True))
        return above, bound, np.where(np.isfinite(reached).any(axis=1), quickest, deepest)

    def _alone_by(self, tables: CostTables, costs: TrainingCosts) -> tuple[Array, Array, Array]:
        """Value of the server's ranks for one client alone, an upper bound of it, and the server's operations of a
        step, ``(splits,)`` each."""
        p = self.problem
        rooms = p.memory_of_server - p.server_base - tables.frames - costs.passing[p.splits]
        ranks, bound = self._best_above(costs, p.values, rooms)
        value, work = p.total(p.values, ranks), costs.served[p.splits] + p.total(costs.above, ranks)[:, OPERATIONS]
        return np.where(rooms < 0, -np.inf, value), np.where(rooms < 0, -np.inf, bound), work

    def _best_above(self, costs: TrainingCosts, values: Array, rooms: Array) -> tuple[Ranks, Array]:
        """The best ranks of one half from each split up within ``rooms`` bytes, ``(splits,)``, and upper bounds of
        their value, ``(splits,)``."""
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
        """The half that is worth most, over all ways to serve.

        Raises
        ------
        PlanError
            If the server has no room for any.
        """
        p, best, missing, found = self.problem, -math.inf, math.inf, None
        offer_of = self._shared if self.shared else self._own_halves
        for serving in self._servings():
            allowed = self.allowed & (p.splits >= serving.lowest)
            if not allowed.any(axis=1).all():
                continue
            missing = min(missing, float(serving.per_client[p.splits[_last(allowed)]].sum()) - serving.room)
            hope = p.share @ np.where(allowed, self.values + self.above, -np.inf).max(axis=1)
            if hope > best + SAME and (offer := offer_of(serving, allowed, best)):
                best, found = offer
        if found is None:
            raise p.server_too_small(missing)
        return found

    def _servings(self) -> Iterator[Serving]:
        p = self.problem
        for costs in p.tables.costs:
            for lowest in p.splits.tolist():
                for serving in p.servings(costs, lowest):
                    # Where every client pays for its pass the room is the same for every lowest split: one will do.
                    if self.shared or lowest == p.splits[0] or not serving.every_pass:
                        yield serving

    def _shared(self, serving: Serving, allowed: Mask, beaten: float) -> tuple[float, Half] | None:
        """The best shared half and the value of its plan, if that is more than ``beaten``."""
        p, found = self.problem, None
        rooms = np.where(p.splits == serving.lowest, serving.room - len(p.names) * p.tables.frames, -1.0)
        for splits in (allowed.argmax(axis=1), _last(allowed)) if rooms.max() >= 0 else ():
            for _ in range(_TURNS):
                served = np.cumsum(np.bincount(p.splits[splits], p.share, p.cost.num_blocks))  # share of the clients
                ranks = self._best_above(serving.costs, p.values * served[p.block, None], rooms)[0][rooms.argmax()]
                reached = np.where(allowed, self.values + p.from_split_up(p.values, ranks), -np.inf)
                before, splits = splits, reached.argmax(axis=1)
                if (value := float(p.share @ reached.max(axis=1))) > beaten + SAME:
                    beaten, found = value, Half(serving, ranks, splits)
                if (before == splits).all():
                    break
        return (beaten, found) if found else None

    def _own_halves(self, serving: Serving, allowed: Mask, beaten: float) -> tuple[float, Half] | None:
        """The same with a half for each client."""
        memory = self._priced(serving, np.where(allowed, self.values, -np.inf))
        if memory.bound(self._price) <= beaten + SAME or not (divided := memory.divide()):
            return None
        chosen, self._price = divided
        value = memory.value(chosen)
        return (value, Half(serving, memory.ranks(chosen), chosen.split)) if value > beaten + SAME else None

    def _priced(self, serving: Serving, below: Array) -> PricedMemory:
        p, key = self.problem, (serving.costs.checkpointing, serving.every_pass)
        if key not in self._fronts:
            self._fronts[key] = fronts_above(p, serving.adapters, serving.inputs, p.values, math.inf)[::-1]
        below = np.where(p.splits >= serving.lowest, below, -np.inf)
        return PricedMemory(p, serving, self._fronts[key], below)

    # ------------------------------------------------------------------ time

    def _round(self, half: Half, share: float, tolerance: float) -> Timed | None:
        """The shortest round in which the server's ranks keep a ``share`` of their value, and every client all but
        ``tolerance`` of what it would have alone or, if that is less, of what the whole half gives it; None if there is
        none."""
        p, clients = self.problem, np.arange(len(self.values))
        given = (self.values + p.from_split_up(p.values, half.ranks))[clients, half.splits]
        target = np.minimum((1 - tolerance) * self.value_alone, given)
        half = half._replace(ranks=np.minimum(half.ranks, self._worthiest(share)))
        return self._served(half, self.below.least(target[:, None] - p.from_split_up(p.values, half.ranks)))

    def _worthiest(self, share: float) -> Ranks:
        """``(layers,)``; the ranks that are worth most per operation and together hold a ``share`` of all value."""
        p = self.problem
        gain = np.diff(p.values, axis=1)
        order = np.argsort(-gain / np.diff(p.tables.parameters, axis=1), axis=None, kind="stable")
        reached = np.append(0.0, np.cumsum(gain.ravel()[order]))
        taken = np.zeros(gain.size, np.uint8)
        taken[order[: np.searchsorted(reached, share * reached[-1] - SAME)]] = 1
        ranks: Ranks = taken.reshape(gain.shape).sum(axis=1, dtype=np.uint8)
        return ranks

    def _served(self, half: Half, chosen: Least) -> Timed | None:
        """The shortest round that the server has room for, where clients do with what is ``chosen``; None if there is
        none.

        Where links are stated it is the shortest of a few tries: of limits on the seconds of the slowest client's
        update and adapters.
        """
        p = self.problem
        exchange = p.exchange_seconds(chosen.parameters, p.splits)
        limits = np.unique(exchange[self.allowed & np.isfinite(chosen.flops)])
        if len(limits) > _EXCHANGES:
            limits = limits[np.linspace(0, len(limits) - 1, _EXCHANGES).astype(int)]
        found = filter(None, (self._stepped(half, chosen, exchange, limit) for limit in limits))
        return min(found, key=lambda timed: timed.seconds, default=None)

    def _stepped(self, half: Half, chosen: Least, exchange: Array, limit: float) -> Timed | None:
        """The same where nobody takes longer than ``limit`` seconds for its update and adapters, ``exchange``.

        For a given limit on the clients' turns, every client takes the deepest split that keeps to it: that leaves the
        server the least work and the most room. A longer limit takes work off the server, one client after another, so
        trying every limit once, in order, finds the best.
        """
        p, serving, clients = self.problem, half.serving, np.arange(len(exchange))
        work = serving.costs.served[p.splits] + p.from_split_up(serving.costs.above[..., OPERATIONS], half.ranks)
        work = np.broadcast_to(p.steps * work / p.server_speed, exchange.shape)
        taken = p.bytes_from_split_up(serving, half.ranks)
        allowed = self.allowed & (exchange <= limit)
        if self.shared:  # the lowest split of all decides, and each client's is checked as if it were that
            passing = taken + serving.costs.passing[p.splits] + len(p.names) * p.tables.frames
            allowed, taken = allowed & (passing <= p.memory_of_server - p.server_base), np.zeros(1)
        else:
            allowed, taken = allowed & (p.splits >= serving.lowest), taken + serving.per_client[p.splits]
        turns = p.turn_seconds(p.own_seconds(chosen.flops, chosen.forward_only, p.speed), work, chosen.forward_only)
        turns = np.where(allowed, turns, np.inf)
        order = np.argsort(turns, axis=1, kind="stable")
        limits = np.take_along_axis(turns, order, 1)
        limits = np.maximum(limits, limits[:, 0].max()).T.ravel()  # below that, somebody has no split
        in_time = np.argsort(limits, kind="stable")
        deepest = np.maximum.accumulate(order, axis=1)

        def together(each: Array) -> Array:
            """``each``, ``(clients, splits)``, at the clients' splits for every limit, summed over clients."""
            of_split = np.take_along_axis(np.broadcast_to(each, turns.shape), deepest, 1)
            sums: Array = np.cumsum(np.diff(of_split, axis=1, prepend=0.0).T.ravel()[in_time])
            return sums[len(turns) - 1 :]

        limits = limits[in_time][len(turns) - 1 :]
        fits = np.isfinite(limits) & (together(taken) <= (math.inf if self.shared else serving.room))
        if not fits.any():
            return None
        seconds = np.maximum(limits, together(work))
        best = np.where(fits, seconds, np.inf).argmin()
        splits = _last(turns <= limits[best])
        slowest = float(exchange[clients, splits].max())
        parameters = chosen.parameters[clients, splits]
        return Timed(half, splits, work[clients, splits], parameters, slowest, slowest + float(seconds[best]))

    def _in_time(self, half: Half, deadline: float) -> Assignment:
        """The best plan that meets a deadline: for several shares of its ranks that the server keeps, all clients give
        up the same share of their value, as little as will do, and their ranks then use the time that is left.

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
        """The round of :meth:`_round` with the smallest tolerance that meets the deadline; None if none does."""
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
        """The shortest possible round, in which nobody has a rank that it can do without."""
        none = np.zeros(len(self.problem.block), np.uint8)
        chosen = self.below.least(np.zeros_like(self.values))
        anywhere = np.zeros(len(self.values), np.intp)
        rounds = (self._served(Half(serving, none, anywhere), chosen) for serving in self._servings())
        found = min(filter(None, rounds), key=lambda timed: timed.seconds)
        return found._replace(half=found.half._replace(splits=found.splits))

    def _fill(self, timed: Timed, seconds: float) -> Assignment:
        """The plan with the best ranks of every client at its split in a round of at most ``seconds``, of which update
        and adapters take no more than the slowest client's do."""
        p, clients = self.problem, np.arange(len(timed.splits))
        each = p.exchange_seconds(np.ones((len(clients), 1)), p.splits[timed.splits][:, None])[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.where(each > 0, np.maximum(timed.exchange / each, timed.parameters), np.inf)
        _, choice = self.below.best(seconds - timed.exchange - timed.work, most)
        below, splits = self.below.ranks(timed.splits, choice[clients, timed.splits]), p.splits[timed.splits]
        return Assignment(splits, np.where(p.block < splits[:, None], below, timed.half.ranks).astype(np.uint8))


def _last(mask: Mask) -> Index:
    """``(clients,)``; the deepest split for which ``mask``, ``(clients, splits)``, holds."""
    last: Index = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return last
