"""A client's cut comes no earlier because of what another one says of itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.planning import Budget, Plan
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.round import cost_model, make_round_plan

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
