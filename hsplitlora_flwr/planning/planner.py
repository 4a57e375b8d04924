"""Adaptive rank and model split configuration (HSplitLoRA, section ARMSC): budgets become split points and ranks.

A plan maximises ``sum_i p_i sum_m J_m log2(1 + r_im)`` under every client's memory and the bytes that it may send, the
server's memory and, when given, a deadline; among the plans in which every client comes within a tolerance of that it
takes the shortest round (:mod:`hsplitlora_flwr.planning.exact`). So a client with room takes blocks off the server, and
a weak one spends its memory on the few weights that matter. The greedy rule of the paper
(:mod:`hsplitlora_flwr.planning.greedy`) is the named alternative, and its value stands beside every plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hsplitlora_flwr.planning import greedy
from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.exact import Solver
from hsplitlora_flwr.planning.problem import Assignment, Problem, least_bytes

PLANNERS = ("exact", "greedy")
CLIENTS = ("plan", "all", "none")
CHECKPOINTING = {"off": (False,), "on": (True,), "auto": (False, True)}


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
    predicted_seconds : float
        The client's own time in a round, computing and on the wire.
    checkpointing, server_checkpointing : bool
        Whether blocks of the client, and of the server for it, compute their activations again in the backward pass.
    forward_only : bool
        The client has no adapters: it computes forward alone, and its steps train the server's half.
    """

    split: int
    ranks: Mapping[str, int]
    predicted_bytes: int
    predicted_seconds: float = 0.0
    checkpointing: bool = False
    server_checkpointing: bool = False
    forward_only: bool = False

    @property
    def checkpointed(self) -> str:
        """The sides that compute their activations again: ``none``, ``client``, ``server`` or ``both``."""
        sides = [
            side for side, again in (("client", self.checkpointing), ("server", self.server_checkpointing)) if again
        ]
        return "both" if len(sides) > 1 else "".join(sides) or "none"


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
        ``sum_i p_i sum_m J_m log2(1 + r_im)``.
    server_bytes : int
        Predicted peak memory of the server.
    greedy_objective : float
        The objective of the greedy rule, which knows no deadline; 0 where it finds no plan.
    bound : float
        No plan has a higher objective; infinite where nothing is proven, as by the greedy rule.
    seconds : float
        Predicted time of a round's steps. The server takes one client's step after another, and clients compute
        meanwhile: what lasts longer, the server's steps for all or a client's own with the server's for it.
    """

    clients: Mapping[str, ClientPlan]
    left_out: Mapping[str, int] = field(default_factory=dict)
    objective: float = 0.0
    server_bytes: int = 0
    greedy_objective: float = 0.0
    bound: float = math.inf
    seconds: float = 0.0


def make_plan(
    budgets: Mapping[str, Budget],
    importance: Mapping[str, float],
    cost: CostModel,
    *,
    shares: Mapping[str, float] | None = None,
    ranks: Sequence[int] = (0, 2, 4, 8, 16, 32),
    server: Budget | None = None,
    min_split: int = 1,
    max_split: int | None = None,
    planner: str = "exact",
    important_share: float = 0.5,
    resource: str = "parameters",
    tolerance: float = 0.01,
    deadline: float | None = None,
    steps: int = 1,
    wire: tuple[str, str] = ("float32", "float32"),
    checkpointing: str = "off",
    clients: str = "plan",
    own: Mapping[str, CostModel] | None = None,
) -> Plan:
    """Choose a split point and ranks for every client.

    A client trains wherever its budget holds adapters at its split: its memory, the bytes that it may send, the
    deadline. Where it holds none at ``min_split`` or above, the client takes part without, as its steps still train
    the server's half; and so it does where all that its part could gain lies within the tolerance, for a shorter round.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        By client.
    importance : Mapping[str, float]
        ``J_m`` by absolute layer name, 0 or more; see :func:`hsplitlora_flwr.planning.importance.combine`. Uniform when
        no layer has any.
    cost : CostModel
        What plans cost.
    shares : Mapping[str, float], optional
        ``p_i`` by client in any unit, as its number of examples; equal when None.
    ranks : Sequence[int]
        The set ``Q``.
    server : Budget, optional
        The server's budget, shared by all clients; memory without bound when None.
    min_split, max_split : int
        Bounds of the split point; ``L - 1`` when ``max_split`` is None.
    planner : {"exact", "greedy"}
        How splits and ranks are chosen.
    important_share : float
        Greedy: the most important weights that together hold this share of the importance are to get the highest rank.
    resource : {"parameters", "flops"}
        Greedy: what importance is divided by; see :func:`hsplitlora_flwr.planning.greedy.unit_cost`.
    tolerance : float
        Exact: share of its value that every client may give up for a shorter round, from 0 to 1.
    deadline : float, optional
        Exact: longest predicted round in seconds.
    steps : int
        Passes of the cost model's workload in a round of a client.
    wire : tuple[str, str]
        Numbers on the wire, up and down; see :meth:`hsplitlora_flwr.planning.cost.CostModel.wire_bytes`.
    checkpointing : {"off", "on", "auto"}
        Whether blocks compute their activations again in the backward pass, on both sides; with ``auto`` a client does,
        and so does the server, where its memory does not hold its part of the plan otherwise.
    clients : {"plan", "all", "none"}
        Which clients have adapters: as above; all, and who cannot hold any is left out; or none.
    own : Mapping[str, CostModel], optional
        What plans cost a client, by name, where its rows are not as long as those that the server counts with: so
        another's long rows take none of its blocks.

    Returns
    -------
    Plan
        No budget is exceeded by the cost model.

    Raises
    ------
    PlanError
        If no client can take part, the server cannot hold its part, or no plan meets the deadline; the text says what
        is missing. Also if an argument is out of range.
    """
    max_split = cost.num_blocks - 1 if max_split is None else max_split
    _check(ranks, min_split, max_split, cost, planner, tolerance, steps)
    if clients not in CLIENTS:
        raise PlanError(f"clients={clients!r} is unknown; choose one of {', '.join(CLIENTS)}")
    choices = checkpointing_choices(checkpointing)
    if deadline is not None:
        _check_deadline(deadline, planner, [*budgets.values(), *([server] if server else [])])
    own, lowest = own or {}, min(rank for rank in ranks if rank > 0)
    missing = dict[str, int]()
    for client, budget in budgets.items():
        missing |= missing_bytes({client: budget}, own.get(client, cost), min_split, lowest, clients, choices)
    left_out = {client: count for client, count in missing.items() if count > 0}
    able = {client: budget for client, budget in budgets.items() if client not in left_out}
    if not able:
        what = f"even {min_split} block(s) with{' one' if clients == 'all' else 'out an'} adapter"
        raise nobody_fits(budgets, left_out, what, "Raise clients.memory_gb (memory-gb of the node)")
    problem = Problem(
        able,
        server,
        importance,
        shares,
        cost,
        ranks=ranks,
        min_split=min_split,
        max_split=max_split,
        steps=steps,
        wire=wire,
        checkpointing=choices,
        clients=clients,
        own=own,
    )
    if planner == "greedy":
        plan = greedy.solve(problem, important_share, resource)
        return _plan(problem, able, plan, left_out, problem.objective(plan), math.inf)
    solver = Solver(problem, tolerance, deadline)
    plan = solver.solve()
    try:
        greedy_objective = problem.objective(greedy.solve(problem, important_share, resource))
    except PlanError:
        greedy_objective = 0.0
    return _plan(problem, able, plan, left_out, greedy_objective, solver.bound() * problem.total_importance)


def checkpointing_choices(checkpointing: str) -> tuple[bool, ...]:
    """Whether activations may be kept (False) or computed again (True), what takes less time first.

    Raises
    ------
    PlanError
        If ``checkpointing`` is none of ``off``, ``on`` and ``auto``.
    """
    if checkpointing not in CHECKPOINTING:
        raise PlanError(f"checkpointing={checkpointing!r} is unknown; choose one of {', '.join(CHECKPOINTING)}")
    return CHECKPOINTING[checkpointing]


def missing_bytes(
    budgets: Mapping[str, Budget],
    cost: CostModel,
    split: int,
    rank: int,
    clients: str,
    checkpointing: Sequence[bool],
) -> dict[str, int]:
    """What every client lacks to take part, in bytes of memory or of adapters that it may send; 0 or less where it has
    enough. Parameters as for :func:`make_plan`, and ``rank`` the lowest."""
    needed, sent = least_bytes(cost, split, rank, clients, checkpointing), 0
    if clients == "all":
        below = (layer.adapter_parameters(rank) for layer in cost.layers if layer.block < split)
        sent = cost.workload.adapter_item * min(below, default=0)
    return {
        client: max(
            needed + budget.process_bytes - budget.memory_bytes,
            0 if budget.adapter_bytes is None else sent - budget.adapter_bytes,
        )
        for client, budget in budgets.items()
    }


def probe_plan(
    cost: CostModel,
    budget: Budget,
    ranks: Sequence[int],
    min_split: int = 1,
    max_split: int | None = None,
    *,
    checkpointing: bool = False,
    clients: str = "plan",
) -> ClientPlan | None:
    """What a client holds while the importance is measured; None when it cannot take part.

    Scoring keeps the input of every weight, so there must be room for the lowest rank on all of them. A client that has
    none, or is to have no adapters, computes forward alone, and the server scores what lies above its cut.
    """
    room = budget.memory_bytes - budget.process_bytes
    if cost.client_bytes(min_split, {}) > room:
        return None
    lowest = min(rank for rank in ranks if rank)
    deepest = cost.num_blocks - 1 if max_split is None else max_split
    for split in range(deepest, min_split - 1, -1) if clients != "none" else ():
        everywhere = {layer.name: lowest for layer in cost.layers if layer.block < split}
        if cost.client_bytes(split, everywhere, checkpointing=checkpointing) <= room:
            return ClientPlan(split, {}, 0, checkpointing=checkpointing, server_checkpointing=checkpointing)
    return ClientPlan(min_split, {}, 0, server_checkpointing=checkpointing, forward_only=True)


def _plan(
    problem: Problem,
    budgets: Mapping[str, Budget],
    assignment: Assignment,
    left_out: Mapping[str, int],
    greedy_objective: float,
    bound: float,
) -> Plan:
    """The plan with what it costs. A side computes nothing again that it can keep."""
    taken, flops, again, resting = problem.of_clients(assignment)
    sides = [(*problem.of_server(costs, assignment), costs.checkpointing) for costs in problem.prices.costs]
    fitting = next((side for side in sides if side[0] <= problem.memory_of_server), None)
    served, work, server_again = fitting or min(sides, key=lambda side: side[0])
    own = problem.own_seconds(flops[:, None], resting[:, None], problem.speed)[:, 0]
    work = problem.steps * work / problem.server_speed
    names, ranks = [layer.name for layer in problem.cost.layers], problem.ranks.tolist()
    plans: dict[str, ClientPlan] = {}
    for i, (client, budget) in enumerate(budgets.items()):
        chosen = {names[m]: ranks[assignment.ranks[i, m]] for m in np.flatnonzero(assignment.ranks[i]).tolist()}
        memory = int(taken[i]) + budget.process_bytes
        plans[client] = ClientPlan(
            int(assignment.splits[i]),
            chosen,
            memory,
            float(own[i]),
            checkpointing=bool(again[i] and not resting[i]),
            server_checkpointing=server_again,
            forward_only=bool(resting[i]),
        )
    return Plan(
        plans,
        left_out,
        problem.objective(assignment),
        int(served),
        greedy_objective,
        bound,
        float(max(problem.turn_seconds(own, work, resting).max(), work.sum())),
    )


def first_fitting(memory: Callable[..., int], choices: Sequence[bool], limit: float) -> tuple[int, bool]:
    """``memory(checkpointing=choice)`` and the choice: the first that keeps to a limit, else the smallest."""
    tried = []
    for choice in choices:
        tried.append((memory(checkpointing=choice), choice))
        if tried[-1][0] <= limit:
            return tried[-1]
    return min(tried)


def nobody_fits(budgets: Mapping[str, Budget], left_out: Mapping[str, int], what: str, remedy: str) -> PlanError:
    """The error of a plan in which nobody takes part: who has how many bytes, and how many are missing for ``what``."""
    who = "; ".join(
        f"client {client} has {budgets[client].memory_bytes:,} bytes and misses {missing:,}"
        for client, missing in left_out.items()
    )
    return PlanError(f"no client can hold {what}: {who}. {remedy}, or lower train.batch_size or data.max_length")


def _check(
    ranks: Sequence[int],
    min_split: int,
    max_split: int,
    cost: CostModel,
    planner: str,
    tolerance: float,
    steps: int,
) -> None:
    if planner not in PLANNERS:
        raise PlanError(f"planner={planner!r} is unknown; choose one of {', '.join(PLANNERS)}")
    if not any(rank > 0 for rank in ranks):
        raise PlanError(f"ranks={tuple(ranks)} hold none above 0; name at least one")
    if not 1 <= min_split <= max_split < cost.num_blocks:
        raise PlanError(
            f"min_split={min_split} and max_split={max_split} must lie in 1 .. {cost.num_blocks - 1}, in this order"
        )
    if not 0 <= tolerance <= 1:
        raise PlanError(f"tolerance={tolerance!r} must lie between 0 and 1")
    if steps < 1:
        raise PlanError(f"steps={steps!r} must be at least 1")


def _check_deadline(deadline: float, planner: str, machines: Sequence[Budget]) -> None:
    if not deadline > 0:
        raise PlanError(f"deadline={deadline!r} must be above 0 seconds, or None for no deadline")
    if planner == "greedy":
        raise PlanError(f"deadline={deadline:g} needs planner='exact'; the greedy rule knows memory only")
    if not any(machine.flops for machine in machines):
        raise PlanError(f"deadline={deadline:g} needs a speed; state clients.gflops or plan.server_gflops")
