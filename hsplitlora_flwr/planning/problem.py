"""The planning problem as arrays: what every split point and rank costs, and what a rank is worth.

    maximise  sum_i p_i sum_m J_m log2(1 + r_im)        (docs/method.md, section 2)

over a split point ``l_i`` and ranks ``r_im`` for every client ``i`` and layer ``m``, within every client's memory, time
and bytes of adapters, and the server's memory. What these take is linear in the terms of
:mod:`hsplitlora_flwr.planning.tables`.

Array dimensions are named ``clients`` (``i``), ``layers`` (``m``, in the order of ``CostModel.layers``), ``ranks`` (the
set ``Q`` ascending, 0 first), ``inputs`` (tensors that layers read), ``splits`` (the allowed ones) and ``L`` (all
blocks, indexed by the split point itself). A last dimension of 3 holds bytes, adapter parameters and operations of a
step (:data:`~hsplitlora_flwr.planning.frontier.BYTES` and following).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsplitlora_flwr.planning.arrays import Array, Index, Ranks
from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.frontier import BYTES, OPERATIONS
from hsplitlora_flwr.planning.tables import CostTables, TrainingCosts

NOMINAL_FLOPS = 1e12
"""FLOP/s of every machine where no speed is stated. Only ratios matter then."""


class Assignment(NamedTuple):
    """Split point, ``(clients,)``, and ranks of both sides, ``(clients, layers)``, of every client."""

    splits: Index
    ranks: Ranks


class Serving(NamedTuple):
    """How the server serves clients whose splits are all at or above ``lowest``, and what its memory then pays for.

    Parameters
    ----------
    costs : TrainingCosts
    lowest : int
    every_pass : bool
        Every client pays for a pass of its own. Otherwise ``room`` is what is left beside as many of the largest passes
        as can meet.
    adapters : Array
        ``(layers, ranks, 3)``; cost of an adapter.
    inputs : Array
        ``(inputs,)``; bytes that the first adapter on an input adds.
    per_client : Array
        ``(L,)``; bytes of every client beside its adapters, by split.
    room : float
        Bytes for all clients together.
    """

    costs: TrainingCosts
    lowest: int
    every_pass: bool
    adapters: Array
    inputs: Array
    per_client: Array
    room: float


class Problem:
    """Budgets, shares, importance and costs as arrays. Importance is normalised to sum 1 over all layers.

    Parameters are those of :func:`hsplitlora_flwr.planning.planner.make_plan`; ``budgets`` are those of clients that
    can take part, and ``checkpointing`` lists whether activations may be kept (False), recomputed (True), or either,
    the faster first.

    Attributes
    ----------
    tables : CostTables
        Of the cost model that the server counts with.
    groups : list of (Index, CostTables)
        The clients by the cost model of their own side.
    values : Array
        ``(layers, ranks)``; ``J_m log2(1 + r)``.
    share : Array
        ``(clients,)``; ``p_i``.
    memory, adapters : Array
        ``(clients,)``; bytes beside the process, and adapter parameters that a client may send.
    speed, speed_alone : Array
        ``(clients,)``; FLOP/s, where an unstated one is the mean of the stated ones, or as for the server.
    wire, wire_forward_only : Array
        ``(clients,)``; seconds of a step on the wire.
    slowness : Array
        ``(clients, 2)``; seconds per byte of the link, up and down; 0 where it is not stated.
    memory_of_server, server_base : float
        The server's bytes, and what it takes without clients.
    may_train, may_only_forward : bool
        Whether clients may have adapters, and whether they may have none.
    """

    def __init__(
        self,
        budgets: Mapping[str, Budget],
        server: Budget | None,
        importance: Mapping[str, float],
        shares: Mapping[str, float] | None,
        cost: CostModel,
        *,
        ranks: Sequence[int],
        min_split: int,
        max_split: int,
        steps: int,
        wire: tuple[str, str],
        checkpointing: Sequence[bool],
        clients: str,
        own: Mapping[str, CostModel] | None,
        exchanges: bool,
    ) -> None:
        self.cost, self.steps, self.names, self._exchanges = cost, steps, list(budgets), exchanges
        self.may_train, self.may_only_forward = clients != "none", clients != "all"
        self.ranks = np.array([0, *sorted({rank for rank in ranks if rank > 0})])
        self.splits = np.arange(min_split, max_split + 1)
        self._read_layers(importance)
        models = [(own or {}).get(name, cost) for name in self.names]
        tables = {
            id(model): CostTables(model, self.splits, self.ranks, clients, checkpointing, wire)
            for model in {id(model): model for model in (cost, *models)}.values()
        }
        self.tables = tables[id(cost)]
        of = np.array([list(tables).index(id(model)) for model in models])
        self.groups = [(np.flatnonzero(of == g), each) for g, each in enumerate(tables.values()) if (of == g).any()]
        self._read_clients(list(budgets.values()), server, shares)
        self.memory_of_server = float(server.memory_bytes) if server else math.inf
        self.server_base = cost.server_bytes({}, server.process_bytes if server else 0)

    def _read_layers(self, importance: Mapping[str, float]) -> None:
        layers = self.cost.layers
        scores = np.array([importance.get(layer.name, 0.0) for layer in layers], float)
        if not np.isfinite(scores).all() or (scores < 0).any():
            wrong = next(layer.name for layer, score in zip(layers, scores, strict=True) if not 0 <= score < math.inf)
            raise PlanError(f"importance of {wrong} is {importance[wrong]!r}; it must be finite and 0 or more")
        scores = scores if scores.any() else np.full(len(layers), 1 / len(layers))
        self.total_importance = float(scores.sum())
        self.importance = scores / self.total_importance
        self.values: Array = self.importance[:, None] * np.log2(1 + self.ranks)
        self.block = np.array([layer.block for layer in layers])
        number = {key: g for g, key in enumerate(dict.fromkeys((layer.block, layer.input_id) for layer in layers))}
        self.input = np.array([number[layer.block, layer.input_id] for layer in layers])
        self._reads = np.eye(len(number))[self.input]  # (layers, inputs)
        self._lies_in = np.eye(self.cost.num_blocks)[self.block]  # (layers, L)
        self._input_lies_in = np.eye(self.cost.num_blocks)[[block for block, _ in number]]  # (inputs, L)
        self.by_block: list[dict[int, list[int]]] = [{} for _ in range(self.cost.num_blocks)]
        for m, (block, g) in enumerate(zip(self.block.tolist(), self.input.tolist(), strict=True)):
            self.by_block[block].setdefault(g, []).append(m)  # layers by block and input

    def _read_clients(
        self, budgets: Sequence[Budget], server: Budget | None, shares: Mapping[str, float] | None
    ) -> None:
        stated = [machine.flops for machine in (*budgets, server) if machine and machine.flops]
        mean, of_server = fmean(stated or [NOMINAL_FLOPS]), server.flops if server else None
        self.memory = np.array([budget.memory_bytes - budget.process_bytes for budget in budgets], float)
        limits = (math.inf if b.adapter_bytes is None else b.adapter_bytes for b in budgets)
        self.adapters = np.floor(np.array(list(limits), float) / self.cost.workload.adapter_item)
        self.speed, self.server_speed = np.array([budget.flops or mean for budget in budgets]), of_server or mean
        # Alone with the server, what is not stated is as for the other of the two.
        self.speed_alone = np.array([budget.flops or of_server or NOMINAL_FLOPS for budget in budgets])
        self.server_speed_alone = np.full(len(budgets), of_server) if of_server else self.speed_alone
        self.slowness = np.array([[1 / link if link else 0.0 for link in (b.up, b.down)] for b in budgets])
        self.wire, self.wire_forward_only = np.empty((2, len(budgets)))  # seconds of a step
        for index, tables in self.groups:
            self.wire[index], self.wire_forward_only[index] = (
                self.slowness[index] @ tables.wire[alone] for alone in (False, True)
            )
        share = np.array([1.0 if shares is None else shares[name] for name in self.names])
        if not (np.isfinite(share) & (share >= 0)).all() or not share.any():
            raise PlanError(
                f"shares={dict(zip(self.names, share.tolist(), strict=True))} must be 0 or more, and one above"
            )
        self.share = share / share.sum()

    # ------------------------------------------------------------------ sums over layers

    def total(self, table: Array, ranks: Ranks) -> Array:
        """``(...,)`` or ``(..., 3)``; ``table[m, r_m]`` summed over layers, of ranks ``(..., layers)``."""
        totals: Array = table[np.arange(len(self.block)), ranks].sum(axis=ranks.ndim - 1)
        return totals

    def kept(self, inputs: Array, ranks: Ranks) -> Array:
        """``(...,)``; bytes of the layers' inputs that adapters make autograd keep, each input once."""
        kept: Array = ((ranks > 0) @ self._reads > 0) @ inputs
        return kept

    def from_split_up(self, table: Array, ranks: Ranks) -> Array:
        """``(..., splits)``; ``table[m, r_m]`` summed over the layers at and above each split point."""
        return self._from_split_up(table[np.arange(len(self.block)), ranks] @ self._lies_in)

    def bytes_from_split_up(self, serving: Serving, ranks: Ranks) -> Array:
        """``(..., splits)``; bytes that the server's adapters take at and above each split point."""
        inputs = self._from_split_up((((ranks > 0) @ self._reads > 0) * serving.inputs) @ self._input_lies_in)
        return self.from_split_up(serving.adapters[..., BYTES], ranks) + inputs

    def _from_split_up(self, blocks: Array) -> Array:
        sums: Array = np.cumsum(blocks[..., ::-1], axis=-1)[..., ::-1][..., self.splits]
        return sums

    # ------------------------------------------------------------------ what a plan takes

    def own_seconds(self, flops: Array, forward_only: NDArray[np.bool_], speed: Array) -> Array:
        """Seconds of a round of each client by itself, computing and on the wire.

        Parameters
        ----------
        flops : Array
            ``(clients, splits)``; operations of a step.
        forward_only : NDArray[np.bool_]
            The same shape; whether no gradient comes down, as the client has no adapters.
        speed : Array
            ``(clients,)``; FLOP/s.
        """
        wire = np.where(forward_only, self.wire_forward_only[:, None], self.wire[:, None])
        seconds: Array = self.steps * (flops / speed[:, None] + wire)
        return seconds

    def exchange_seconds(self, parameters: Array, splits: Index) -> Array:
        """Time to bring the last round's update to clients and their adapters back, ``(clients, splits)``, where a
        client has ``parameters`` of adapters, of the same shape, below its split.

        The update is counted as if all clients had the same ranks there, so it has a factor of each, or is the dense
        sum where that is smaller. None where ``exchanges`` is off.
        """
        if not self._exchanges:
            return np.zeros_like(parameters)
        item = self.cost.workload.adapter_item
        dense = np.zeros(self.cost.num_blocks + 1)
        for layer in self.cost.layers:
            dense[layer.block + 1 :] += layer.in_features * layer.out_features
        down = np.minimum(len(self.names) * parameters, np.where(parameters > 0, dense[splits], 0.0))
        seconds: Array = item * (self.slowness[:, :1] * parameters + self.slowness[:, 1:] * down)
        return seconds

    def turn_seconds(self, own: Array, work: Array, forward_only: NDArray[np.bool_]) -> Array:
        """Seconds of a round of each client if it had the server to itself, of any shape.

        A client waits for the gradient of a step before it begins the next one. One that gets no gradient computes
        while the server does.

        Parameters
        ----------
        own, work : Array
            Seconds of the client itself, and of the server for it.
        forward_only : NDArray[np.bool_]
            Whether the client has no adapters.
        """
        overlaps = forward_only & (self.cost.workload.labels != "client")
        seconds: Array = np.where(overlaps, np.maximum(own, work), own + work)
        return seconds

    def of_clients(self, plan: Assignment) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
        """What a plan takes on the clients, ``(clients,)`` each.

        Returns
        -------
        taken, flops : Array
            Bytes beside the process, and operations of a step.
        again, forward_only : NDArray[np.bool_]
            Whether activations are recomputed, which they are only where memory does not hold them; and whether the
            client has no adapters.
        """
        below = np.where(self.block < plan.splits[:, None], plan.ranks, 0)
        blocks = np.maximum(plan.splits - np.where(below > 0, self.block, self.cost.num_blocks).min(axis=1), 0)
        taken, flops, again = np.full(len(below), np.inf), np.zeros(len(below)), np.zeros(len(below), bool)
        for index, tables in self.groups:
            split, floor = plan.splits[index], tables.floor[plan.splits[index]]
            for costs in tables.costs:
                cost = blocks[index, None] * costs.block + self.total(costs.below, below[index])
                training = cost[:, BYTES] + costs.base[split] + self.kept(costs.inputs_below, below[index])
                needed = np.where(blocks[index] > 0, np.maximum(floor, training), floor)
                fewer = (taken[index] > self.memory[index]) & (needed < taken[index])
                some = index[fewer]
                taken[some], again[some] = needed[fewer], costs.checkpointing
                flops[some] = (tables.forward[split] + cost[:, OPERATIONS])[fewer]
        return taken, flops, again, blocks == 0

    def of_server(self, costs: TrainingCosts, plan: Assignment) -> tuple[float, Array]:
        """What a plan takes on the server: its bytes, and its operations for a step of each client, ``(clients,)``."""
        above = np.where(self.block >= plan.splits[:, None], plan.ranks, 0)
        cost, clients, workload = self.total(costs.above, above), len(plan.splits), self.cost.workload
        adapters = self.total(self.tables.parameters, above) * workload.adapter_parameter_bytes
        passes = costs.passing[plan.splits] + cost[:, BYTES] - adapters + self.kept(costs.inputs_above, above)
        if workload.half == "shared":
            lowest = [int(plan.splits.argmin())]
            adapters, passes = adapters[lowest], passes[lowest]
        together = np.sort(passes)[-(workload.passes or clients) :]
        held = self.server_base + clients * self.tables.frames + adapters.sum() + together.sum()
        return float(held), costs.served[plan.splits] + cost[:, OPERATIONS]

    def servings(self, costs: TrainingCosts, lowest: int) -> list[Serving]:
        """The ways in which the server can serve clients of whom none has a split below ``lowest``.

        With halves of their own there is either room for a pass of every client, or for as many passes as can meet
        (``train.passes``), each as large as the largest from ``lowest`` up; which takes less depends on the clients.
        """
        workload, passes = self.cost.workload, self.cost.workload.passes
        frames, room = np.full(self.cost.num_blocks, self.tables.frames), self.memory_of_server - self.server_base
        if workload.half == "shared":
            room -= costs.passing[lowest]
            return [Serving(costs, lowest, False, costs.above, costs.inputs_above, frames, room)]
        found = [Serving(costs, lowest, True, costs.above, costs.inputs_above, frames + costs.passing, room)]
        if passes is not None and passes < len(self.names):
            every = np.where(self.block >= lowest, len(self.ranks) - 1, 0)
            adapters = costs.above.copy()
            adapters[..., BYTES] = self.tables.parameters * workload.adapter_parameter_bytes
            largest = costs.passing[lowest] + self.total(costs.above - adapters, every)[BYTES]
            largest += self.kept(costs.inputs_above, every)
            nothing = np.zeros_like(costs.inputs_above)
            found.append(Serving(costs, lowest, False, adapters, nothing, frames, room - passes * float(largest)))
        return found

    def objective(self, plan: Assignment) -> float:
        """``sum_i p_i sum_m J_m log2(1 + r_im)``, in units of the importance as it was given."""
        return self.total_importance * math.fsum(self.share * self.total(self.values, plan.ranks))

    def server_too_small(self, missing: float) -> PlanError:
        """The error for a server without room for its clients even without adapters."""
        return PlanError(
            f"the server has {self.memory_of_server:,.0f} bytes and misses {missing:,.0f} to serve {len(self.names)} "
            "client(s) even without adapters. Raise plan.server_memory_gb, or lower train.batch_size or data.max_length"
        )
