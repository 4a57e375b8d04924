"""Adaptive rank and model split configuration (HSplitLoRA, section ARMSC): budgets become split points and ranks.

The greedy rule of the paper. Weights are taken by importance, each with the largest rank that still fits; a client's
split point is the deepest at which the important weights of its part all get the highest rank. So a client with room
takes blocks off the server, and a weak one spends its memory on the few weights that matter. The server's memory,
shared by the clients of a round, bounds the ranks above the split points in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hsplitlora_flwr.planning.cost import CostModel, Layer, PlanError


@dataclass(frozen=True)
class Budget:
    """What one client has.

    Parameters
    ----------
    memory_bytes : int
        Memory that its process may take at its peak.
    process_bytes : int
        What that process takes before it loads anything (measured).
    """

    memory_bytes: int
    process_bytes: int = 0


@dataclass(frozen=True)
class ClientPlan:
    """Split point and ranks of one client.

    Parameters
    ----------
    split : int
        Number of blocks on the client.
    ranks : Mapping[str, int]
        Rank by absolute layer name, of both sides; layers without an adapter are absent.
    predicted_bytes : int
        Peak memory of the client by the cost model.
    """

    split: int
    ranks: Mapping[str, int]
    predicted_bytes: int


@dataclass(frozen=True)
class Plan:
    """The plan of a round.

    Parameters
    ----------
    clients : Mapping[str, ClientPlan]
        By client.
    left_out : Mapping[str, int]
        Clients that no plan fits, with the bytes that they miss.
    objective : float
        ``sum_i sum_m J_m log2(1 + r_im)``.
    server_bytes : int
        Predicted peak memory of the server.
    """

    clients: Mapping[str, ClientPlan]
    left_out: Mapping[str, int] = field(default_factory=dict)
    objective: float = 0.0
    server_bytes: int = 0


def make_plan(
    budgets: Mapping[str, Budget],
    importance: Mapping[str, float],
    cost: CostModel,
    *,
    ranks: Sequence[int] = (0, 2, 4, 8, 16, 32),
    server: Budget | None = None,
    min_split: int = 1,
    max_split: int | None = None,
    important_share: float = 0.5,
) -> Plan:
    """Choose a split point and ranks for every client.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        By client.
    importance : Mapping[str, float]
        ``J_m`` by absolute layer name; see :func:`hsplitlora_flwr.planning.importance.combine`.
    cost : CostModel
        What plans cost.
    ranks : Sequence[int]
        The set ``Q``.
    server : Budget, optional
        The server's budget, shared by all clients; unlimited when None.
    min_split, max_split : int
        Bounds of the split point; ``L - 1`` when ``max_split`` is None.
    important_share : float
        The most important weights that together hold this share of the importance are to get the highest rank.

    Returns
    -------
    Plan
        No budget is exceeded by the cost model.

    Raises
    ------
    PlanError
        If no client can take part, or the server cannot hold its part; the text says how many bytes are missing.
    """
    max_split = cost.num_blocks - 1 if max_split is None else max_split
    by_importance = sorted(cost.layers, key=lambda layer: -importance.get(layer.name, 0.0))
    important: set[str] = set()
    held, total = 0.0, sum(importance.get(layer.name, 0.0) for layer in cost.layers)
    for layer in by_importance:
        if held >= important_share * total:
            break
        important.add(layer.name)
        held += importance.get(layer.name, 0.0)

    chosen: dict[str, tuple[int, dict[str, int]]] = {}
    left_out: dict[str, int] = {}
    for client, budget in budgets.items():
        missing = cost.client_bytes(min_split, {}, budget.process_bytes) - budget.memory_bytes
        if missing > 0:
            left_out[client] = missing
        else:
            split = _deepest_split(cost, budget, important, max(ranks), min_split, max_split)
            chosen[client] = split, _fill_client(cost, budget, split, by_importance, ranks)
    if not chosen:
        who = "; ".join(
            f"client {client} has {budgets[client].memory_bytes:,} bytes and misses {missing:,}"
            for client, missing in left_out.items()
        )
        raise PlanError(
            f"no client can hold even {min_split} block(s) without an adapter: {who}. Raise clients.memory_gb "
            "(memory-gb of the node), or lower train.batch_size or data.max_length"
        )
    _fill_server(cost, server, chosen, by_importance, ranks)
    plans = {
        client: ClientPlan(split, assigned, cost.client_bytes(split, assigned, budgets[client].process_bytes))
        for client, (split, assigned) in chosen.items()
    }
    objective = sum(
        importance.get(name, 0.0) * math.log2(1 + rank) for plan in plans.values() for name, rank in plan.ranks.items()
    )
    return Plan(plans, left_out, objective, cost.server_bytes(chosen, server.process_bytes if server else 0))


def probe_split(
    cost: CostModel, budget: Budget, ranks: Sequence[int], min_split: int = 1, max_split: int | None = None
) -> int | None:
    """The split point of a client while the importance is measured; None when it cannot take part.

    Scoring keeps the input of every weight, so there must be room for the lowest rank on all of them.
    """
    if cost.client_bytes(min_split, {}, budget.process_bytes) > budget.memory_bytes:
        return None
    lowest = min(rank for rank in ranks if rank)
    last = cost.num_blocks - 1 if max_split is None else max_split
    return _deepest_split(cost, budget, {layer.name for layer in cost.layers}, lowest, min_split, last)


def _deepest_split(
    cost: CostModel, budget: Budget, important: set[str], rank: int, min_split: int, max_split: int
) -> int:
    """The deepest split at which the important weights below it all get the highest rank; else the shallowest."""
    for split in range(max_split, min_split, -1):
        wanted = {layer.name: rank for layer in cost.layers if layer.block < split and layer.name in important}
        if cost.client_bytes(split, wanted, budget.process_bytes) <= budget.memory_bytes:
            return split
    return min_split


def _fill_client(
    cost: CostModel, budget: Budget, split: int, by_importance: Sequence[Layer], ranks: Sequence[int]
) -> dict[str, int]:
    """Ranks of the weights below the split: by importance, the largest that still fits."""
    assigned: dict[str, int] = {}
    for layer in by_importance:
        if layer.block >= split:
            continue
        for rank in sorted((rank for rank in ranks if rank), reverse=True):
            if cost.client_bytes(split, assigned | {layer.name: rank}, budget.process_bytes) <= budget.memory_bytes:
                assigned[layer.name] = rank
                break
    return assigned


def _fill_server(
    cost: CostModel,
    server: Budget | None,
    chosen: Mapping[str, tuple[int, dict[str, int]]],
    by_importance: Sequence[Layer],
    ranks: Sequence[int],
) -> None:
    """Add the ranks of the weights above every split: by importance, for all clients alike, what still fits."""
    free = math.inf
    if server is not None:
        free = server.memory_bytes - cost.server_bytes(
            {client: (split, {}) for client, (split, _) in chosen.items()}, server.process_bytes
        )
        if free < 0:
            raise PlanError(
                f"the server has {server.memory_bytes:,} bytes and misses {-free:,} to serve {len(chosen)} client(s) "
                "even without adapters. Raise plan.server_memory_gb, or lower train.batch_size or data.max_length"
            )
    inputs: set[tuple[str, int, int]] = set()  # activations that an adapter already makes a client's pass keep
    for layer in by_importance:
        for client, (split, assigned) in chosen.items():
            if layer.block < split:
                continue
            shared = (client, layer.block, layer.input_id) in inputs
            for rank in sorted((rank for rank in ranks if rank), reverse=True):
                price = cost.adapter_price(layer, rank) + (0 if shared else layer.input_bytes)
                if price <= free:
                    free -= price
                    assigned[layer.name] = rank
                    inputs.add((client, layer.block, layer.input_id))
                    break
