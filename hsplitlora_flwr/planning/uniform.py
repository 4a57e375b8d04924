"""The plans of methods that choose neither a split point for each client nor a rank for each weight.

They are :class:`~hsplitlora_flwr.planning.planner.Plan` objects like those of
:func:`hsplitlora_flwr.planning.planner.make_plan`, and keep to budgets by the same cost model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.planner import ClientPlan, Plan, checkpointing_choices, first_fitting, nobody_fits


def whole_plan(
    budgets: Mapping[str, Budget],
    cost: CostModel,
    *,
    ranks: Sequence[int],
    over_budget: bool = False,
    checkpointing: str = "off",
    shares: Mapping[str, float] | None = None,
    own: Mapping[str, CostModel] | None = None,
) -> Plan:
    """No split: every client holds the whole model, with one rank for all its weights.

    Parameters
    ----------
    ranks : Sequence[int]
        A client gets the highest of them whose adapters its memory holds and it may send.
    over_budget : bool
        A client whose budget does not hold even the lowest rank gets that one instead of being left out.
    checkpointing : {"off", "on", "auto"}
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.
    shares : Mapping[str, float], optional
        ``p_i`` by client; equal when None.
    own : Mapping[str, CostModel], optional
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.

    Raises
    ------
    PlanError
        If no client can hold the model; the text says how many bytes are missing.
    """
    plans: dict[str, ClientPlan] = {}
    left_out: dict[str, int] = {}
    offers = [dict.fromkeys((layer.name for layer in cost.layers), rank) for rank in sorted(set(ranks) - {0})]
    choices = checkpointing_choices(checkpointing)
    for client, budget in budgets.items():
        for offer in reversed(offers):
            memory = partial((own or {}).get(client, cost).whole_bytes, offer, budget.process_bytes)
            price, again = first_fitting(memory, choices, budget.memory_bytes)
            missing = _missing(budget, price, cost, offer, cost.num_blocks)
            if missing <= 0:
                break
        if missing <= 0 or over_budget:
            plans[client] = ClientPlan(cost.num_blocks, offer, price, checkpointing=again)
        else:
            left_out[client] = missing
    if not plans:
        remedy = "Set plan.over_budget, raise clients.memory_gb (memory-gb of the node), lower the ranks"
        raise nobody_fits(budgets, left_out, "the whole model", remedy)
    return Plan(plans, left_out, _objective(plans, cost, shares))


def equal_plan(
    budgets: Mapping[str, Budget],
    cost: CostModel,
    *,
    rank: int,
    split: int = 0,
    server: Budget | None = None,
    min_split: int = 1,
    max_split: int | None = None,
    checkpointing: str = "off",
    shares: Mapping[str, float] | None = None,
    trains: bool = True,
    own: Mapping[str, CostModel] | None = None,
) -> Plan:
    """One split point and one rank for all weights of all clients.

    Parameters
    ----------
    split : int
        The split point; 0 takes the deepest that all clients can hold that can hold any. A client that cannot hold it
        is left out.
    server : Budget, optional
        The server's budget; unlimited when None.
    checkpointing : {"off", "on", "auto"}
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.
    shares : Mapping[str, float], optional
        ``p_i`` by client; equal when None.
    trains : bool
        Whether clients have adapters; otherwise only the server's half trains.
    own : Mapping[str, CostModel], optional
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.

    Raises
    ------
    PlanError
        If no client can hold it, or the server cannot hold its part; the text says how many bytes are missing.
    """
    choices = checkpointing_choices(checkpointing)

    def offer(depth: int) -> dict[str, int]:
        return {layer.name: rank for layer in cost.layers if trains or layer.block >= depth}

    def price(depth: int, client: str) -> tuple[int, bool]:
        mine, budget = (own or {}).get(client, cost), budgets[client]
        taken, again = first_fitting(
            partial(mine.client_bytes, depth, offer(depth), budget.process_bytes), choices, budget.memory_bytes
        )
        return taken, again and trains

    def missing(depth: int, client: str) -> int:
        return _missing(budgets[client], price(depth, client)[0], cost, offer(depth), depth)

    able = [client for client in budgets if missing(min_split, client) <= 0]
    deeper = range(max_split or cost.num_blocks - 1, min_split, -1) if able and not split else ()
    depth = next((depth for depth in deeper if all(missing(depth, each) <= 0 for each in able)), split or min_split)
    plans: dict[str, ClientPlan] = {}
    left_out: dict[str, int] = {}
    for client in budgets:
        taken, again = price(depth, client)
        if (lacking := missing(depth, client)) <= 0:
            plans[client] = ClientPlan(depth, offer(depth), taken, checkpointing=again, forward_only=not trains)
        else:
            left_out[client] = lacking
    if not plans:
        remedy = "Raise clients.memory_gb (memory-gb of the node), lower lora.rank"
        raise nobody_fits(budgets, left_out, f"{depth} block(s) with adapters of rank {rank}", remedy)
    clients = {client: (plan.split, plan.ranks) for client, plan in plans.items()}
    served, server_again = first_fitting(
        partial(cost.server_bytes, clients, server.process_bytes if server else 0),
        choices,
        server.memory_bytes if server else math.inf,
    )
    if server is not None and served > server.memory_bytes:
        raise PlanError(
            f"the server has {server.memory_bytes:,} bytes and misses {served - server.memory_bytes:,} to serve "
            f"{len(plans)} client(s) with adapters of rank {rank}. Raise plan.server_memory_gb or lower lora.rank"
        )
    plans = {client: replace(plan, server_checkpointing=server_again) for client, plan in plans.items()}
    return Plan(plans, left_out, _objective(plans, cost, shares), served)


def _missing(budget: Budget, taken: int, cost: CostModel, ranks: Mapping[str, int], split: int) -> int:
    """The bytes that a client lacks, of memory or of adapters that it may send; 0 or less if it has enough."""
    sent = sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in cost.layers if layer.block < split)
    unsent = 0 if budget.adapter_bytes is None else sent * cost.workload.adapter_item - budget.adapter_bytes
    return max(taken - budget.memory_bytes, unsent)


def _objective(plans: Mapping[str, ClientPlan], cost: CostModel, shares: Mapping[str, float] | None) -> float:
    """``sum_i p_i sum_m J_m log2(1 + r_im)`` with the same importance, ``1 / layers``, for all weights."""
    weights = {client: 1.0 if shares is None else shares[client] for client in plans}
    values = (weights[client] * math.log2(1 + rank) for client, plan in plans.items() for rank in plan.ranks.values())
    return sum(values) / sum(weights.values()) / len(cost.layers)
