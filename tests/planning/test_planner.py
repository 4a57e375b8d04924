"""Plans against brute force, budgets, and what the planners promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hsplitlora_flwr.comparison.clock import Step, serve
from hsplitlora_flwr.models import find_family
from hsplitlora_flwr.planning import Budget, CostModel, Plan, PlanError, Workload, make_plan
from hsplitlora_flwr.planning.arrays import Array
from hsplitlora_flwr.planning.planner import ClientPlan, probe_plan
from hsplitlora_flwr.planning.problem import NOMINAL_FLOPS
from tests.tiny import tiny_model

CONFIG = tiny_model("llama").config


def cost_of(
    targets: tuple[str, ...] | None = None, dtype: str = "float32", passes: int | None = None, half: Any = "shared"
) -> CostModel:
    return CostModel(CONFIG, find_family(CONFIG), Workload(4, 16, dtype, passes=passes, half=half), targets)


COST = cost_of()
LAYERS = COST.layers
NAMES = [layer.name for layer in LAYERS]
RANKS = (0, 2, 4, 8)
FLOOR = COST.client_bytes(1, {})
CEILING = COST.client_bytes(3, dict.fromkeys(NAMES, 8))
FULL = len(NAMES) * math.log2(9)
"""The objective of one client with the highest rank everywhere, at importance 1."""
SPEEDS = st.floats(1e6, 1e8)


def importances(cost: CostModel) -> st.SearchStrategy[dict[str, float]]:
    names = [layer.name for layer in cost.layers]
    scores = st.lists(st.floats(0, 1), min_size=len(names), max_size=len(names))
    return scores.map(lambda values: dict(zip(names, values, strict=True)))


def served(plan: Plan) -> dict[str, tuple[int, Any]]:
    return {name: (client.split, client.ranks) for name, client in plan.clients.items()}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 2 * CEILING), min_size=1, max_size=4),
    importances(COST),
    st.floats(0, 1),
    st.integers(0, 10**7),
    st.integers(0, 10**6),
    st.sampled_from(("exact", "greedy")),
    st.sampled_from(("off", "on", "auto")),
    st.sampled_from((None, 1, 2)),
    st.sampled_from(("shared", "per_client")),
    st.one_of(st.none(), st.integers(0, 10**5)),
)
def test_no_budget_is_exceeded(
    memories: list[int],
    importance: dict[str, float],
    important_share: float,
    process: int,
    room: int,
    planner: str,
    checkpointing: str,
    passes: int | None,
    half: str,
    adapters: int | None,
) -> None:
    cost = cost_of(passes=passes, half=half)
    budgets = {str(i): Budget(memory + process, process, adapter_bytes=adapters) for i, memory in enumerate(memories)}
    base = cost_of(half="per_client").server_bytes(
        {str(i): (1, {}) for i in range(len(memories))}, checkpointing=checkpointing == "on"
    )
    server = Budget(base + room)
    try:
        plan = make_plan(
            budgets,
            importance,
            cost,
            ranks=RANKS,
            server=server,
            important_share=important_share,
            planner=planner,
            checkpointing=checkpointing,
        )
    except PlanError:
        assert all(memory < FLOOR for memory in memories)
        return
    assert plan.clients.keys() | plan.left_out.keys() == budgets.keys()
    for name, client in plan.clients.items():
        assert 1 <= client.split <= 3
        assert set(client.ranks.values()) <= set(RANKS) - {0}
        below = sum(layer.adapter_parameters(client.ranks.get(layer.name, 0)) for layer in LAYERS[: 7 * client.split])
        assert adapters is None or 4 * below <= adapters
        taken = partial(COST.client_bytes, client.split, client.ranks, process)
        assert client.predicted_bytes == taken(checkpointing=client.checkpointing) <= budgets[name].memory_bytes
        if checkpointing == "auto":
            assert client.checkpointing == (taken() > budgets[name].memory_bytes), "what can be kept is kept"
        else:
            assert client.checkpointing == (checkpointing == "on" and not client.forward_only)
        assert client.forward_only == (below == 0)
    for name, missing in plan.left_out.items():
        assert missing == FLOOR + process - budgets[name].memory_bytes > 0
    [again] = {client.server_checkpointing for client in plan.clients.values()}
    assert again == (checkpointing == "on") or checkpointing == "auto"
    assert plan.server_bytes == cost.server_bytes(served(plan), checkpointing=again) <= server.memory_bytes
    if half == "shared":
        for layer in LAYERS:
            above = (client.ranks.get(layer.name, 0) for client in plan.clients.values() if client.split <= layer.block)
            assert len(set(above)) <= 1, "one adapter serves all"


CHOICES = {"off": (False,), "on": (True,), "auto": (False, True)}
TARGETS = ("q_proj", "v_proj")
"""Two layers a block that read the same input."""


@dataclass(frozen=True)
class Own:
    """Every plan of one client below every split: split, memory, parameters, operations and ranks."""

    split: NDArray[np.intp]
    memory: Array
    parameters: Array
    flops: Array
    ranks: Array  # (plans, layers)


@dataclass(frozen=True)
class Served:
    """Every choice of ranks of the server: what it takes from each split up, all the time and in a pass, operations of
    a step, and ranks."""

    held: Array  # (splits, choices)
    passing: Array
    flops: Array
    ranks: Array  # (choices, layers)


@cache
def own_plans(dtype: str, checkpointing: str) -> Own:
    cost, rows = cost_of(TARGETS, dtype), []
    for again, split in itertools.product(CHOICES[checkpointing], range(1, 4)):
        for chosen in itertools.product((0, 8), repeat=2 * split):
            ranks = {layer.name: rank for layer, rank in zip(cost.layers, chosen, strict=False) if rank}
            memory, flops = (f(split, ranks, checkpointing=again) for f in (cost.client_bytes, cost.client_flops))
            padded = (*chosen, *(0,) * (len(cost.layers) - len(chosen)))
            rows.append((split, memory, cost.adapter_parameters(ranks), flops, *padded))
    table = np.array(rows, float)
    return Own(table[:, 0].astype(int), *table[:, 1:4].T, ranks=table[:, 4:])


@cache
def server_plans(dtype: str, checkpointing: bool) -> Served:
    cost, rows = cost_of(TARGETS, dtype), []
    every = list(itertools.product((0, 8), repeat=len(cost.layers) - 2))
    for chosen in every:
        ranks = {layer.name: rank for layer, rank in zip(cost.layers[2:], chosen, strict=True) if rank}
        rows.append(
            [
                (
                    cost.held_bytes(split, ranks),
                    cost.pass_bytes(split, ranks, checkpointing=checkpointing),
                    cost.server_flops(split, ranks, checkpointing=checkpointing),
                )
                for split in range(4)
            ]
        )
    table = np.array(rows, float).transpose(2, 1, 0)
    return Served(*table, ranks=np.array([(0, 0, *chosen) for chosen in every], float))


@dataclass(frozen=True)
class BruteForce:
    """Every plan of two clients that fits: split and value of both, seconds of the round, and whether the server's
    ranks are the highest."""

    split: NDArray[np.intp]  # (plans, 2)
    value: Array  # (plans, 2)
    seconds: Array
    highest: NDArray[np.bool_]

    @classmethod
    def of(cls, instance: dict[str, Any]) -> BruteForce:
        both = [cls.one(again, **instance) for again in CHOICES[instance["checkpointing"]]]
        return cls(*(np.concatenate([getattr(b, name) for b in both]) for name in vars(both[0])))

    @classmethod
    def one(
        cls,
        again: bool,
        half: str,
        dtype: str,
        passes: int | None,
        checkpointing: str,
        importance: dict[str, float],
        budgets: dict[str, Budget],
        server: Budget,
        steps: int,
        shares: dict[str, float],
        clients: str,
    ) -> BruteForce:
        cost, own, upper = (
            cost_of(TARGETS, dtype, passes, half),
            own_plans(dtype, checkpointing),
            server_plans(dtype, again),
        )
        scores = np.array([importance[layer.name] for layer in cost.layers])
        blocks = np.array([layer.block for layer in cost.layers])
        below = np.log2(1 + own.ranks) @ scores
        above = np.stack(
            [np.log2(1 + upper.ranks) @ np.where(blocks >= split, scores, 0.0) for split in range(4)]
        )  # (splits, choices)
        # Without what lies below the split: every plan once.
        distinct = [~(upper.ranks[:, blocks < split] > 0).any(axis=1) for split in range(4)]
        up, down = cost.wire_bytes()
        trains = own.parameters > 0
        allowed = {"plan": trains | True, "all": trains, "none": ~trains}[clients]
        resting, found = cost.server_bytes({}), []
        plans, seconds = [], []
        for budget in budgets.values():
            limit = np.inf if budget.adapter_bytes is None else budget.adapter_bytes
            plans.append(np.flatnonzero((own.memory <= budget.memory_bytes) & (4 * own.parameters <= limit) & allowed))
            assert budget.flops and budget.up and budget.down
            seconds.append(own.flops / budget.flops + up / budget.up + np.where(trains, down / budget.down, 0.0))
        assert server.flops
        for a, b in itertools.product(range(1, 4), range(1, 4)):
            first, second = (p[own.split[p] == split] for p, split in zip(plans, (a, b), strict=True))
            if half == "shared":
                low = min(a, b)
                choice = np.flatnonzero(distinct[low])
                taken = upper.held[low, choice] + upper.passing[low, choice] + upper.held[low, 0]  # and frames of one
                tops = [(above[a, choice], above[b, choice])]
                chosen = [choice, choice]
                most = choice == distinct[low].nonzero()[0][-1]
            else:
                one, two = (np.flatnonzero(distinct[split]) for split in (a, b))
                passing = upper.passing[a, one][:, None] + upper.passing[b, two]
                if passes == 1:  # there is room for the largest from the lower split
                    passing = passing.clip(max=upper.passing[min(a, b), -1])
                taken = (upper.held[a, one][:, None] + upper.held[b, two] + passing).ravel()
                top = np.broadcast_arrays(above[a, one][:, None], above[b, two])
                tops = [(top[0].ravel(), top[1].ravel())]
                chosen = [each.ravel() for each in np.broadcast_arrays(one[:, None], two)]
                most = ((one == one[-1])[:, None] & (two == two[-1])).ravel()
            fits = resting + taken <= server.memory_bytes
            work = upper.flops[a, chosen[0]] + upper.flops[b, chosen[1]]
            (top_a, top_b), served = (top[fits] for top in tops[0]), work[fits] / server.flops
            i, j, k = (g.ravel() for g in np.meshgrid(first, second, np.arange(fits.sum()), indexing="ij"))
            value = np.stack([below[i] + top_a[k], below[j] + top_b[k]], axis=1)
            took = [upper.flops[split, c] / server.flops for split, c in zip((a, b), chosen, strict=True)]
            turns = [
                np.where(trains[each], own_side + on_server, np.maximum(own_side, on_server))
                for each, own_side, on_server in (
                    (i, seconds[0][i], took[0][fits][k]),
                    (j, seconds[1][j], took[1][fits][k]),
                )
            ]
            lasts = np.maximum(served[k], np.maximum(*turns))
            found.append((np.tile([a, b], (len(i), 1)), value, steps * lasts, most[fits][k]))
        return cls(*(np.concatenate(part) for part in zip(*found, strict=True)))


@st.composite
def instances(draw: st.DrawFn, half: str = "") -> dict[str, Any]:
    """Two clients and a server, all of them short of memory or not."""
    half = half or draw(st.sampled_from(("shared", "per_client")))
    dtype = draw(st.sampled_from(("float32", "bfloat16")))
    checkpointing = draw(st.sampled_from(tuple(CHOICES)))
    cost, own, upper = cost_of(TARGETS, dtype), own_plans(dtype, checkpointing), server_plans(dtype, False)
    clients = draw(st.sampled_from(("plan", "all", "none")))
    some = own.parameters > 0 if clients == "all" else own.parameters >= 0
    low, high = int(own.memory[some].min()), int(own.memory.max() * 1.1)
    adapters = st.one_of(st.none(), st.integers(4 * int(own.parameters[some].min()), int(4.4 * own.parameters.max())))
    budgets = {
        name: Budget(draw(st.integers(low, high)), 0, draw(SPEEDS), draw(SPEEDS), draw(SPEEDS), draw(adapters))
        for name in "ab"
    }
    base, share = cost.server_bytes({}), upper.held[1:] + upper.passing[1:]
    memory = draw(st.integers(base + 2 * int(share.min()), base + int(2.1 * share.max())))
    return {
        "half": half,
        "dtype": dtype,
        "passes": draw(st.sampled_from((None, 1))),
        "checkpointing": checkpointing,
        "budgets": budgets,
        "server": Budget(memory, 0, draw(SPEEDS)),
        "importance": draw(importances(cost)),
        "steps": draw(st.integers(1, 5)),
        "shares": {"a": draw(st.integers(1, 100)), "b": draw(st.integers(1, 100))},
        "clients": clients,
    }


def plan_of(instance: dict[str, Any], **options: Any) -> Plan:
    cost = cost_of(TARGETS, instance["dtype"], instance["passes"], instance["half"])
    given = {
        key: instance[key] for key in ("budgets", "server", "steps", "checkpointing", "shares", "clients")
    } | options
    return make_plan(given.pop("budgets"), instance["importance"], cost, ranks=(0, 8), **given)


def plan_shares(instance: dict[str, Any]) -> Array:
    shares = np.array(list(instance["shares"].values()), float)
    return shares / shares.sum()


def alone(instance: dict[str, Any], **options: Any) -> list[int]:
    """The splits that clients have when nobody else takes part."""
    cuts = []
    for name, budget in instance["budgets"].items():
        cuts.append(plan_of(instance, budgets={name: budget}, **options).clients[name].split)
    return cuts


GAP = 1e-4
"""What small plans may lack of the best."""


@settings(max_examples=8, deadline=None)
@given(instances())
def test_the_exact_objective_is_that_of_brute_force(instance: dict[str, Any]) -> None:
    assume(any(instance["importance"].values()))
    every = BruteForce.of(instance)
    if not len(every.seconds):
        with pytest.raises(PlanError, match="the server has"):
            plan_of(instance)
        return
    plan = plan_of(instance, tolerance=0.0)
    value = every.value @ plan_shares(instance)
    deeper = (every.split >= alone(instance, tolerance=0.0)).all(axis=1)
    assert plan.objective >= value[deeper].max() * (1 - GAP) - 1e-12
    assert plan.objective <= value.max() * (1 + 1e-9) <= plan.bound * (1 + 1e-9) + 1e-12
    assert 0 <= plan.greedy_objective <= value.max() * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(instances(), st.floats(0, 0.5))
def test_nobody_moves_the_cut_of_another_above_what_it_has_alone(instance: dict[str, Any], tolerance: float) -> None:
    try:
        plan = plan_of(instance, tolerance=tolerance)
    except PlanError:
        return
    for name, split in zip(instance["budgets"], alone(instance, tolerance=tolerance), strict=True):
        assert plan.clients[name].split >= split


@settings(max_examples=5, deadline=None)
@given(instances(), st.floats(0.02, 0.5))
def test_the_round_is_the_shortest_within_the_tolerance(instance: dict[str, Any], tolerance: float) -> None:
    instance |= {"server": replace(instance["server"], memory_bytes=10**9)}
    instance["importance"] = {name: score + 1e-3 for name, score in instance["importance"].items()}
    every = BruteForce.of(instance)
    plan = plan_of(instance, tolerance=tolerance)
    deeper = (every.split >= alone(instance, tolerance=tolerance)).all(axis=1)
    value, best = every.value[deeper], every.value.max(axis=0)
    assert plan.objective >= (1 - tolerance) * best @ plan_shares(instance) * (1 - 1e-9)
    good = (value >= (1 - tolerance) * best).all(axis=1) & every.highest[deeper]
    assert plan.seconds <= every.seconds[deeper][good].min() * (1 + 1e-9), "the server's ranks being the highest"


@settings(max_examples=4, deadline=None)
@given(instances(), st.floats(0, 1))
def test_a_deadline_is_met_where_it_can_be(instance: dict[str, Any], looseness: float) -> None:
    assume(any(instance["importance"].values()))
    every = BruteForce.of(instance)
    assume(len(every.seconds))
    shortest, longest = float(every.seconds.min()), float(every.seconds.max())
    deadline = shortest * (1 + 1e-6) + looseness * (longest - shortest)
    plan = plan_of(instance, deadline=deadline, tolerance=0.0)
    assert plan.seconds <= deadline * (1 + 1e-6)
    best = float((every.value @ plan_shares(instance))[every.seconds <= deadline].max())
    assert plan.objective <= best * (1 + 1e-9) + 1e-12
    with pytest.raises(PlanError, match=r"no plan meets the deadline .* shortest possible round takes"):
        plan_of(instance, deadline=shortest * 0.99)


def test_the_shortest_round_is_found_where_clients_share_no_split_that_the_server_has_room_for() -> None:
    """One client holds a single block, and the server has no room for two such halves: the other goes one deeper."""
    names = [layer.name for layer in cost_of(TARGETS).layers]
    instance = {
        "half": "per_client",
        "dtype": "float32",
        "passes": None,
        "checkpointing": "off",
        "budgets": {name: Budget(memory, 0, 1e6, 1e6, 1e6) for name, memory in {"a": 151_424, "b": 563_851}.items()},
        "server": Budget(981_041, 0, 98_318_582.25129579),
        "importance": {name: float(name == names[-1]) for name in names},
        "steps": 1,
        "shares": {"a": 1, "b": 1},
        "clients": "plan",
    }
    shortest = float(BruteForce.of(instance).seconds.min())
    plan = plan_of(instance, deadline=shortest * (1 + 1e-6), tolerance=0.0)
    assert [client.split for client in plan.clients.values()] == [1, 2]
    assert plan.seconds == pytest.approx(shortest)


def test_three_clients_and_a_scarce_server_come_near_the_bound() -> None:
    """Seven layers a block, three clients and a scarce server: what takes a search long is a table here."""
    rng = np.random.default_rng(0)
    for half, share in itertools.product(("shared", "per_client"), (0.2, 0.6)):
        cost = cost_of(half=half)
        importance = dict(zip(NAMES, rng.exponential(size=len(NAMES)).tolist(), strict=True))
        budgets = {str(i): Budget(int(memory)) for i, memory in enumerate(rng.uniform(FLOOR, CEILING, 3))}
        every = dict.fromkeys(NAMES, 8)
        least, most = (cost.server_bytes(dict.fromkeys(budgets, (1, ranks))) for ranks in ({}, every))
        server = Budget(int(least + share * (most - least)))
        plan = make_plan(budgets, importance, cost, ranks=RANKS, server=server, tolerance=0.0)
        assert plan.greedy_objective < plan.objective <= plan.bound * (1 + 1e-9)
        assert plan.server_bytes <= server.memory_bytes
        if half == "per_client":  # the bound of a shared half takes every client as if it were alone
            assert plan.objective >= 0.97 * plan.bound


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.integers(FLOOR, CEILING), min_size=1, max_size=3),
    importances(COST),
    st.integers(0, 2 * 10**6),
    st.floats(1, 2),
)
def test_more_memory_is_never_worth_less(
    memories: list[int], importance: dict[str, float], room: int, growth: float
) -> None:
    assume(any(importance.values()))

    def objective(memories: list[int], room: int) -> float:
        budgets = {str(i): Budget(memory) for i, memory in enumerate(memories)}
        server = Budget(COST.server_bytes({str(i): (1, {}) for i in range(len(memories))}) + room)
        return make_plan(budgets, importance, COST, ranks=RANKS, server=server, tolerance=0.0).objective

    before = objective(memories, room)
    slack = 1 - 2 * GAP
    assert objective([int(memories[0] * growth), *memories[1:]], room) >= before * slack
    assert objective(memories, int(room * growth)) >= before * slack


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(FLOOR, CEILING), min_size=1, max_size=4), importances(COST), st.floats(0, 1))
def test_exact_is_never_worse_than_greedy(memories: list[int], importance: dict[str, float], share: float) -> None:
    budgets = {str(i): Budget(memory) for i, memory in enumerate(memories)}
    server = Budget(COST.server_bytes({name: (1, {}) for name in budgets}) + 10**6)
    plan = make_plan(budgets, importance, COST, ranks=RANKS, server=server, important_share=share, tolerance=0.0)
    greedy = make_plan(budgets, importance, COST, ranks=RANKS, server=server, important_share=share, planner="greedy")
    assert plan.greedy_objective == greedy.objective == greedy.greedy_objective
    assert math.isinf(greedy.bound)
    assert plan.objective >= greedy.objective * (1 - GAP)
    assert greedy.objective >= 0


def test_greedy_gives_important_weights_the_high_ranks_at_the_deepest_split() -> None:
    importance = {name: 10.0 if "down_proj" in name else 0.1 for name in NAMES}
    budgets = {
        str(split): Budget(COST.client_bytes(split, {n: 8 for n in NAMES if "down_proj" in n})) for split in (1, 2, 3)
    }
    plan = make_plan(budgets, importance, COST, ranks=RANKS, planner="greedy")
    assert [client.split for client in plan.clients.values()] == [1, 2, 3]
    for client in plan.clients.values():
        below = [name for name in NAMES if int(name.split(".")[2]) < client.split]
        assert all(client.ranks[name] == 8 for name in below if "down_proj" in name)
        assert not all(client.ranks.get(name, 0) == 8 for name in below)


@pytest.mark.parametrize("planner", ["exact", "greedy"])
def test_room_for_everything_gives_everything(planner: str) -> None:
    plan = make_plan(
        {"rich": Budget(10 * CEILING)}, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, tolerance=0.0, planner=planner
    )
    assert plan.clients["rich"].ranks == dict.fromkeys(NAMES, 8)
    assert plan.objective == plan.greedy_objective == pytest.approx(FULL)


@pytest.mark.parametrize("planner", ["exact", "greedy"])
def test_deeper_splits_serve_more_clients_than_passes_where_the_server_is_small(planner: str) -> None:
    cost, names = cost_of(passes=1, half="per_client"), "abc"
    every = dict.fromkeys(NAMES, 8)
    least = cost.server_bytes(dict.fromkeys(names, (3, {}))) - cost.pass_bytes(3, {}) + cost.pass_bytes(3, every)
    assert least < cost.server_bytes(dict.fromkeys(names, (2, {}))) < cost.server_bytes(dict.fromkeys(names, (1, {})))
    budgets = {name: Budget(2 * CEILING) for name in names}
    make = partial(make_plan, budgets, dict.fromkeys(NAMES, 1.0), cost, ranks=RANKS, planner=planner)
    plan = make(server=Budget(least))
    assert {client.split for client in plan.clients.values()} == {3}
    assert plan.server_bytes <= least
    assert all(client.ranks[name] == 8 for client in plan.clients.values() for name in NAMES if ".3." not in name)
    with pytest.raises(PlanError, match="misses 1 to serve 3"):
        make(server=Budget(least - 1))


def test_clients_take_blocks_off_a_slow_server_and_leave_them_to_a_fast_one() -> None:
    budgets = {str(i): Budget(10 * CEILING, 0, 1e9) for i in range(3)}
    for server_flops, splits in ((1e8, {3}), (1e12, {1})):
        plan = make_plan(budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, server=Budget(10**9, 0, server_flops))
        assert {client.split for client in plan.clients.values()} == splits
        assert plan.objective >= FULL * 0.99


def test_predicted_seconds() -> None:
    budgets = {"quick": Budget(10 * CEILING, 0, 4e9, 1e6, 2e6), "slow": Budget(10 * CEILING, 0, 2e9)}
    plan = make_plan(budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, steps=7, wire=("bfloat16", "int8"))
    up, down = COST.wire_bytes("bfloat16", "int8")
    flops = {name: COST.client_flops(client.split, client.ranks) for name, client in plan.clients.items()}
    own = {"quick": 7 * (flops["quick"] / 4e9 + up / 1e6 + down / 2e6), "slow": 7 * flops["slow"] / 2e9}
    assert {name: client.predicted_seconds for name, client in plan.clients.items()} == pytest.approx(own)
    served = {name: 7 * COST.server_flops(each.split, each.ranks) / 3e9 for name, each in plan.clients.items()}
    turns = [own[name] + served[name] for name in own]
    assert plan.seconds == pytest.approx(max(sum(served.values()), *turns)), "a speed that is not stated is the mean"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(SPEEDS, SPEEDS, SPEEDS), min_size=1, max_size=5), SPEEDS, st.integers(1, 20))
def test_steps_served_one_after_another_in_a_fixed_order_take_the_predicted_seconds_and_a_turn_of_each_at_most(
    machines: list[tuple[float, float, float]], of_server: float, steps: int
) -> None:
    budgets = {str(i): Budget(10 * CEILING, 0, *machine) for i, machine in enumerate(machines)}
    server = Budget(10**12, 0, of_server)
    plan = make_plan(budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, server=server, steps=steps, clients="all")
    up, down = COST.wire_bytes()
    turns = []
    for name, client in plan.clients.items():
        budget, forward = budgets[name], COST.client_flops(client.split, {})
        assert budget.flops and budget.up and budget.down
        backward = COST.client_flops(client.split, client.ranks) - forward
        served = COST.server_flops(client.split, client.ranks) / of_server
        turns.append(Step(forward / budget.flops, up / budget.up, served, down / budget.down, backward / budget.flops))
    lasts = max(serve([[turn] * steps for turn in turns], fixed=True))
    once = sum(sum(turn[:-1]) for turn in map(astuple, turns))  # until all are on their way
    assert plan.seconds * (1 - 1e-9) <= lasts <= (plan.seconds + once) * (1 + 1e-9)


def exchange_seconds(plan: Plan, budgets: dict[str, Budget]) -> dict[str, float]:
    """Of every client: its adapters up, and down an update that has as much of every client, or the dense sum."""
    seconds = {}
    for name, client in plan.clients.items():
        below = [layer for layer in LAYERS if layer.block < client.split]
        own = sum(layer.adapter_parameters(client.ranks.get(layer.name, 0)) for layer in below)
        dense = sum(layer.in_features * layer.out_features for layer in below)
        budget = budgets[name]
        assert budget.up and budget.down
        seconds[name] = 4 * (own / budget.up + min(len(budgets) * own, dense) / budget.down)
    return seconds


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(SPEEDS, SPEEDS, SPEEDS), min_size=1, max_size=4), SPEEDS, st.integers(1, 5))
def test_what_links_take_for_the_update_counts(
    machines: list[tuple[float, float, float]], of_server: float, steps: int
) -> None:
    budgets = {str(i): Budget(10 * CEILING, 0, *machine) for i, machine in enumerate(machines)}
    make = partial(
        make_plan,
        budgets,
        dict.fromkeys(NAMES, 1.0),
        COST,
        ranks=RANKS,
        server=Budget(10**12, 0, of_server),
        steps=steps,
    )
    without, plan = make(), make(exchanges=True)
    taken, own = exchange_seconds(plan, budgets), {name: each.predicted_seconds for name, each in plan.clients.items()}
    served = {
        name: steps * COST.server_flops(each.split, each.ranks) / of_server for name, each in plan.clients.items()
    }
    turns = [own[name] - taken[name] + served[name] for name in own if not plan.clients[name].forward_only]
    steps_last = max(sum(served.values()), *turns, *(own[name] - taken[name] for name in own))
    assert plan.seconds == pytest.approx(max(taken.values()) + steps_last)
    counted = without.seconds + max(exchange_seconds(without, budgets).values())
    assert plan.seconds <= counted * (1 + 1e-9), "the plan that does not know of it is one of those that are tried"
    deadline = plan.seconds * 0.9
    try:
        hurried = make(exchanges=True, deadline=deadline)
    except PlanError:
        return
    assert hurried.seconds <= deadline * (1 + 1e-6)


def test_speeds_that_nobody_states_are_nominal() -> None:
    plan = make_plan({"a": Budget(10 * CEILING)}, {}, COST, ranks=RANKS, max_split=1)
    client = plan.clients["a"]
    work = COST.client_flops(1, client.ranks) + COST.server_flops(1, client.ranks)
    assert plan.seconds == pytest.approx(work / NOMINAL_FLOPS)


def test_a_hundred_different_clients() -> None:
    rng = np.random.default_rng(0)
    importance = dict(zip(NAMES, rng.exponential(size=len(NAMES)).tolist(), strict=True))
    budgets = {
        str(i): Budget(int(memory), 0, flops)
        for i, (memory, flops) in enumerate(
            zip(rng.uniform(FLOOR, CEILING, 100), rng.uniform(1e9, 1e10, 100), strict=True)
        )
    }
    ranks = dict.fromkeys(NAMES, 8)
    room = 100 * (COST.held_bytes(1, ranks) + COST.pass_bytes(1, ranks)) * 0.7
    server = Budget(COST.server_bytes({}) + int(room), 0, 1e11)
    plan = make_plan(budgets, importance, COST, ranks=RANKS, server=server)
    assert plan.bound * 0.98 <= plan.objective <= plan.bound
    assert plan.objective > plan.greedy_objective
    assert len({client.split for client in plan.clients.values()}) > 1
    assert plan.server_bytes <= server.memory_bytes
    assert all(plan.clients[name].predicted_bytes <= budget.memory_bytes for name, budget in budgets.items())


def test_activations_are_computed_again_where_memory_asks_for_it() -> None:
    everything = dict.fromkeys(NAMES, 8)
    budgets = {"tight": Budget(COST.client_bytes(3, everything, checkpointing=True)), "roomy": Budget(10 * CEILING)}
    clients = dict.fromkeys(budgets, (3, everything))
    server = Budget(COST.server_bytes(clients, checkpointing=True))
    make = partial(make_plan, budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, min_split=3, tolerance=0.0)
    for planner in ("exact", "greedy"):
        plan = make(checkpointing="auto", planner=planner)
        assert plan.objective == pytest.approx(FULL)
        assert {name: client.checkpointed for name, client in plan.clients.items()} == {
            "tight": "client",
            "roomy": "none",
        }
        plan = make(checkpointing="auto", planner=planner, server=server)
        assert {name: client.checkpointed for name, client in plan.clients.items()} == {
            "tight": "both",
            "roomy": "server",
        }
        assert plan.objective == pytest.approx(FULL)
        assert make(checkpointing="off", planner=planner).objective < FULL * 0.99
    slower, faster = make(checkpointing="on"), make(checkpointing="auto")
    assert slower.clients["roomy"].predicted_seconds > faster.clients["roomy"].predicted_seconds
    assert slower.clients["tight"].predicted_seconds == faster.clients["tight"].predicted_seconds
    with pytest.raises(PlanError, match="checkpointing='maybe' is unknown; choose one of off, on, auto"):
        make(checkpointing="maybe")


def test_split_bounds_are_kept() -> None:
    plan = make_plan({"a": Budget(10 * CEILING)}, dict.fromkeys(NAMES, 1.0), COST, min_split=2, max_split=2)
    assert plan.clients["a"].split == 2


def test_a_budget_that_no_plan_fits_names_the_missing_bytes() -> None:
    with pytest.raises(PlanError, match=r"client poor has 1,000 bytes and misses " + f"{FLOOR - 1000:,}"):
        make_plan({"poor": Budget(1000)}, dict.fromkeys(NAMES, 1.0), COST)


@pytest.mark.parametrize("planner", ["exact", "greedy"])
def test_a_server_that_cannot_serve_names_the_missing_bytes(planner: str) -> None:
    missing = COST.server_bytes({"a": (3, {})}) - 10
    with pytest.raises(PlanError, match=rf"the server has 10 bytes and misses {missing:,} to serve 1 client"):
        make_plan({"a": Budget(10 * CEILING)}, dict.fromkeys(NAMES, 1.0), COST, server=Budget(10), planner=planner)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"planner": "best"}, r"planner='best' is unknown; choose one of exact, greedy"),
        ({"ranks": (0,)}, r"ranks=\(0,\) hold none above 0"),
        ({"min_split": 0}, r"min_split=0 and max_split=3 must lie in 1 \.\. 3"),
        ({"max_split": 4}, r"max_split=4 must lie in 1 \.\. 3"),
        ({"tolerance": 1.5}, r"tolerance=1.5 must lie between 0 and 1"),
        ({"clients": "some"}, r"clients='some' is unknown; choose one of plan, all, none"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"deadline": 0.0}, r"deadline=0.0 must be above 0"),
        ({"deadline": 1.0}, r"deadline=1 needs a speed"),
        ({"deadline": 1.0, "planner": "greedy"}, r"deadline=1 needs planner='exact'"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan({"a": Budget(CEILING)}, {}, COST, **wrong)


def test_wrong_importance_and_speeds() -> None:
    with pytest.raises(PlanError, match=r"importance of .*q_proj is nan"):
        make_plan({"a": Budget(CEILING)}, {NAMES[0]: math.nan}, COST)
    with pytest.raises(PlanError, match=r"Budget\.up=0 must be a finite number above 0"):
        Budget(1, up=0)


def test_the_probe_keeps_the_input_of_every_weight_and_still_fits() -> None:
    memory, least = (COST.client_bytes(split, dict.fromkeys(NAMES, 2)) for split in (2, 1))
    assert probe_plan(COST, Budget(memory), RANKS) == ClientPlan(2, {}, 0)
    assert probe_plan(COST, Budget(memory - 1), RANKS) == ClientPlan(1, {}, 0)
    assert probe_plan(COST, Budget(least - 1), RANKS) == ClientPlan(1, {}, 0, forward_only=True), "the server scores"
    assert probe_plan(COST, Budget(FLOOR - 1), RANKS) is None
    assert probe_plan(COST, Budget(memory), RANKS, clients="none") == ClientPlan(1, {}, 0, forward_only=True)


def cheapest(split: int) -> int:
    """The least that a client takes that trains, by trying every single adapter."""
    return min(COST.client_bytes(split, {layer.name: 2}) for layer in LAYERS if layer.block < split)


@pytest.mark.parametrize("planner", ["exact", "greedy"])
@pytest.mark.parametrize("least", [1, 2])
def test_a_client_without_room_for_adapters_takes_part_without(planner: str, least: int) -> None:
    able, unable = cheapest(least), cheapest(least) - 1
    budgets = {"able": Budget(able), "unable": Budget(unable), "out": Budget(COST.client_bytes(least, {}) - 5)}
    make = partial(make_plan, budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, min_split=least, planner=planner)
    plan = make()
    assert {name: client.forward_only for name, client in plan.clients.items()} == {"able": False, "unable": True}
    assert plan.left_out == {"out": 5}
    resting = plan.clients["unable"]
    above = {layer.name for layer in LAYERS if layer.block >= least}
    assert (resting.split, resting.ranks) == (least, dict.fromkeys(above, 8)), "the server's half trains in full"
    assert resting.predicted_bytes == COST.client_bytes(least, {}) <= unable
    every = make(clients="all")
    assert not any(client.forward_only for client in every.clients.values())
    assert every.left_out == {"unable": 1, "out": able - budgets["out"].memory_bytes}
    nobody = make(clients="none")
    assert {client.forward_only for client in nobody.clients.values()} == {True}
    assert nobody.left_out == {"out": 5}
    assert all(client.ranks.keys() <= above for client in nobody.clients.values())
    with pytest.raises(PlanError, match=rf"no client can hold even {least} block\(s\) with one adapter"):
        make_plan({"a": Budget(unable)}, {}, COST, ranks=RANKS, min_split=least, planner=planner, clients="all")


@pytest.mark.parametrize("planner", ["exact", "greedy"])
def test_a_client_that_may_send_nothing_trains_nothing(planner: str) -> None:
    fewest = 4 * min(layer.adapter_parameters(2) for layer in LAYERS)
    budgets = {"mute": Budget(10 * CEILING, adapter_bytes=fewest - 1), "free": Budget(10 * CEILING)}
    make = partial(make_plan, budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, planner=planner)
    assert {name: client.forward_only for name, client in make().clients.items()} == {"mute": True, "free": False}
    assert make(clients="all").left_out == {"mute": 1}


def test_a_client_without_time_for_adapters_takes_part_without() -> None:
    """Its link down is slow, and gradients are all that comes down."""
    up, down = COST.wire_bytes()
    budgets = {"slow": Budget(10 * CEILING, 0, 1e9, 1e9, 1e3), "quick": Budget(10 * CEILING, 0, 1e9, 1e9, 1e9)}
    make = partial(make_plan, budgets, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS, server=Budget(10**10, 0, 1e12))
    plan = make(deadline=1.0)
    assert down / 1e3 > 1.0 > plan.seconds
    assert {name: client.forward_only for name, client in plan.clients.items()} == {"slow": True, "quick": False}
    alone = plan.clients["slow"]
    assert alone.predicted_seconds == pytest.approx(COST.client_flops(alone.split, {}) / 1e9 + up / 1e9)
    assert not any(client.forward_only for client in make(deadline=100.0).clients.values())
    with pytest.raises(PlanError, match="no plan meets the deadline of 1 s: the shortest possible round takes"):
        make(deadline=1.0, clients="all")


def test_where_nothing_can_be_gained_a_client_trains_only_if_it_must() -> None:
    above = {layer.name: float(layer.block == 3) for layer in LAYERS}
    make = partial(make_plan, {"a": Budget(10 * CEILING)}, above, COST, ranks=RANKS)
    assert make().clients["a"].forward_only
    must = make(clients="all").clients["a"]
    assert not must.forward_only and sum(must.ranks[name] for name in must.ranks if not above[name]) > 0
    assert make(clients="all").objective == make().objective


@pytest.mark.parametrize("planner", ["exact", "greedy"])
def test_for_clients_with_room_nothing_changes(planner: str) -> None:
    rng = np.random.default_rng(3)
    importance = dict(zip(NAMES, rng.exponential(size=len(NAMES)).tolist(), strict=True))
    budgets = {str(i): Budget(int(memory)) for i, memory in enumerate(rng.uniform(cheapest(1), CEILING, 12))}
    make = partial(make_plan, budgets, importance, COST, ranks=RANKS, planner=planner)
    assert make().clients == make(clients="all").clients
