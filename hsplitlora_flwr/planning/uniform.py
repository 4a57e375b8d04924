"""The plans of methods that do not choose a split point and a rank for every weight.

They answer in the same terms as :func:`hsplitlora_flwr.planning.planner.make_plan`, and hold budgets by the same cost
model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from hsplitlora_flwr.planning.cost import CostModel, PlanError
from hsplitlora_flwr.planning.planner import (
    Budget,
    ClientPlan,
    Plan,
    first_fitting,
    nobody_fits,
    recompute_choices,
)


def whole_plan(
    budgets: Mapping[str, Budget],
    cost: CostModel,
    *,
    ranks: Sequence[int],
    over_budget: bool = False,
    recompute: str = "off",
) -> Plan:
    """No split: every client holds the whole model, with one rank for all its weights.

    Parameters
    ----------
    ranks : Sequence[int]
        A client gets the highest of them that its memory holds.
    over_budget : bool
        A client whose memory does not hold even the lowest gets that one instead of being left out.
    recompute : {"off", "on", "auto"}
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.

    Raises
    ------
    PlanError
        If no client can hold the model; the text says how many bytes are missing.
    """
    plans: dict[str, ClientPlan] = {}
    left_out: dict[str, int] = {}
    offers = [dict.fromkeys((layer.name for layer in cost.layers), rank) for rank in sorted(set(ranks) - {0})]
    choices = recompute_choices(recompute)
    for client, budget in budgets.items():
        for offer in reversed(offers):
            memory = partial(cost.whole_bytes, offer, budget.process_bytes)
            price, again = first_fitting(memory, choices, budget.memory_bytes)
            if price <= budget.memory_bytes:
                break
        if price <= budget.memory_bytes or over_budget:
            plans[client] = ClientPlan(cost.num_blocks, offer, price, recompute=again)
        else:
            left_out[client] = price - budget.memory_bytes
    if not plans:
        remedy = "Set plan.over_budget, raise clients.memory_gb (memory-gb of the node), lower the ranks"
        raise nobody_fits(budgets, left_out, "the whole model", remedy)
    return Plan(plans, left_out, _objective(plans, cost))


def equal_plan(
    budgets: Mapping[str, Budget],
    cost: CostModel,
    *,
    rank: int,
    split: int = 0,
    server: Budget | None = None,
    min_split: int = 1,
    max_split: int | None = None,
    recompute: str = "off",
) -> Plan:
    """One split point and one rank for all weights of all clients.

    Parameters
    ----------
    split : int
        The split point; 0 takes the deepest that every client can hold. A client that cannot hold it is left out.
    server : Budget, optional
        The server's budget; unlimited when None.
    recompute : {"off", "on", "auto"}
        As for :func:`~hsplitlora_flwr.planning.planner.make_plan`.

    Raises
    ------
    PlanError
        If no client can hold it, or the server cannot hold its part; the text says how many bytes are missing.
    """
    offer = dict.fromkeys((layer.name for layer in cost.layers), rank)
    choices = recompute_choices(recompute)

    def price(depth: int, budget: Budget) -> tuple[int, bool]:
        return first_fitting(
            partial(cost.client_bytes, depth, offer, budget.process_bytes), choices, budget.memory_bytes
        )

    able = [budget for budget in budgets.values() if price(min_split, budget)[0] <= budget.memory_bytes]
    deeper = range(max_split or cost.num_blocks - 1, min_split, -1) if able and not split else ()
    depth = next(
        (depth for depth in deeper if all(price(depth, budget)[0] <= budget.memory_bytes for budget in able)),
        split or min_split,
    )
    plans: dict[str, ClientPlan] = {}
    left_out: dict[str, int] = {}
    for client, budget in budgets.items():
        taken, again = price(depth, budget)
        if taken <= budget.memory_bytes:
            plans[client] = ClientPlan(depth, offer, taken, recompute=again)
        else:
            left_out[client] = taken - budget.memory_bytes
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
    plans = {client: replace(plan, server_recompute=server_again) for client, plan in plans.items()}
    return Plan(plans, left_out, _objective(plans, cost), served)


def _objective(plans: Mapping[str, ClientPlan], cost: CostModel) -> float:
    """The planner's objective where all weights count the same."""
    values = (math.log2(1 + rank) for plan in plans.values() for rank in plan.ranks.values())
    return sum(values) / len(cost.layers)
