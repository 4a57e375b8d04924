"""No client's numbers move another client's cut towards the embeddings.

A plan is made for all clients together, and the shortest round is that of the slowest: one that says it is slower than
any machine, or that needs the server's memory, would let the others hold fewer blocks, whose activations tell more of
their text. So no client is cut before where a plan for it alone would cut it. Only a deadline that the operator states
goes before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.planner import Budget, ClientPlan, Plan


def keep_depth(
    plan: Plan,
    budgets: Mapping[str, Budget],
    plan_alone: Callable[[Budget], ClientPlan],
    importance: Mapping[str, float],
    cost: CostModel,
) -> Plan:
    """The plan with every client cut no earlier than if it were alone.

    Where it is cut deeper, the blocks between go over to it with the ranks that its memory holds, and the others'
    plans stay. That takes memory off the server and none from anybody.

    Parameters
    ----------
    plan : Plan
        For all clients together.
    budgets : Mapping[str, Budget]
        By client.
    plan_alone : Callable[[Budget], ClientPlan]
        The plan of a client that is the only one; asked for once for clients with one and the same budget.
    importance : Mapping[str, float]
        By absolute layer name.
    cost : CostModel
        Knows the layers.
    """
    block = {layer.name: layer.block for layer in cost.layers}
    alone: dict[Budget, ClientPlan] = {}
    clients, objective = dict(plan.clients), plan.objective
    deepest = cost.num_blocks - 1
    for name, joint in plan.clients.items():
        budget = budgets[name]
        if joint.split == deepest:
            continue
        if budget not in alone:
            alone[budget] = plan_alone(budget)
        own = alone[budget]
        if joint.split >= own.split:
            continue
        ranks = {layer: rank for layer, rank in own.ranks.items() if block[layer] < own.split}
        ranks |= {layer: rank for layer, rank in joint.ranks.items() if block[layer] >= own.split}
        clients[name] = replace(own, ranks=ranks, server_recompute=joint.server_recompute)
        objective += _value(ranks, importance) - _value(joint.ranks, importance)
    slowest, before = (max(each.predicted_seconds for each in which.values()) for which in (clients, plan.clients))
    return replace(plan, clients=clients, objective=objective, seconds=plan.seconds + slowest - before)


def _value(ranks: Mapping[str, int], importance: Mapping[str, float]) -> float:
    return math.fsum(importance.get(name, 0.0) * math.log2(1 + rank) for name, rank in ranks.items())
