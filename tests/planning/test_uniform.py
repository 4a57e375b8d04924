"""Plans without a choice per weight hold the same budgets, and say who cannot take part."""

from __future__ import annotations

import math

import pytest

from hsplitlora_flwr.models import find_family
from hsplitlora_flwr.planning import Budget, CostModel, PlanError, Workload
from hsplitlora_flwr.planning.uniform import equal_plan, whole_plan
from tests.tiny import tiny_model

CONFIG = tiny_model("llama").config
COST = CostModel(CONFIG, find_family(CONFIG), Workload(4, 16))
NAMES = [layer.name for layer in COST.layers]


def offer(rank: int) -> dict[str, int]:
    return dict.fromkeys(NAMES, rank)


def test_a_whole_model_gets_the_highest_rank_that_fits() -> None:
    exact = COST.whole_bytes(offer(8), 1000)
    budgets = {"a": Budget(exact, 1000), "b": Budget(exact - 1, 1000), "c": Budget(10**12, 1000)}
    plan = whole_plan(budgets, COST, ranks=(0, 2, 4, 8, 16))
    found = {name: set(client.ranks.values()) for name, client in plan.clients.items()}
    assert found == {"a": {8}, "b": {4}, "c": {16}}
    for name, client in plan.clients.items():
        assert client.split == COST.num_blocks
        assert list(client.ranks) == NAMES
        assert client.predicted_bytes == COST.whole_bytes(client.ranks, 1000) <= budgets[name].memory_bytes


def test_who_cannot_hold_the_whole_model_is_left_out_or_let_in() -> None:
    least = COST.whole_bytes(offer(2))
    budgets = {"small": Budget(least - 7), "large": Budget(10**12)}
    plan = whole_plan(budgets, COST, ranks=(2, 4))
    assert plan.left_out == {"small": 7} and set(plan.clients) == {"large"}
    plan = whole_plan(budgets, COST, ranks=(2, 4), over_budget=True)
    assert set(plan.clients["small"].ranks.values()) == {2}
    assert plan.clients["small"].predicted_bytes == least and not plan.left_out
    with pytest.raises(PlanError, match=r"client small has [\d,]+ bytes and misses 7\. Set plan\.over_budget"):
        whole_plan({"small": budgets["small"]}, COST, ranks=(2, 4))


def test_one_split_is_the_deepest_that_all_can_hold() -> None:
    budgets = {"a": Budget(COST.client_bytes(2, offer(4))), "b": Budget(10**12)}
    plan = equal_plan(budgets, COST, rank=4)
    assert {client.split for client in plan.clients.values()} == {2}
    assert all(client.ranks == offer(4) for client in plan.clients.values())
    assert plan.server_bytes == COST.server_bytes({name: (2, offer(4)) for name in budgets})
    assert {client.split for client in equal_plan({"b": Budget(10**12)}, COST, rank=4).clients.values()} == {3}
    assert equal_plan({"b": Budget(10**12)}, COST, rank=4, max_split=2).clients["b"].split == 2


def test_one_split_for_clients_that_train_nothing() -> None:
    budgets = {"a": Budget(COST.client_bytes(2, {})), "b": Budget(10**12, adapter_bytes=0)}
    plan = equal_plan(budgets, COST, rank=4, trains=False)
    above = {layer.name: 4 for layer in COST.layers if layer.block >= 2}
    for name, client in plan.clients.items():
        assert (client.split, client.forward_only, client.ranks) == (2, True, above), name
        assert client.predicted_bytes == COST.client_bytes(2, {})
    assert plan.server_bytes == COST.server_bytes(dict.fromkeys(budgets, (2, above)))


def test_a_client_too_small_for_any_split_does_not_hold_the_others_back() -> None:
    budgets = {"tiny": Budget(COST.client_bytes(1, offer(4)) - 3), "b": Budget(COST.client_bytes(3, offer(4)))}
    plan = equal_plan(budgets, COST, rank=4)
    assert plan.clients["b"].split == 3 and set(plan.clients) == {"b"}
    assert plan.left_out["tiny"] == COST.client_bytes(3, offer(4)) - budgets["tiny"].memory_bytes
    with pytest.raises(PlanError, match=r"no client can hold 1 block\(s\) with adapters of rank 4: client tiny"):
        equal_plan({"tiny": budgets["tiny"]}, COST, rank=4)


def test_a_named_split_is_taken_and_the_server_is_asked() -> None:
    budgets = {"a": Budget(COST.client_bytes(2, offer(4))), "b": Budget(10**12)}
    plan = equal_plan(budgets, COST, rank=4, split=3)
    assert set(plan.clients) == {"b"} and plan.clients["b"].split == 3
    server = Budget(COST.server_bytes({name: (2, offer(4)) for name in budgets}) - 5)
    with pytest.raises(PlanError, match=r"the server has [\d,]+ bytes and misses 5 to serve 2 client\(s\)"):
        equal_plan(budgets, COST, rank=4, server=server)


def test_one_split_and_one_rank_that_fit_only_when_activations_are_computed_again() -> None:
    tight = COST.client_bytes(3, offer(8), checkpointing=True)
    budgets = {"tight": Budget(tight), "roomy": Budget(10**12)}
    server = Budget(COST.server_bytes(dict.fromkeys(budgets, (3, offer(8))), checkpointing=True))
    plan = equal_plan(budgets, COST, rank=8, server=server, checkpointing="auto")
    assert {client.split for client in plan.clients.values()} == {3}
    assert {name: c.checkpointed for name, c in plan.clients.items()} == {"tight": "both", "roomy": "server"}
    assert plan.clients["tight"].predicted_bytes == tight and plan.server_bytes == server.memory_bytes
    assert equal_plan(budgets, COST, rank=8).clients["tight"].split < 3


def test_a_whole_model_that_fits_only_when_activations_are_computed_again() -> None:
    budgets = {"tight": Budget(COST.whole_bytes(offer(8), checkpointing=True)), "roomy": Budget(10**12)}
    plan = whole_plan(budgets, COST, ranks=(8,), checkpointing="auto")
    assert {name: c.checkpointed for name, c in plan.clients.items()} == {"tight": "client", "roomy": "none"}
    left_out = whole_plan(budgets, COST, ranks=(8,)).left_out
    assert left_out == {"tight": COST.whole_bytes(offer(8)) - COST.whole_bytes(offer(8), checkpointing=True)}


def test_adapters_that_may_not_be_sent_are_not_planned() -> None:
    whole = 4 * COST.adapter_parameters(offer(4))
    budgets = {"a": Budget(10**12, adapter_bytes=whole), "b": Budget(10**12, adapter_bytes=whole - 1)}
    plan = whole_plan(budgets, COST, ranks=(2, 4, 8))
    assert {name: set(client.ranks.values()) for name, client in plan.clients.items()} == {"a": {4}, "b": {2}}
    below = 4 * sum(layer.adapter_parameters(4) for layer in COST.layers if layer.block < 2)
    plan = equal_plan({"a": Budget(10**12, adapter_bytes=below), "b": Budget(10**12)}, COST, rank=4)
    assert {client.split for client in plan.clients.values()} == {2}
    assert equal_plan({"a": Budget(10**12, adapter_bytes=below)}, COST, rank=4, split=2).clients
    with pytest.raises(PlanError, match=r"client a has [\d,]+ bytes and misses 1"):
        equal_plan({"a": Budget(10**12, adapter_bytes=below - 1)}, COST, rank=4, split=2)


def test_the_objective_weighs_clients_by_their_shares() -> None:
    budgets = {"a": Budget(COST.whole_bytes(offer(2))), "b": Budget(10**12)}
    plan = whole_plan(budgets, COST, ranks=(2, 8), shares={"a": 3, "b": 1})
    assert plan.objective == pytest.approx((3 * math.log2(3) + math.log2(9)) / 4)
