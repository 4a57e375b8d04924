"""A run is whole when its rounds begin, and a run without clients has nothing of a federated one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import Strategy

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.planning import PlanError
from hsplitlora_flwr.server.central import CentralTraining
from hsplitlora_flwr.server.run import Run
from hsplitlora_flwr.server.strategy import HSplitLoRA
from tests.grid import LocalGrid
from tests.server.test_strategy import grid_of, settings


def federated(config: Config, folder: Path) -> HSplitLoRA:
    return HSplitLoRA(config, load_text(config.data, 0).held_out, folder)


def central(config: Config, folder: Path) -> CentralTraining:
    text = load_text(config.data, 0)
    return CentralTraining(config, text.held_out, folder, text.train)


@pytest.mark.parametrize("make", [federated, central])
def test_what_needs_a_loaded_run_says_so(
    make: Callable[[Config, Path], Run[Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    run = make(settings(tiny_folder, tmp_path), tmp_path)
    for verb in (lambda: run.evaluate(0), lambda: run.train_round(LocalGrid(split_client_app(), {}), 1), run.export):
        with pytest.raises(RuntimeError, match=r"nothing is loaded yet: start\(\)"):
            verb()


def test_a_run_without_clients_is_no_strategy(tiny_folder: Path, tmp_path: Path) -> None:
    run = central(settings(tiny_folder, tmp_path, **{"method.name": "cenlora"}), tmp_path)
    assert not isinstance(run, Strategy)
    assert not {"clients", "configure_train", "aggregate_train", "make_plans", "score_weights"} & {*dir(run)}


def test_nothing_is_opened_or_loaded_for_a_plan_that_is_not_possible(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"plan.over_budget": False, "clients.count": 2})
    run, grid = federated(config, tmp_path), grid_of({0: 0.001, 1: 0.001})
    with pytest.raises(PlanError, match="misses"):
        run.start(grid)
    assert [message.metadata.message_type for message in grid.sent] == ["query.describe"] * 2 + ["query.forget"] * 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "PlanError" in summary["error"]
    assert "loading" not in (tmp_path / "events.jsonl").read_text()
    with pytest.raises(RuntimeError, match="nothing is loaded"):
        run.evaluate(0)
