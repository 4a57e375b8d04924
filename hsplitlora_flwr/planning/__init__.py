"""Planning a round: which weights matter, what a plan costs, and which plan each client gets.

In the order of a round (docs/method.md, sections 1 and 2):

- :mod:`~hsplitlora_flwr.planning.importance` scores the weights (IWI).
- :mod:`~hsplitlora_flwr.planning.cost` predicts memory, operations and bytes on the wire, from sizes that
  :mod:`~hsplitlora_flwr.planning.trace` reads off the model, for a
  :class:`~hsplitlora_flwr.planning.workload.Workload`.
- :mod:`~hsplitlora_flwr.planning.planner` makes a plan (ARMSC). The problem as arrays is
  :mod:`~hsplitlora_flwr.planning.problem` with the costs of :mod:`~hsplitlora_flwr.planning.tables`;
  :mod:`~hsplitlora_flwr.planning.exact` solves it, with the Pareto fronts of :mod:`~hsplitlora_flwr.planning.frontier`,
  the clients' side in :mod:`~hsplitlora_flwr.planning.below` and the server's memory in
  :mod:`~hsplitlora_flwr.planning.priced`; :mod:`~hsplitlora_flwr.planning.greedy` is the paper's rule.
- :mod:`~hsplitlora_flwr.planning.uniform` has the plans of other methods, :mod:`~hsplitlora_flwr.planning.leakage` the
  floor for privacy, and :mod:`~hsplitlora_flwr.planning.round` goes from a run's settings to its plan.
"""

from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.greedy import unit_cost
from hsplitlora_flwr.planning.importance import combine, drift, scoring, smooth
from hsplitlora_flwr.planning.planner import ClientPlan, Plan, make_plan
from hsplitlora_flwr.planning.workload import Workload

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
