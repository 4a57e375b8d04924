"""Which weights matter, what a plan costs, and which plan each client gets."""

from hsplitlora_flwr.planning.cost import CostModel, PlanError, Workload
from hsplitlora_flwr.planning.importance import combine, scoring
from hsplitlora_flwr.planning.planner import Budget, ClientPlan, Plan, make_plan

__all__ = ["Budget", "ClientPlan", "CostModel", "Plan", "PlanError", "Workload", "combine", "make_plan", "scoring"]
