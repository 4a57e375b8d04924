"""Which weights matter, what a plan costs, and which plan each client gets."""

from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel, Workload
from hsplitlora_flwr.planning.greedy import unit_cost
from hsplitlora_flwr.planning.importance import combine, drift, scoring, smooth
from hsplitlora_flwr.planning.planner import ClientPlan, Plan, make_plan

__all__ = [
    "Budget",
    "ClientPlan",
    "CostModel",
    "Plan",
    "PlanError",
    "Workload",
    "combine",
    "drift",
    "make_plan",
    "scoring",
    "smooth",
    "unit_cost",
]
