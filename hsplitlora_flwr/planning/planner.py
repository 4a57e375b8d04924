"""Adaptive rank and model split configuration (ARMSC; docs/method.md, section 2): budgets become splits and ranks.

A plan gives every client ``i`` a split point ``l_i`` and a rank ``r_im`` for every weight ``m``. It maximises

    sum_i p_i sum_m J_m log2(1 + r_im)

(``p_i``: the client's share of the examples, ``J_m``: the weight's importance) under every client's memory and the
bytes of adapters that it may send, the server's memory and, where stated, a deadline. Among the plans in which every
client comes within a tolerance of its best, the shortest round wins (:mod:`hsplitlora_flwr.planning.exact`). The greedy
rule of the paper (:mod:`hsplitlora_flwr.planning.greedy`) is ``planner="greedy"``, and its value stands beside every
plan.
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
from hsplitlora_flwr.planning.problem import Assignment, Problem
from hsplitlora_flwr.planning.tables import least_bytes

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
        Activation checkpointing of the client's blocks, and of the server's for it.
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
        """The sides under activation checkpointing: ``none``, ``client``, ``server`` or ``both``."""
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
        Clients that cannot take part, with the bytes that they lack.
    objective : float
        ``sum_i p_i sum_m J_m log2(1 + r_im)``.
    server_bytes : int
        Predicted peak memory of the server.
    greedy_objective : float
        The objective of the greedy rule's plan, without the deadline; 0 where it finds no plan.
    bound : float
        An upper bound of the objective of any plan; infinite where none is known, as with the greedy rule.
    seconds : float
        Predicted time of a round. The server takes one client's step after another while the clients compute: the
        longer of the server's steps for all clients, and a client's own with the server's for it; and with
        ``exchanges`` the slowest client's update and adapters.
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
    exchanges: bool = False,
) -> Plan:
    """Choose a split point and ranks for every client.

    A client has adapters wherever its budget (memory, bytes that it may send, deadline) holds any at its split. If it
    holds none even at ``min_split``, the client takes part without adapters, and its steps train the server's half
    alone. So does a client whose adapters would gain less than the tolerance, if that shortens the round.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        By client.
    importance : Mapping[str, float]
        ``J_m`` by absolute layer name, 0 or more; see :func:`hsplitlora_flwr.planning.importance.combine`. Taken as
        uniform if all are 0.
    cost : CostModel
        What plans cost.
    shares : Mapping[str, float], optional
        ``p_i`` by client in any unit, such as numbers of examples; equal when None.
    ranks : Sequence[int]
        The set ``Q``.
    server : Budget, optional
        The server's budget, shared by all clients; memory without bound when None.
    min_split, max_split : int
        Bounds of the split point; ``L - 1`` when ``max_split`` is None.
    planner : {"exact", "greedy"}
        How splits and ranks are chosen.
    important_share : float
        Greedy: the most important weights, which together hold this share of the importance, get the highest rank
        first.
    resource : {"parameters", "flops"}
        Greedy: what importance is divided by; see :func:`hsplitlora_flwr.planning.greedy.unit_cost`.
    tolerance : float
        Exact: the share of its value, 0 to 1, that every client may give up for a shorter round.
    deadline : float, optional
        Exact: longest predicted round in seconds.
    steps : int
        Micro-batches of a client in a round: how often the cost model's workload is computed.
    wire : tuple[str, str]
        Codecs up and down; see :meth:`hsplitlora_flwr.planning.cost.CostModel.wire_bytes`.
    checkpointing : {"off", "on", "auto"}
        Activation checkpointing on both sides; ``auto`` uses it on the sides whose memory does not hold their part of
        the plan otherwise.
    clients : {"plan", "all", "none"}
        Which clients have adapters: those that hold any, as above; all, so that a client that holds none is left out;
        or none.
    own : Mapping[str, CostModel], optional
        Cost models of single clients by name, where their rows are shorter than those that the server counts with, so
        that another client's long rows do not take blocks from them.

    Returns
    -------
    Plan
        By the cost model, no budget is exceeded.

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
        exchanges=exchanges,
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
    """Whether activations may be kept (False) or recomputed (True), the faster choice first.

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
    """By client, the bytes that it lacks to take part, of memory or of adapters that it may send; 0 or less if it has
    enough. Parameters as for :func:`make_plan`; ``rank`` is the lowest one."""
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
    """The split of a client while the importance is measured; None if it cannot take part.

    Scoring keeps the input of every weight, as an adapter on each would, so the client must have room for the lowest
    rank on all of them. A client without that room, or without adapters, computes forward alone, and only the server
    scores the weights above its cut.
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
    """The plan with what it costs. No side recomputes activations that it can keep."""
    taken, flops, again, forward_only = problem.of_clients(assignment)
    sides = [(*problem.of_server(costs, assignment), costs.checkpointing) for costs in problem.tables.costs]
    fitting = next((side for side in sides if side[0] <= problem.memory_of_server), None)
    served, work, server_again = fitting or min(sides, key=lambda side: side[0])
    own = problem.own_seconds(flops[:, None], forward_only[:, None], problem.speed)[:, 0]
    work = problem.steps * work / problem.server_speed
    below = np.where(problem.block < assignment.splits[:, None], assignment.ranks, 0)
    parameters = problem.total(problem.tables.parameters, below)[:, None]
    exchange = problem.exchange_seconds(parameters, assignment.splits[:, None])[:, 0]
    names, ranks = [layer.name for layer in problem.cost.layers], problem.ranks.tolist()
    plans: dict[str, ClientPlan] = {}
    for i, (client, budget) in enumerate(budgets.items()):
        chosen = {names[m]: ranks[assignment.ranks[i, m]] for m in np.flatnonzero(assignment.ranks[i]).tolist()}
        memory = int(taken[i]) + budget.process_bytes
        plans[client] = ClientPlan(
            int(assignment.splits[i]),
            chosen,
            memory,
            float(own[i] + exchange[i]),
            checkpointing=bool(again[i] and not forward_only[i]),
            server_checkpointing=server_again,
            forward_only=bool(forward_only[i]),
        )
    return Plan(
        plans,
        left_out,
        problem.objective(assignment),
        int(served),
        greedy_objective,
        bound,
        float(exchange.max() + max(problem.turn_seconds(own, work, forward_only).max(), work.sum())),
    )


def first_fitting(memory: Callable[..., int], choices: Sequence[bool], limit: float) -> tuple[int, bool]:
    """``memory(checkpointing=choice)`` and the choice: the first within ``limit``, else the smallest."""
    tried = []
    for choice in choices:
        tried.append((memory(checkpointing=choice), choice))
        if tried[-1][0] <= limit:
            return tried[-1]
    return min(tried)


def nobody_fits(budgets: Mapping[str, Budget], left_out: Mapping[str, int], what: str, remedy: str) -> PlanError:
    """The error if no client can take part: what each has, and how many bytes it lacks for ``what``."""
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
