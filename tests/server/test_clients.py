"""Who is drawn for a round, what is asked of whom, and what is kept of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.messages import DESCRIBE
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.server.clients import Clients
from tests.grid import LocalGrid

COUNT = 6


def grid_of(first_node: int = 10, names: range = range(COUNT)) -> LocalGrid:
    nodes = {first_node - 7 * name: {"partition-id": name, "num-partitions": COUNT, "memory-gb": 1.0} for name in names}
    return LocalGrid(split_client_app(), nodes)


@pytest.fixture
def clients(tiny_folder: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Clients:
        settings = {"model.path": str(tiny_folder), "data.train_rows": 60, "data.max_length": 32, **changes}
        config = Config.from_run_config(settings)
        return Clients(config, RunReport(tmp_path, config.to_run_config()))

    return make


def drawn(clients: Clients) -> list[str]:
    return [description.name for description in clients.descriptions.values()]


def asked(grid: LocalGrid) -> int:
    """How many were asked who they are since the last time."""
    count = sum(message.metadata.message_type == DESCRIBE for message in grid.sent)
    grid.sent.clear()
    return count


def test_some_are_drawn_for_a_round_and_the_same_in_every_run(clients: Any) -> None:
    rounds = []
    for first_node in (100, 200):  # whatever ids Flower gives them
        grid, some = grid_of(first_node), clients(**{"clients.per_round": 2})
        some.describe(grid, 0)
        assert len(drawn(some)) == COUNT == asked(grid)
        rounds.append([])
        for server_round in range(1, 13):
            some.describe(grid, server_round)
            rounds[-1].append(drawn(some))
            assert rounds[-1][-1] == sorted(rounds[-1][-1]) and len(rounds[-1][-1]) == 2
            # In the first round all have just been asked; later those that were not drawn the last time have not.
            assert asked(grid) == (0 if server_round == 1 else 2)
    assert rounds[0] == rounds[1]
    assert len({tuple(names) for names in rounds[0]}) > 4
    assert {name for names in rounds[0] for name in names} == set(map(str, range(COUNT)))


def test_another_seed_draws_others(clients: Any) -> None:
    def draws(seed: int) -> list[list[str]]:
        grid, some = grid_of(), clients(**{"clients.fraction": 0.5, "run.seed": seed})
        found = []
        for server_round in range(5):
            some.describe(grid, server_round)
            found.append(drawn(some))
        return found[1:]

    first = draws(0)
    assert all(len(names) == COUNT / 2 for names in first)
    assert draws(1) != first == draws(0)


def test_what_a_drawn_client_said_with_its_last_reply_holds(clients: Any) -> None:
    grid, some = grid_of(), clients(**{"clients.per_round": 5})
    some.describe(grid, 0)
    some.describe(grid, 1)
    before = set(some.descriptions)
    for node in before:
        some.remember(node)
    asked(grid)
    some.describe(grid, 2)
    assert asked(grid) == len(set(some.descriptions) - before) == 1


def test_whoever_comes_can_be_drawn_and_whoever_goes_cannot(clients: Any) -> None:
    grid, some = grid_of(names=range(3)), clients(**{"clients.per_round": 3, "clients.count": 2})
    some.describe(grid, 0)
    gone, configs = grid.node_configs, grid_of(500).node_configs
    grid.node_configs = {node: config for node, config in configs.items() if config["partition-id"] >= 3}
    some.describe(grid, 1)
    assert drawn(some) == ["3", "4", "5"] and not set(gone) & set(some.descriptions)
    assert some.known == 3 and not set(gone) & set(some.seconds)


def test_fewer_than_wanted_are_all_drawn_and_the_fewest_are_kept_to(clients: Any) -> None:
    for changes, count in (({"per_round": 9}, COUNT), ({"fraction": 0.01}, 1), ({"fraction": 0.01, "min": 3}, 3)):
        some = clients(**{f"clients.{key}": value for key, value in changes.items()})
        some.describe(grid := grid_of(), 0)
        some.describe(grid, 1)
        assert len(drawn(some)) == count


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clients\.per_round=2 and clients\.fraction=0\.5: give one of them"):
        Config.from_run_config({"clients.per_round": 2, "clients.fraction": 0.5})
    with pytest.raises(ConfigError, match=r"clients\.per_round=2 is less than clients\.min=3"):
        Config.from_run_config({"clients.per_round": 2, "clients.min": 3})
