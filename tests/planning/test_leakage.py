"""The floor that a table of leakage gives a plan, and what is said of splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.round import split_bounds


@pytest.mark.parametrize(
    ("recovered", "limit", "floor"),
    [
        ({1: 0.9, 4: 0.5, 8: 0.2}, 0.5, 4),
        ({1: 0.9, 4: 0.3, 8: 0.4, 12: 0.1}, 0.35, 12),  # a dip on the way is no floor
        ({1: 0.1}, 0.5, 1),
    ],
)
def test_the_floor_is_the_lowest_split_from_which_on_all_are_safe(
    recovered: dict[int, float], limit: float, floor: int
) -> None:
    assert LeakageTable(recovered).floor(limit) == floor


def test_a_limit_that_no_split_keeps_is_told() -> None:
    with pytest.raises(PlanError, match=r"split.max_leakage=0.5: even behind block 3 80% of the tokens"):
        LeakageTable({1: 0.9, 4: 0.8}).floor(0.5)


def test_between_attacked_splits_the_lower_one_counts() -> None:
    table = LeakageTable({2: 0.7, 6: 0.4})
    assert [table.at(split) for split in (1, 2, 5, 6, 20)] == [1.0, 0.7, 0.7, 0.4, 0.4]


def config_with(file: Path, limit: float = 0.5, **more: int) -> Config:
    return Config.from_run_config({"split.leakage": str(file), "split.max_leakage": limit, **more})


def test_a_plan_keeps_to_the_floor(tmp_path: Path) -> None:
    file = tmp_path / "leakage.json"
    file.write_text(json.dumps({"recovered": {"1": 0.9, "4": 0.6, "8": 0.3}}))
    assert split_bounds(config_with(file), 30)[0] == 8
    assert split_bounds(config_with(file, 1.0), 30)[0] == 1
    assert split_bounds(config_with(file, **{"split.min": 11}), 30)[0] == 11


def test_a_floor_above_the_most_blocks_is_told(tmp_path: Path) -> None:
    file = tmp_path / "leakage.json"
    file.write_text(json.dumps({"recovered": {"1": 0.9, "8": 0.3}}))
    with pytest.raises(PlanError, match=r"split.max_leakage=0.5 asks for 8 of 30 blocks .* split.max=4; raise"):
        split_bounds(config_with(file, **{"split.max": 4}), 30)


@pytest.mark.parametrize(
    ("share", "more", "bounds"),
    [
        (0.5, {}, (15, 15)),
        (0.51, {}, (16, 16)),
        (0.999, {}, (29, 29)),
        (0.5, {"server.half": "per_client"}, (15, 29)),
        (0.2, {"split.min": 8}, (8, 15)),
    ],
)
def test_a_floor_may_be_a_share_of_the_blocks(share: float, more: dict[str, Any], bounds: tuple[int, int]) -> None:
    assert split_bounds(Config.from_run_config({"split.min_share": share, **more}), 30) == bounds


def test_a_share_above_the_most_blocks_is_told_by_its_name() -> None:
    with pytest.raises(PlanError, match=r"split.min_share=0.5 asks for 15 of 30 blocks .* split.max=4; raise that"):
        split_bounds(Config.from_run_config({"split.min_share": 0.5, "split.max": 4}), 30)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"recovered": {"x": 1}}', '{"recovered": {"1": 2}}', '{"recovered": {}}']
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "leakage.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"split.leakage=.*leakage.json"):
        split_bounds(config_with(file), 30)


def test_readable_cuts_are_warned_of() -> None:
    names = {"0": 3, "1": 6, **dict.fromkeys("abcd", 4)}
    three, four = LeakageTable({2: 0.7, 6: 0.4}).warnings(names)
    assert three.startswith("behind 3 block(s), which client 0 keeps, an attack recovered 70% of the tokens")
    assert "which clients a, b, c and 1 more keep, an attack" in four
    (two,) = LeakageTable({2: 0.7}).warnings({"0": 3, "1": 3})
    assert "which clients 0, 1 keep, an attack" in two


def test_the_demonstration_names_its_own_leakage() -> None:
    table = LeakageTable.of(Config())
    assert table and table.warnings({"0": 5}) and not table.warnings({"0": 29})
    assert LeakageTable.of(Config.from_run_config({"model.path": "another"})) is None
    assert LeakageTable.of(Config.from_run_config({"split.clip": 5.0})) is None, "it was made without protections"


def test_a_table_is_of_the_protections_that_it_was_made_under(tmp_path: Path) -> None:
    file = tmp_path / "leakage.json"
    file.write_text(json.dumps({"recovered": {"1": 0.1}, "clip": 2.0, "noise": 1.0, "width": 0}))
    said = {"split.leakage": str(file), "split.clip": 2.0}
    assert LeakageTable.of(Config.from_run_config(said | {"split.noise": 1.0}))
    with pytest.raises(ConfigError, match=r"was made with split.noise=1, and the run has split.noise=0; attack what"):
        LeakageTable.of(Config.from_run_config(said))


def test_a_limit_needs_a_table() -> None:
    with pytest.raises(ConfigError, match=r"split.max_leakage=0.3 needs split.leakage"):
        Config.from_run_config({"split.max_leakage": 0.3})
