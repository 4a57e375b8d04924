"""The planning problem in numbers: what every split point and rank costs, and what a rank is worth.

Read once from the cost model, which is linear in them: for a fixed split the memory and the time of a client, and what
the server takes, are a constant plus a price for each adapter, plus a price for each input that an adapter makes
autograd keep. Arrays run over clients ``i``, layers ``m`` (of ``CostModel.layers``), ranks ``k`` (ascending, 0 first),
inputs ``g`` and split points ``l``.
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

NOMINAL_FLOPS = 1e12
"""FLOP/s of every machine where no speed is stated. Only ratios matter then."""


class Assignment(NamedTuple):
    """Split point, ``(clients,)``, and ranks of both sides, ``(clients, layers)``, of every client."""

    splits: Index
    ranks: Ranks


class Costs(NamedTuple):
    """What adapters cost where activations are kept for backward, or where they are computed again."""

    recompute: bool
    below: Array
    """``(layers, ranks)``; bytes of an adapter on a client, and ``above`` on the server."""
    above: Array
    inputs_below: Array
    """``(inputs,)``; bytes that the first adapter on an input adds on a client, and ``inputs_above`` on the server."""
    inputs_above: Array
    base: Array
    """``(L,)``; bytes of a client that trains, by split, beside its adapters and the activations that it keeps."""
    block_bytes: float
    """Of a client, for every block from the lowest adapted one up; ``backward`` is its operations."""
    backward: float
    work: float
    """Operations of a step for every parameter of an adapter."""
    passing: Array
    """``(L,)``; bytes of a pass of the server without adapters, by split; ``served`` is its operations."""
    served: Array


class Way(NamedTuple):
    """How the server may serve: what adapters and their inputs cost there, what every client takes by split, ``(L,)``,
    and the bytes that there are for all of it."""

    costs: Costs
    prices: Array
    inputs: Array
    taken: Array
    room: float


def least_bytes(cost: CostModel, split: int, rank: int, clients: str, recompute: Sequence[bool]) -> int:
    """The least that a client takes beside its process.

    Without adapters, where it may have none (``clients``); else with one of ``rank`` in the highest block that can get
    any, below which nothing is kept.
    """
    if clients != "all":
        return cost.client_bytes(split, {})
    highest = max((layer.block for layer in cost.layers if layer.block < split), default=-1)
    one = [{layer.name: rank} for layer in cost.layers if layer.block == highest] or [{}]
    return min(cost.client_bytes(split, ranks, recompute=again) for ranks in one for again in recompute)


class Problem:
    """Budgets, shares, importance and costs as arrays. Values are in units of the importance of all layers together.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        Of the clients that can hold ``min_split`` blocks without an adapter, by name.
    server : Budget or None
        The server's; memory without bound when None.
    importance : Mapping[str, float]
        ``J_m`` by layer name; uniform when it is 0 everywhere.
    shares : Mapping[str, float] or None
        ``p_i`` by client, in any unit; equal when None.
    cost : CostModel
        What plans cost the server, and clients of whom nothing else is known.
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
    clients : {"plan", "all", "none"}
        Which clients have adapters; see :func:`hsplitlora_flwr.planning.planner.make_plan`.
    own : Mapping[str, CostModel], optional
        What plans cost a client, by name, where its rows are not as long as those that the server counts with.

    Attributes
    ----------
    groups : list of (Index, Problem)
        The clients by what plans cost them, each group as the problem of these clients alone: what a client can hold,
        and what it would have alone with the server, is found there.
    may_train, may_rest : bool
        Whether a client can be given adapters, and whether it can be given none.
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
        recompute: Sequence[bool] = (False,),
        clients: str = "plan",
        own: Mapping[str, CostModel] | None = None,
    ) -> None:
        self.cost, self.server, self.steps = cost, server, steps
        self.may_train, self.may_rest = clients != "none", clients != "all"
        self.ranks = np.array([0, *sorted({rank for rank in ranks if rank > 0})])
        self.splits = np.arange(min_split, max_split + 1)
        self.names = list(budgets)
        self._read_clients(list(budgets.values()), shares, wire)
        self._read_layers(importance)
        self.floor, self.forward = np.zeros(cost.num_blocks), np.zeros(cost.num_blocks)
        for split in self.splits.tolist():  # the least that there is; without adapters nothing is kept
            self.floor[split] = least_bytes(cost, split, int(self.ranks[1]), clients, recompute)
            self.forward[split] = cost.client_flops(split, {})
        self.costs = tuple(map(self._costs, recompute))
        self.frames = cost.held_bytes(cost.num_blocks - 1, {})
        self.resting = cost.server_bytes({}, server.process_bytes if server else 0)
        self.memory_of_server = float(server.memory_bytes) if server else math.inf
        of_clients = {name: (own or {}).get(name, cost) for name in self.names}
        models = list({id(model): model for model in of_clients.values()}.values())
        self.groups: list[tuple[Index, Problem]] = [(np.arange(len(self.names)), self)]
        if models == [cost]:
            return
        self.groups = []
        for model in models:
            index = np.flatnonzero([each is model for each in of_clients.values()])
            members = {self.names[i]: budgets[self.names[i]] for i in index.tolist()}
            group = Problem(
                members,
                server,
                importance,
                None,
                model,
                ranks=ranks,
                min_split=min_split,
                max_split=max_split,
                steps=steps,
                wire=wire,
                recompute=recompute,
                clients=clients,
            )
            self.wire[index], self.wire_of_resting[index] = group.wire, group.wire_of_resting
            self.groups.append((index, group))

    def _read_clients(
        self, budgets: Sequence[Budget], shares: Mapping[str, float] | None, wire: tuple[str, str]
    ) -> None:
        def seconds(*, forward_only: bool) -> Array:
            up, down = self.cost.wire_bytes(*wire, forward_only=forward_only)
            return np.array([(up / b.up if b.up else 0.0) + (down / b.down if b.down else 0.0) for b in budgets])

        stated = [machine.flops for machine in (*budgets, self.server) if machine and machine.flops]
        mean, server = fmean(stated or [NOMINAL_FLOPS]), self.server.flops if self.server else None
        self.memory = np.array([budget.memory_bytes - budget.process_bytes for budget in budgets], float)
        limits = (math.inf if b.adapter_bytes is None else b.adapter_bytes for b in budgets)
        self.adapters = np.floor(np.array(list(limits), float) / self.cost.workload.adapter_item)
        self.speed = np.array([budget.flops or mean for budget in budgets])
        self.wire, self.wire_of_resting = seconds(forward_only=False), seconds(forward_only=True)
        self.server_speed = server or mean
        # Alone with the server, what is not stated is as for the other of the two.
        self.speed_alone = np.array([budget.flops or server or NOMINAL_FLOPS for budget in budgets])
        self.server_speed_alone = np.full(len(budgets), server) if server else self.speed_alone
        share = np.array([1.0 if shares is None else shares[name] for name in self.names])
        if not (np.isfinite(share) & (share >= 0)).all() or not share.any():
            raise PlanError(
                f"shares={dict(zip(self.names, share.tolist(), strict=True))} must be 0 or more, and one above"
            )
        self.share = share / share.sum()

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
        self.parameters = np.array(
            [[layer.adapter_parameters(rank) for rank in self.ranks.tolist()] for layer in layers]
        )
        self.block = np.array([layer.block for layer in layers])
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in layers}
        number = {key: g for g, key in enumerate(inputs)}
        self.input = np.array([number[layer.block, layer.input_id] for layer in layers])
        self.input_bytes: Array = np.array(list(inputs.values()), float)
        self.input_block = np.array([block for block, _ in inputs])
        self._reads = np.eye(len(inputs))[self.input]  # (layers, inputs)
        self._lies_in = np.eye(self.cost.num_blocks)[self.block]  # (layers, L)
        self.by_block: list[dict[int, list[int]]] = [{} for _ in range(self.cost.num_blocks)]
        for m, (block, g) in enumerate(zip(self.block.tolist(), self.input.tolist(), strict=True)):
            self.by_block[block].setdefault(g, []).append(m)  # layers by block and input

    def _costs(self, recompute: bool) -> Costs:
        cost, first, flight = self.cost, self.cost.layers[0], self.cost.workload.in_flight
        # A client's peak is either `floor`, the accumulated update, or `base` and what training adds to it. At a rank
        # that outweighs every update it is the latter.
        base, passing, served = np.zeros((3, cost.num_blocks))
        huge = {first.name: 2**40}
        for split in self.splits.tolist():
            trained = cost.adapter_bytes(huge, 0, split) + cost.kept_bytes(huge, 0, split, recompute=recompute)
            base[split] = cost.client_bytes(split, huge, recompute=recompute) - trained
            passing[split] = cost.pass_bytes(split, {}, recompute=recompute)
            served[split] = cost.server_flops(split, {}, recompute=recompute)
        one = {first.name: int(self.ranks[1])}
        # On a server, with all blocks, the backward pass runs anyway: what an adapter adds is its own.
        alone = cost.server_flops(0, {}, recompute=recompute)
        work = (cost.server_flops(0, one, recompute=recompute) - alone) / cost.adapter_parameters(one)
        split = max(int(self.splits[0]), first.block + 1)
        added = cost.client_flops(split, one, recompute=recompute) - cost.client_flops(split, {})
        backward = (added - work * cost.adapter_parameters(one)) / (split - first.block)

        def prices(micro_batches: int) -> Array:
            kept = 0 if recompute else micro_batches
            return np.array(
                [[cost.adapter_price(layer, rank, kept) for rank in self.ranks.tolist()] for layer in cost.layers],
                float,
            )

        on_server = cost.server_micro_batches
        return Costs(
            recompute,
            prices(flight),
            prices(on_server),
            np.zeros_like(self.input_bytes) if recompute else self.input_bytes,
            np.zeros_like(self.input_bytes) if recompute else self.input_bytes * on_server / flight,
            base,
            cost.block_bytes(recompute),
            backward,
            work,
            passing,
            served,
        )

    def own_seconds(self, flops: Array, resting: NDArray[np.bool_], speed: Array) -> Array:
        """Time of a round of clients whose step takes ``flops`` operations, ``(clients, splits)``; those that are
        ``resting`` have no adapters, and no gradient comes down to them."""
        wire = np.where(resting, self.wire_of_resting[:, None], self.wire[:, None])
        seconds: Array = self.steps * (flops / speed[:, None] + wire)
        return seconds

    def total(self, table: Array, ranks: Ranks) -> Array:
        """``(...,)``; the sum over layers of what ``table`` has for their rank."""
        totals: Array = table[np.arange(len(self.block)), ranks].sum(axis=-1)
        return totals

    def kept(self, inputs: Array, ranks: Ranks) -> Array:
        """``(...,)``; bytes of the inputs that adapters make autograd keep."""
        kept: Array = ((ranks > 0) @ self._reads > 0) @ inputs
        return kept

    def from_split_up(self, table: Array, ranks: Ranks) -> Array:
        """``(..., splits)``; the sum over layers from each split up of what ``table`` has for their rank."""
        blocks = table[np.arange(len(self.block)), ranks] @ self._lies_in
        sums: Array = np.cumsum(blocks[..., ::-1], axis=-1)[..., ::-1][..., self.splits]
        return sums

    def of_clients(self, plan: Assignment) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
        """``(clients,)``; bytes beside the process, operations of a step, whether activations are computed again: only
        where they could not be kept; and whether there are no adapters."""
        taken, flops, again, resting = np.zeros((4, len(self.names)))
        for index, group in self.groups:
            found = group._of_group(Assignment(plan.splits[index], plan.ranks[index]))
            taken[index], flops[index], again[index], resting[index] = found
        return taken, flops, again > 0, resting > 0

    def _of_group(self, plan: Assignment) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
        """The same of clients that this problem's own cost model is for."""
        splits = plan.splits
        below = np.where(self.block < splits[:, None], plan.ranks, 0)
        blocks = np.maximum(splits - np.where(below > 0, self.block, self.cost.num_blocks).min(axis=1), 0)
        parameters = self.total(self.parameters, below)
        taken, flops, again = np.full(len(splits), np.inf), np.zeros(len(splits)), np.zeros(len(splits), bool)
        for costs in self.costs:
            training = costs.base[splits] + blocks * costs.block_bytes + self.total(costs.below, below)
            training += self.kept(costs.inputs_below, below)
            needed = np.where(blocks > 0, np.maximum(self.floor[splits], training), self.floor[splits])
            fewer = (taken > self.memory) & (needed < taken)
            work = self.forward[splits] + blocks * costs.backward + costs.work * parameters
            taken, flops = np.where(fewer, needed, taken), np.where(fewer, work, flops)
            again = np.where(fewer, costs.recompute, again)
        return taken, flops, again, blocks == 0

    def of_server(self, costs: Costs, plan: Assignment) -> tuple[float, float]:
        """Bytes, and operations of a step of every client."""
        above = np.where(self.block >= plan.splits[:, None], plan.ranks, 0)
        parameters, clients = self.total(self.parameters, above), len(plan.splits)
        adapters = parameters * self.cost.workload.adapter_parameter_bytes
        passes = costs.passing[plan.splits] + self.total(costs.above, above) - adapters
        passes += self.kept(costs.inputs_above, above)
        if self.cost.workload.half == "shared":
            lowest = [int(plan.splits.argmin())]
            adapters, passes = adapters[lowest], passes[lowest]
        together = np.sort(passes)[-(self.cost.workload.passes or clients) :]
        flops = costs.served[plan.splits].sum() + costs.work * parameters.sum()
        return self.resting + clients * self.frames + adapters.sum() + together.sum(), float(flops)

    def ways(self, costs: Costs, lowest: int) -> list[Way]:
        """How the server may serve clients none of whom has a lower split than ``lowest``.

        With a half for each client it needs room for as many passes as can meet, each of them as large as the largest
        from there; or for one of every client, where that is less.
        """
        clients, workload = len(self.names), self.cost.workload
        frames, room = np.full(self.cost.num_blocks, float(self.frames)), self.memory_of_server - self.resting
        if workload.half == "shared":
            return [Way(costs, costs.above, costs.inputs_above, frames, room - costs.passing[lowest])]
        ways = [Way(costs, costs.above, costs.inputs_above, frames + costs.passing, room)]
        if workload.passes is not None and workload.passes < clients:
            every = np.where(self.block >= lowest, len(self.ranks) - 1, 0)
            adapters = self.parameters * float(workload.adapter_parameter_bytes)
            largest = costs.passing[lowest] + self.total(costs.above - adapters, every)
            largest += self.kept(costs.inputs_above, every)
            ways.append(
                Way(costs, adapters, np.zeros_like(self.input_bytes), frames, room - workload.passes * float(largest))
            )
        return ways

    def objective(self, plan: Assignment) -> float:
        """``sum_i p_i sum_m J_m log2(1 + r_im)``, in units of the importance as it was given."""
        return self.total_importance * math.fsum(self.share * self.total(self.values, plan.ranks))

    def server_too_small(self, missing: float) -> PlanError:
        """The error for a server without room for its clients even without adapters."""
        return PlanError(
            f"the server has {self.memory_of_server:,.0f} bytes and misses {missing:,.0f} to serve {len(self.names)} "
            "client(s) even without adapters. Raise plan.server_memory_gb, or lower train.batch_size or data.max_length"
        )
