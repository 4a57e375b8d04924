"""The planning problem in numbers: what every split point, rank and kept input costs, and what a rank is worth.

Read once from the cost model, which is linear in them: for fixed splits the memory and the time of a client, and its
share of the server's memory and time, are a constant plus a price for each adapter, plus a price for each input that an
adapter makes autograd keep. Arrays run over layers ``m`` (of ``CostModel.layers``), ranks ``k`` (those above 0,
ascending), inputs ``g`` and split points ``l``. Clients with equal budgets are one class with members.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.cost import CostModel, PlanError

NOMINAL_FLOPS = 1e12
"""FLOP/s of every machine where no speed is stated. Only ratios matter then."""

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Choice = dict[int, int]
"""Ranks, as an index into ``Problem.ranks``, by layer, as an index into ``CostModel.layers``."""
Assignment = dict[str, tuple[int, dict[str, int]]]
"""Split point and ranks by layer name, of both sides, by client."""


@dataclass(frozen=True)
class Budget:
    """What one machine has.

    Parameters
    ----------
    memory_bytes : int
        Memory that its process may take at its peak.
    process_bytes : int
        What that process takes before it loads anything (measured).
    flops : float, optional
        Speed in FLOP/s; the mean of the stated ones when None.
    up, down : float, optional
        Link to and from the server in bytes/s; not limiting when None.

    Raises
    ------
    PlanError
        If a speed is not a finite number above 0.
    """

    memory_bytes: int
    process_bytes: int = 0
    flops: float | None = None
    up: float | None = None
    down: float | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "up", "down"):
            speed = getattr(self, name)
            if speed is not None and not 0 < speed < math.inf:
                raise PlanError(
                    f"Budget.{name}={speed!r} must be a finite number above 0, or None when it is not known"
                )


@dataclass(frozen=True)
class ClientClass:
    """Clients with one and the same budget: ``memory`` in bytes beside the process, ``flops`` in FLOP/s, ``wire`` in
    seconds a step."""

    members: tuple[str, ...]
    memory: int
    flops: float
    wire: float


@dataclass(frozen=True)
class AdapterCosts:
    """What adapters cost where activations are kept for backward, or where they are computed again.

    Parameters
    ----------
    recompute : bool
        Which of the two.
    prices, flops : Array
        ``(layers, ranks)``; bytes, and operations of a step.
    input_bytes : Array
        ``(inputs,)``; bytes that the first adapter on an input adds to its price.
    base : Array
        ``(L,)``; bytes of a client that trains, by split, beside its adapters and the activations that it keeps.
    block_bytes, backward : float
        Bytes and operations for every block from the lowest adapted one up.
    """

    recompute: bool
    prices: Array
    flops: Array
    input_bytes: Array
    base: Array
    block_bytes: float
    backward: float


class Problem:
    """Budgets, importance and costs as arrays. Values are in units of the importance of all layers together.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        Of the clients that can hold ``min_split`` blocks without an adapter, by name.
    server : Budget or None
        The server's; memory without bound when None.
    importance : Mapping[str, float]
        ``J_m`` by layer name; uniform when it is 0 everywhere.
    cost : CostModel
        What plans cost.
    ranks : Sequence[int]
        The set ``Q``.
    min_split, max_split : int
        Bounds of the split point, both included.
    steps : int
        Local steps of a round.
    wire : tuple[str, str]
        Numbers on the wire, up and down; see :meth:`hsplitlora_flwr.planning.cost.CostModel.wire_bytes`.
    recompute : Sequence[bool]
        Whether activations may be kept, computed again, or either. Keeping them takes less time and comes first.
    """

    def __init__(
        self,
        budgets: Mapping[str, Budget],
        server: Budget | None,
        importance: Mapping[str, float],
        cost: CostModel,
        *,
        ranks: Sequence[int],
        min_split: int,
        max_split: int,
        steps: int,
        wire: tuple[str, str],
        recompute: Sequence[bool] = (False,),
    ) -> None:
        self.cost, self.server, self.steps = cost, server, steps
        self.ranks = np.array(sorted({rank for rank in ranks if rank > 0}))
        self.splits = range(min_split, max_split + 1)
        self._read_speeds(budgets, server, wire)
        self._read_layers(importance)
        self._read_splits()
        self.costs = tuple(map(self._adapter_costs, recompute))

    def shallowest_splits(self) -> list[int]:
        """Where the shallowest split of a plan may lie: at those that every client can hold."""
        least = min(each.memory for each in self.classes)
        return [split for split in self.splits if self.floor[split] <= least]

    def serving(self, shallowest: Sequence[int]) -> Iterator[Problem]:
        """The same problem for each way in which the server may serve its clients, with its prices.

        It may keep their activations or compute them again, as the clients may. And it may have room for the
        activations of every client; or for as many passes as can meet, each as large as at the shallowest split of all.
        Then clients are split there or deeper.

        Parameters
        ----------
        shallowest : Sequence[int]
            Where the shallowest split may lie, ascending. The passes are those at the last of them: where there is more
            than one, the problem is easier than it is, and its optimum a bound. Without any there is no plan.
        """
        clients, passes = int(self.sizes.sum()), self.cost.workload.passes
        for costs in self.costs if shallowest else ():
            in_turn = passes is not None and passes < clients
            if in_turn:
                yield self._served(costs, shallowest)
            least = clients * self.cost.pass_bytes(self.splits[-1], {}, recompute=costs.recompute)
            if not in_turn or least < self._reserve(costs.recompute, shallowest[0]):
                yield self._served(costs, ())

    def parts(self, split: int) -> list[Problem]:
        """The same way of serving with the shallowest split before, at and after one of several; none for a single."""
        if len(self.shallowest) <= 1:
            return []
        at = self.shallowest.index(min(split, self.shallowest[-1]))
        parts = self.shallowest[:at], self.shallowest[at : at + 1], self.shallowest[at + 1 :]
        return [self._served(self.served, part) for part in parts if part]

    def _served(self, costs: AdapterCosts, shallowest: Sequence[int]) -> Problem:
        other = copy.copy(self)
        other._serve(costs, shallowest)
        return other

    def _reserve(self, recompute: bool, split: int) -> int:
        """Bytes of the passes that can meet when none is of a shallower split."""
        every = {layer.name: int(self.ranks[-1]) for layer in self.cost.layers}
        return (self.cost.workload.passes or 0) * self.cost.pass_bytes(split, every, recompute=recompute)

    def _read_speeds(self, budgets: Mapping[str, Budget], server: Budget | None, wire: tuple[str, str]) -> None:
        machines = [*budgets.values(), *([server] if server else [])]
        mean = fmean([machine.flops for machine in machines if machine.flops] or [NOMINAL_FLOPS])
        up, down = self.cost.wire_bytes(*wire)
        members: dict[tuple[int, float, float], list[str]] = {}
        for name, budget in budgets.items():
            seconds = (up / budget.up if budget.up else 0.0) + (down / budget.down if budget.down else 0.0)
            key = budget.memory_bytes - budget.process_bytes, budget.flops or mean, seconds
            members.setdefault(key, []).append(name)
        self.classes = [ClientClass(tuple(names), *key) for key, names in members.items()]
        self.sizes = np.array([len(each.members) for each in self.classes])
        self.server_speed = (server.flops if server else None) or mean

    def _read_layers(self, importance: Mapping[str, float]) -> None:
        layers, ranks = self.cost.layers, self.ranks
        scores = np.array([importance.get(layer.name, 0.0) for layer in layers], float)
        if not np.isfinite(scores).all() or (scores < 0).any():
            wrong = next(layer.name for layer, score in zip(layers, scores, strict=True) if not 0 <= score < math.inf)
            raise PlanError(f"importance of {wrong} is {importance[wrong]!r}; it must be finite and 0 or more")
        scores = scores if scores.any() else np.full(len(layers), 1 / len(layers))
        self.total_importance = float(scores.sum())
        self.importance = scores / self.total_importance
        self.values: Array = self.importance[:, None] * np.log2(1 + ranks)
        self.block = np.array([layer.block for layer in layers])
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in layers}
        number = {key: g for g, key in enumerate(inputs)}
        self.input = np.array([number[layer.block, layer.input_id] for layer in layers])
        self._input_bytes: Array = np.array(list(inputs.values()), float)
        self.input_block = np.array([block for block, _ in inputs])

    def _read_splits(self) -> None:
        cost = self.cost
        self.floor, self.forward = np.zeros(cost.num_blocks), np.zeros(cost.num_blocks)
        for split in self.splits:  # without adapters, where nothing is kept or computed again
            self.floor[split] = cost.client_bytes(split, {})
            self.forward[split] = cost.client_flops(split, {})

    def _adapter_costs(self, recompute: bool) -> AdapterCosts:
        cost, layers, ranks = self.cost, self.cost.layers, self.ranks.tolist()
        # On the server the backward pass runs anyway, so what an adapter adds is its own; layers of a size cost alike.
        # A server that had all blocks, the first one too, has layers of every size.
        alone = cost.server_flops(0, {}, recompute=recompute)
        of_size = {(layer.in_features, layer.out_features): layer.name for layer in layers}
        by_size = {
            size: [cost.server_flops(0, {name: rank}, recompute=recompute) - alone for rank in ranks]
            for size, name in of_size.items()
        }
        flops = np.array([by_size[layer.in_features, layer.out_features] for layer in layers], float)
        # A client's peak is either `floor`, the accumulated update, or `base` and what training adds to it. At a rank
        # that outweighs every update it is the latter.
        first, base = layers[0], np.zeros(cost.num_blocks)
        huge = {first.name: 2**40}
        for split in self.splits:
            added = cost.adapter_bytes(huge, 0, split) + cost.kept_bytes(huge, 0, split, recompute=recompute)
            base[split] = cost.client_bytes(split, huge, recompute=recompute) - added
        split = max(self.splits[0], first.block + 1)
        trained = cost.client_flops(split, {first.name: ranks[0]}, recompute=recompute)
        return AdapterCosts(
            recompute,
            self._prices(0 if recompute else cost.workload.in_flight),
            flops,
            np.zeros_like(self._input_bytes) if recompute else self._input_bytes,
            base,
            cost.block_bytes(recompute),
            (trained - cost.client_flops(split, {}) - flops[0, 0]) / (split - first.block),
        )

    def _prices(self, micro_batches: int) -> Array:
        """Bytes of an adapter by layer and rank, ``(layers, ranks)``, when so many micro-batches are kept."""
        price, ranks = self.cost.adapter_price, self.ranks.tolist()
        return np.array([[price(layer, rank, micro_batches) for rank in ranks] for layer in self.cost.layers], float)

    def _serve(self, costs: AdapterCosts, shallowest: Sequence[int]) -> None:
        """What clients and their adapters cost the server, and what room it has for that; see :meth:`serving`."""
        cost, again, in_turn = self.cost, costs.recompute, bool(shallowest)
        self.served, self.shallowest = costs, shallowest
        reserve = self._reserve(again, shallowest[-1]) if in_turn else 0
        if in_turn:
            self.splits = range(shallowest[0], self.splits.stop)
        kept = 0 if in_turn else cost.server_micro_batches
        self.prices, self.flops = self._prices(0 if again else kept), costs.flops
        self.input_bytes = costs.input_bytes * (kept / cost.workload.in_flight)
        self.share, self.server_flops = np.zeros(cost.num_blocks), np.zeros(cost.num_blocks)
        for split in self.splits:
            passing = 0 if in_turn else cost.pass_bytes(split, {}, recompute=again)
            self.share[split] = cost.held_bytes(split, {}) + passing
            self.server_flops[split] = cost.server_flops(split, {}, recompute=again)
        memory = self.server.memory_bytes if self.server else math.inf
        process = self.server.process_bytes if self.server else 0
        self.server_room = memory - cost.server_bytes({}, process) - reserve

    def own_seconds(self, number: int, flops: float) -> float:
        """Time of a round of a client of class ``number`` whose step takes ``flops`` operations."""
        each = self.classes[number]
        return self.steps * (flops / each.flops + each.wire)

    def server_seconds(self, flops: float) -> float:
        """Time of the server for ``flops`` operations in every step of a round."""
        return self.steps * flops / self.server_speed

    def client_bytes(self, costs: AdapterCosts, split: int, choice: Choice) -> float:
        """Peak memory of a client with ranks below its split, beside the process."""
        if not choice:
            return float(self.floor[split])
        blocks = split - min(int(self.block[m]) for m in choice)
        adapters = sum(costs.prices[m, k] for m, k in choice.items())
        inputs = sum(costs.input_bytes[g] for g in {int(self.input[m]) for m in choice})
        return float(max(self.floor[split], costs.base[split] + blocks * costs.block_bytes + adapters + inputs))

    def costs_of(self, number: int, split: int, choice: Choice) -> AdapterCosts:
        """What a client of class ``number`` pays for its ranks: it computes nothing again that it can keep."""
        memory = self.classes[number].memory
        fitting = (costs for costs in self.costs if self.client_bytes(costs, split, choice) <= memory)
        return next(fitting, self.costs[-1])

    def server_too_small(self, clients: Counts) -> PlanError:
        """The error for a server without room for so many clients at each split, even without adapters."""
        assert self.server is not None
        shallowest = int(np.flatnonzero(clients)[0])
        ways = self.serving([shallowest])
        missing = int(min(clients @ served.share - served.server_room for served in ways))
        return PlanError(
            f"the server has {self.server.memory_bytes:,} bytes and misses {missing:,} to serve {clients.sum()} "
            "client(s) even without adapters. Raise plan.server_memory_gb, or lower train.batch_size or data.max_length"
        )

    def seconds(self, number: int, split: int, choice: Choice) -> float:
        """Time of a round of a client of class ``number`` with ranks below its split."""
        costs = self.costs_of(number, split, choice)
        blocks = split - min((int(self.block[m]) for m in choice), default=split)
        flops = self.forward[split] + blocks * costs.backward + sum(costs.flops[m, k] for m, k in choice.items())
        return self.own_seconds(number, float(flops))

    def value(self, choice: Choice) -> float:
        """What ranks on layers are worth."""
        return math.fsum(self.values[m, k] for m, k in choice.items())

    def assign(self, below: Mapping[tuple[int, int], tuple[int, Choice]], above: Counts) -> Assignment:
        """Hand counts out to clients.

        Parameters
        ----------
        below : Mapping[tuple[int, int], tuple[int, Choice]]
            By (class, split): how many clients, and their ranks below it.
        above : Counts
            ``(layers, ranks)``; how many clients take a rank on a layer above their split.
        """
        names = [layer.name for layer in self.cost.layers]
        assignment: Assignment = {}
        waiting = [iter(each.members) for each in self.classes]
        for (number, split), (clients, choice) in below.items():
            ranks = {names[m]: int(self.ranks[k]) for m, k in choice.items()}
            for _ in range(clients):
                assignment[next(waiting[number])] = split, dict(ranks)
        reached = [[c for c, (split, _) in assignment.items() if split <= b] for b in range(self.cost.num_blocks)]
        for m, row in enumerate(above):
            # Layers with one input share it when the same clients take them: always the first ones.
            takers = iter(reached[self.block[m]])
            for k in np.flatnonzero(row)[::-1]:
                for client in islice(takers, int(row[k])):
                    assignment[client][1][names[m]] = int(self.ranks[k])
        return assignment

    def objective(self, assignment: Assignment) -> float:
        """``sum_i sum_m J_m log2(1 + r_im)``."""
        score = {layer.name: value for layer, value in zip(self.cost.layers, self.importance.tolist(), strict=True)}
        return self.total_importance * math.fsum(
            score[name] * math.log2(1 + rank) for _, ranks in assignment.values() for name, rank in ranks.items()
        )
