"""The cost model as arrays: what split points, ranks and inputs cost on either side.

For a fixed split point, memory and operations are sums: a constant, a cost per adapter, and the bytes of each layer's
input that an adapter makes autograd keep, once however many adapters read it. These terms are read from
:class:`~hsplitlora_flwr.planning.cost.CostModel` once. Dimensions are those of :mod:`hsplitlora_flwr.planning.problem`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hsplitlora_flwr.planning.arrays import Array, Index
from hsplitlora_flwr.planning.cost import CostModel


class TrainingCosts(NamedTuple):
    """What training costs with activations kept for backward, or under activation checkpointing.

    Parameters
    ----------
    checkpointing : bool
    below, above : Array
        ``(layers, ranks, 3)``; an adapter on a client, and on the server.
    inputs_below, inputs_above : Array
        ``(inputs,)``; bytes that the first adapter on an input adds, on a client and on the server.
    base : Array
        ``(L,)``; bytes of a client that trains, beside its adapters and kept activations, by split.
    block : Array
        ``(3,)``; what a client pays for every block from its lowest adapter up, whatever that block's own ranks: kept
        activations and the backward pass.
    work : float
        Operations of a step per adapter parameter.
    passing, served : Array
        ``(L,)``; bytes and operations of a pass of the server without adapters, by split.
    """

    checkpointing: bool
    below: Array
    above: Array
    inputs_below: Array
    inputs_above: Array
    base: Array
    block: Array
    work: float
    passing: Array
    served: Array


def least_bytes(cost: CostModel, split: int, rank: int, clients: str, checkpointing: Sequence[bool]) -> int:
    """The fewest bytes that a client takes beside its process.

    That is without adapters, where it may have none (``clients``, as for
    :func:`~hsplitlora_flwr.planning.planner.make_plan`); otherwise with one of ``rank`` in its highest block that can
    have any, since nothing below an adapter is kept.
    """
    if clients != "all":
        return cost.client_bytes(split, {})
    highest = max((layer.block for layer in cost.layers if layer.block < split), default=-1)
    one = [{layer.name: rank} for layer in cost.layers if layer.block == highest] or [{}]
    return min(cost.client_bytes(split, ranks, checkpointing=again) for ranks in one for again in checkpointing)


class CostTables:
    """The terms of one cost model; parameters as for :class:`~hsplitlora_flwr.planning.problem.Problem`.

    Attributes
    ----------
    floor, forward : Array
        ``(L,)``; the fewest bytes of a client, and its operations of a step without adapters, by split.
    frames : float
        Bytes of the server's memory that every client takes for its frames.
    wire : dict[bool, tuple[int, int]]
        Bytes of a step up and down, by whether the client computes forward alone.
    parameters : Array
        ``(layers, ranks)``; adapter parameters.
    costs : tuple of TrainingCosts
        For every choice in ``checkpointing``.
    """

    def __init__(
        self,
        cost: CostModel,
        splits: Index,
        ranks: Index,
        clients: str,
        checkpointing: Sequence[bool],
        wire: tuple[str, str],
    ) -> None:
        self._cost, self._splits, self._ranks = cost, splits.tolist(), ranks.tolist()
        self.floor, self.forward = np.zeros(cost.num_blocks), np.zeros(cost.num_blocks)
        for split in self._splits:
            self.floor[split] = least_bytes(cost, split, self._ranks[1], clients, checkpointing)
            self.forward[split] = cost.client_flops(split, {})
        self.frames = float(cost.held_bytes(cost.num_blocks - 1, {}))
        self.wire = {alone: cost.wire_bytes(*wire, forward_only=alone) for alone in (False, True)}
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in cost.layers}
        self._inputs = np.array(list(inputs.values()), float)
        self.parameters = np.array([[layer.adapter_parameters(rank) for rank in self._ranks] for layer in cost.layers])
        self.costs = tuple(map(self._costs, checkpointing))

    def _costs(self, checkpointing: bool) -> TrainingCosts:
        cost, first, in_flight = self._cost, self._cost.layers[0], self._cost.workload.in_flight
        # A client peaks while it loads the update (`floor`) or while it trains (`base` and what adapters add). A rank
        # beyond every update makes the second peak the larger one, so that subtracting the adapters leaves `base`.
        base, passing, served = np.zeros((3, cost.num_blocks))
        huge = {first.name: 2**40}
        for split in self._splits:
            trained = cost.adapter_bytes(huge, 0, split) + cost.kept_bytes(huge, 0, split, checkpointing=checkpointing)
            base[split] = cost.client_bytes(split, huge, checkpointing=checkpointing) - trained
            passing[split] = cost.pass_bytes(split, {}, checkpointing=checkpointing)
            served[split] = cost.server_flops(split, {}, checkpointing=checkpointing)
        one = {first.name: self._ranks[1]}
        # On a server that holds all blocks the backward pass runs in any case: what one adapter adds is its own work.
        alone = cost.server_flops(0, {}, checkpointing=checkpointing)
        work = (cost.server_flops(0, one, checkpointing=checkpointing) - alone) / cost.adapter_parameters(one)
        split = max(self._splits[0], first.block + 1)
        added = cost.client_flops(split, one, checkpointing=checkpointing) - cost.client_flops(split, {})
        backward = (added - work * cost.adapter_parameters(one)) / (split - first.block)
        on_server = cost.server_micro_batches

        def items(micro_batches: int) -> Array:
            kept = 0 if checkpointing else micro_batches
            taken = [[cost.adapter_price(layer, rank, kept) for rank in self._ranks] for layer in cost.layers]
            return np.stack([np.array(taken, float), self.parameters, work * self.parameters], axis=2)

        inputs = np.zeros_like(self._inputs) if checkpointing else self._inputs
        return TrainingCosts(
            checkpointing,
            items(in_flight),
            items(on_server),
            inputs,
            inputs * on_server / in_flight,
            base,
            np.array([cost.block_bytes(checkpointing), 0.0, backward]),
            work,
            passing,
            served,
        )
