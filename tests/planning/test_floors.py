"""A client's cut comes no earlier because of what another one says of itself."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.planning import Budget, Plan
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.round import Size, cost_model, make_round_plan, own_costs, rounded_length

Case = tuple[Config, CostModel, dict[str, Budget], Budget, dict[str, float]]


def case(folder: Path, seed: int, **changes: float | str) -> Case:
    """Two clients, and a third that says it has little memory and is slower than any machine."""
    settings: dict[str, float | str] = {
        "model.path": str(folder),
        "data.max_length": 48,
        "lora.ranks": "0,2,4",
        "train.batch_size": 4,
    }
    config = Config.from_run_config(settings | changes)
    cost, draw = cost_model(config, 4, 48, 3), random.Random(seed)
    low = cost.client_bytes(1, {})
    room = cost.client_bytes(3, {layer.name: 4 for layer in cost.layers}) - low
    budgets = {
        name: Budget(int(low + room * draw.uniform(0.1, 1.2)), 0, 10 ** draw.uniform(11, 13), 10 ** draw.uniform(5, 8))
        for name in "ab"
    }
    server = Budget(cost.server_bytes({}, 0) + 3 * (low + room))
    importance = {layer.name: random.Random(layer.name).random() for layer in cost.layers}
    return config, cost, budgets | {"liar": Budget(int(low * 1.2), 0, 1e6, 1.0)}, server, importance


def planned(
    config: Config, cost: CostModel, budgets: dict[str, Budget], server: Budget, scores: dict[str, float]
) -> Plan:
    return make_round_plan(config, budgets, server, scores, cost)


@pytest.mark.parametrize("seed", [17, 20, 23])
@pytest.mark.parametrize("half", ["shared", "per_client"])
def test_no_cut_comes_before_that_of_a_client_alone(half: str, seed: int, tiny_folder: Path) -> None:
    config, cost, budgets, server, scores = case(tiny_folder, seed, **{"server.half": half})
    plan = planned(config, cost, budgets, server, scores)
    for name in "ab":
        alone = planned(config, cost, {name: budgets[name]}, server, scores)
        assert plan.clients[name].split >= alone.clients[name].split
    for name, each in plan.clients.items():
        assert cost.client_bytes(each.split, dict(each.ranks)) <= each.predicted_bytes <= budgets[name].memory_bytes
    taken = {name: (each.split, dict(each.ranks)) for name, each in plan.clients.items()}
    assert cost.server_bytes(taken, 0) <= server.memory_bytes


@pytest.mark.parametrize("seed", [1, 17])
@pytest.mark.parametrize("half", ["shared", "per_client"])
def test_long_rows_of_another_take_no_client_s_blocks(half: str, seed: int, tiny_folder: Path) -> None:
    """Not even where the others' memory would not hold a block with rows as long as one claims to have."""
    config, _, _, _, scores = case(tiny_folder, seed, **{"server.half": half, "train.batch_size": 64})
    sizes, draw = {"a": Size(12), "b": Size(17), "liar": Size(48)}, random.Random(seed)
    cost, own = cost_model(config, 64, 48, 3), own_costs(config, 64, sizes, 3)
    everywhere = {layer.name: 4 for layer in cost.layers}
    budgets = {
        name: Budget(int(own[name].client_bytes(2, everywhere) * draw.uniform(1.0, 1.3)), 0) for name in ("a", "b")
    } | {"liar": Budget(10**12, 0)}
    server = Budget(10**12, 0)
    assert cost.client_bytes(2, everywhere) > 2 * budgets["a"].memory_bytes
    plan = make_round_plan(config, budgets, server, scores, cost, own=own)
    for name in "ab":
        alone = make_round_plan(config, {name: budgets[name]}, server, scores, own[name])
        mine, expected = plan.clients[name], alone.clients[name]
        assert mine.split >= expected.split >= 2
        below = {layer: rank for layer, rank in mine.ranks.items() if int(layer.split(".")[2]) < mine.split}
        assert own[name].client_bytes(mine.split, below) == mine.predicted_bytes <= budgets[name].memory_bytes
    taken = {name: (each.split, dict(each.ranks)) for name, each in plan.clients.items()}
    assert plan.server_bytes >= cost.server_bytes(taken, 0)


@pytest.mark.parametrize("method", ["splitlora", "fedit"])
def test_nor_do_they_where_all_have_one_split(method: str, tiny_folder: Path) -> None:
    settings = {"method.name": method, "train.batch_size": 64, "plan.over_budget": False, "lora.rank": 4}
    config, _, _, _, scores = case(tiny_folder, 1, **settings)
    cost, own = cost_model(config, 64, 48, 2), own_costs(config, 64, {"a": Size(12), "liar": Size(48)}, 2)
    everywhere = {layer.name: 4 for layer in cost.layers}
    needed = own["a"].client_bytes(2, everywhere) if method == "splitlora" else own["a"].whole_bytes(everywhere)
    budgets = {"a": Budget(needed, 0), "liar": Budget(10**12, 0)}
    plan = make_round_plan(config, budgets, None, scores, cost, own=own)
    assert plan.clients["a"].predicted_bytes <= needed and not plan.left_out


def test_lengths_are_rounded_up_to_few_by_settings_alone() -> None:
    for most in (2, 48, 128, 2048, 4000):
        rounded = {length: rounded_length(length, most) for length in range(2, most + 1)}
        assert rounded[most] == most
        assert all(length <= found <= max(math.ceil(2**0.25 * length), 2) for length, found in rounded.items())
        assert list(rounded.values()) == sorted(rounded.values())
        assert len(set(rounded.values())) <= 4 * math.log2(most) + 2
