"""Simulated seconds against rounds that are written out."""

from __future__ import annotations

from typing import Any

import pytest

from hsplitlora_flwr.comparison.clock import Step, round_seconds, serve
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.planning.round import cost_model


def test_a_server_takes_steps_in_order_or_as_they_come() -> None:
    slow, fast = Step(10.0, 1.0, 2.0, 1.0, 4.0), Step(1.0, 1.0, 2.0, 1.0, 1.0)
    # in order: 11 to 13, 13 to 15, back at 18 and 17; then 29 to 31 and 31 to 33
    assert serve([[slow] * 2, [fast] * 2], fixed=True) == [36.0, 35.0]
    # as they come: the fast one at 2 and at 8, the slow one at 11 and, after 13 + 5 + 11, at 29
    assert serve([[slow] * 2, [fast] * 2], fixed=False) == [36.0, 12.0]
    # a server that is busy all the time, with two clients that are ready before it is
    busy = Step(0.5, 0.0, 4.0, 0.0, 0.5)
    assert serve([[busy] * 3] * 2, fixed=True) == [21.0, 25.0]
    assert serve([], fixed=True) == []


def test_a_client_that_computes_forward_alone_is_a_step_ahead() -> None:
    """Sent at 3, 6 and, as the first is served by then, 9; served from 3 to 5, 6 to 8 and 9 to 11."""
    alone = Step(2.0, 1.0, 2.0, 0.0, 0.0, waits=False)
    assert serve([[alone] * 3], fixed=True) == serve([[alone] * 3], fixed=False) == [11.0]
    # the server is slower: served from 3 to 13, 23 and 33, and the fourth, sent at 16, to 43
    slow = Step(2.0, 1.0, 10.0, 0.0, 0.0, waits=False)
    assert serve([[slow] * 4], fixed=True) == [43.0]
    # sent at 9, 18 and, as the third waits for the first to be served at 19, at 28; served at 29 and 39
    late = Step(0.0, 9.0, 10.0, 0.0, 0.0, waits=False)
    assert serve([[late] * 3], fixed=True) == [39.0]


def settings(**changes: Any) -> Config:
    values = {
        "clients.count": 2,
        "clients.gflops": "100,200",
        "clients.mbit_up": "8",
        "clients.mbit_down": "16",
        "plan.server_gflops": 1000.0,
        "train.steps": 3,
        "train.batch_size": 4,
    }
    return Config.from_run_config(values | changes)


def client(index: int, **fields: Any) -> dict[str, Any]:
    """Three steps of four rows of ten tokens."""
    row = {"client": str(index), "tokens": 120, "losses": [1.0] * 3, "bytes_up": 10**6, "bytes_down": 4 * 10**6}
    return row | {"checkpointing": "none", "trains": True} | fields


@pytest.fixture
def model(tiny_folder: Any) -> dict[str, Any]:
    return {"model.path": str(tiny_folder)}


def test_a_client_with_the_whole_model_loads_trains_and_sends(model: dict[str, Any]) -> None:
    config = settings(**model, **{"method.name": "fedit"})
    cost = cost_model(config, 4, 10)
    ranks = {layer.name: 8 for layer in cost.layers}
    rows = [{"client": str(index), "left_out": "", "ranks": ranks} for index in range(2)]
    summary = {
        "rounds": [{"round": number, "clients": [client(0), client(1, bytes_up=2 * 10**6)]} for number in (1, 2)],
        "plans": [{"round": 1, "clients": rows}],
    }
    # 4 MB at 2 MB/s, 1 or 2 MB at 1 MB/s
    slower = max(2 + 3 * cost.whole_flops(ranks) / 100e9 + 1, 2 + 3 * cost.whole_flops(ranks) / 200e9 + 2)
    assert round_seconds(config, summary) == pytest.approx([slower] * 2)
    assert round_seconds(settings(**model, **{"clients.gflops": ""}), summary) == []


def test_a_split_client_alone_waits_for_every_gradient(model: dict[str, Any]) -> None:
    config = settings(
        **model, **{"clients.gflops": "100.0", "clients.count": 1, "plan.probe_every": 0, "plan.probe_batches": 1}
    )
    cost = cost_model(config, 4, 10)
    ranks = {layer.name: 4 for layer in cost.layers}
    up, down = cost.wire_bytes()
    row = client(0, bytes_up=3 * up + 500, bytes_down=3 * down + 700)
    summary = {
        "rounds": [{"round": 1, "clients": [row]}, {"round": 2, "clients": [row]}],
        "plans": [{"round": 1, "clients": [{"client": "0", "left_out": "", "split": 2, "ranks": ranks}]}],
    }
    wire = up / 1e6 + down / 2e6
    step = cost.client_flops(2, ranks) / 100e9 + wire + cost.server_flops(2, ranks) / 1000e9
    every = cost.weight_gradient_flops(0, 2) / 100e9
    probe = every + wire + cost.weight_gradient_flops(2, cost.num_blocks, head=True) / 1000e9
    training = 3 * step + 500 / 1e6 + 700 / 2e6
    assert round_seconds(config, summary) == pytest.approx([probe + training, training])


def test_central_training_takes_the_server_s_time_alone(model: dict[str, Any]) -> None:
    summary = {"rounds": [{"round": 1, "clients": [{"client": "all", "tokens": 240, "losses": [1.0] * 6}]}]}
    config = settings(**model, **{"method.name": "cenlora"})
    cost = cost_model(config, 4, 10)
    lora = cost.whole_flops({layer.name: 8 for layer in cost.layers})
    assert round_seconds(config, summary) == pytest.approx([6 * lora / 1000e9])
    [full] = round_seconds(settings(**model, **{"method.name": "full"}), summary)
    # a third product for every weight, for two of the frozen model; attention has no weights
    weights = 2.0 * cost.tokens * cost.linear_parameters * cost.num_blocks
    assert full > 6 * (cost.whole_flops({}) + 2 * weights) / 1000e9
