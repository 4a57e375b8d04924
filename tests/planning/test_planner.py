"""No plan exceeds a budget, and budgets that differ lead to plans that differ."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.models import find_family
from hsplitlora_flwr.planning import Budget, CostModel, PlanError, Workload, make_plan
from hsplitlora_flwr.planning.planner import probe_split
from tests.tiny import tiny_model

CONFIG = tiny_model("llama").config
COST = CostModel(CONFIG, find_family(CONFIG), Workload(4, 16))
NAMES = [layer.name for layer in COST.layers]
RANKS = (0, 2, 4, 8)
FLOOR = COST.client_bytes(1, {})
CEILING = COST.client_bytes(3, dict.fromkeys(NAMES, 8))
ANY_IMPORTANCE = st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES)).map(
    lambda scores: dict(zip(NAMES, scores, strict=True))
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2 * CEILING), min_size=1, max_size=4),
    ANY_IMPORTANCE,
    st.floats(0, 1),
    st.integers(0, 10**7),
)
def test_no_budget_is_exceeded(
    memories: list[int], importance: dict[str, float], important_share: float, process: int
) -> None:
    budgets = {str(i): Budget(memory + process, process) for i, memory in enumerate(memories)}
    server = Budget(COST.server_bytes({str(i): (1, {}) for i in range(len(memories))}) + 10**6)
    try:
        plan = make_plan(budgets, importance, COST, ranks=RANKS, server=server, important_share=important_share)
    except PlanError:
        assert all(memory < FLOOR for memory in memories)
        return
    assert plan.clients.keys() | plan.left_out.keys() == budgets.keys()
    for name, client in plan.clients.items():
        assert 1 <= client.split <= 3
        assert set(client.ranks.values()) <= set(RANKS) - {0}
        assert client.predicted_bytes == COST.client_bytes(client.split, client.ranks, process)
        assert client.predicted_bytes <= budgets[name].memory_bytes
    for name, missing in plan.left_out.items():
        assert missing == FLOOR + process - budgets[name].memory_bytes > 0
    assert COST.server_bytes({name: (c.split, c.ranks) for name, c in plan.clients.items()}) <= server.memory_bytes


def test_uneven_budgets_lead_to_different_splits_and_important_weights_get_the_high_ranks() -> None:
    importance = {name: 10.0 if "down_proj" in name else 0.1 for name in NAMES}
    budgets = {
        str(split): Budget(COST.client_bytes(split, {n: 8 for n in NAMES if "down_proj" in n})) for split in (1, 2, 3)
    }
    plan = make_plan(budgets, importance, COST, ranks=RANKS)
    assert [client.split for client in plan.clients.values()] == [1, 2, 3]
    for client in plan.clients.values():
        below = [name for name in NAMES if int(name.split(".")[2]) < client.split]
        assert all(client.ranks[name] == 8 for name in below if "down_proj" in name)
        assert not all(client.ranks.get(name, 0) == 8 for name in below)


def test_room_for_everything_gives_everything() -> None:
    plan = make_plan({"rich": Budget(10 * CEILING)}, dict.fromkeys(NAMES, 1.0), COST, ranks=RANKS)
    assert plan.clients["rich"].split == 3
    assert plan.clients["rich"].ranks == dict.fromkeys(NAMES, 8)


def test_split_bounds_are_kept() -> None:
    plan = make_plan({"a": Budget(10 * CEILING)}, dict.fromkeys(NAMES, 1.0), COST, min_split=1, max_split=2)
    assert plan.clients["a"].split == 2


def test_a_budget_that_no_plan_fits_names_the_missing_bytes() -> None:
    with pytest.raises(PlanError, match=r"client poor has 1,000 bytes and misses " + f"{FLOOR - 1000:,}"):
        make_plan({"poor": Budget(1000)}, dict.fromkeys(NAMES, 1.0), COST)


def test_a_server_that_cannot_serve_names_the_missing_bytes() -> None:
    with pytest.raises(PlanError, match=r"the server has 10 bytes and misses [\d,]+ to serve 1 client"):
        make_plan({"a": Budget(CEILING)}, dict.fromkeys(NAMES, 1.0), COST, server=Budget(10))


def test_the_probe_keeps_the_input_of_every_weight_and_still_fits() -> None:
    memory = COST.client_bytes(2, dict.fromkeys(NAMES, 2))
    assert probe_split(COST, Budget(memory), RANKS) == 2
    assert probe_split(COST, Budget(memory - 1), RANKS) == 1
    assert probe_split(COST, Budget(FLOOR - 1), RANKS) is None
