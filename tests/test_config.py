"""One schema: what it refuses, how it travels, and that every copy of it agrees."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.config import RENAMED, ClientsConfig, Config, ConfigError, render_pyproject_block
from hsplitlora_flwr.config.names import KNOWN_OPTIMIZERS

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def test_pyproject_holds_the_schema() -> None:
    assert render_pyproject_block() in PYPROJECT.read_text()
    tables = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert Config.from_mapping(tables) == Config()


def test_run_config_round_trip() -> None:
    config = Config.from_mapping({"train": {"lr": 0.5, "rounds": 7}, "clients": {"memory_gb": [1, 2.5]}})
    flat = config.to_run_config()
    assert all(type(value) in (int, float, bool, str) for value in flat.values())
    assert Config.from_run_config(flat) == config
    assert config.clients.memory_bytes == (1_000_000_000, 2_500_000_000)


@pytest.mark.parametrize("other", ["server.half=shared", "split.labels=client", "transport.kind=messages"])
def test_one_pass_for_all_needs_clients_that_come_together(other: str) -> None:
    key, value = other.split("=")
    settings = {"server.half": "per_client", key: value}
    Config.from_run_config(settings)
    with pytest.raises(
        ConfigError, match=rf"train\.multi_adapter_batching=on cannot be had with {other}, .* set it to auto"
    ):
        Config.from_run_config(settings | {"train.multi_adapter_batching": "on"})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.round", 1, "unknown key 'train.round'; did you mean train.rounds?"),
        ("epochs", 1, "unknown key 'epochs'; known keys: clients.adapter_mb"),
        ("lr", 1, "unknown key 'lr'; did you mean train.lr?"),
        ("train.lr", "fast", "train.lr='fast' is of type str; it must be a number"),
        ("train.rounds", 1.5, "train.rounds=1.5 is of type float; it must be a whole number"),
        ("train.rounds", True, "train.rounds=True is of type bool"),
        ("train.rounds", 0, "train.rounds=0 is out of range"),
        ("train.lr", float("nan"), "train.lr=nan is out of range"),
        ("train.lr", float("inf"), "train.lr=inf is out of range"),
        ("train.schedule", "sine", "train.schedule='sine' is not allowed; choose one of constant, linear, cosine"),
        ("model.dtype", "int4", "model.dtype='int4' is not allowed"),
        ("model.device", "gpu", "model.device='gpu' is not allowed"),
        ("lora.ranks", "0,two", "lora.ranks='0,two' must be ints separated by commas"),
        ("lora.ranks", "0", "one above 0"),
        ("lora.alpha", "r2", "lora.alpha='r2' must be a positive number"),
        ("lora.dropout", 1.0, "lora.dropout=1.0 is out of range"),
        ("clients.memory_gb", "1,-2", "must hold numbers above 0"),
        ("split.min", 0, "split.min=0 is out of range"),
        ("transport.port", 70000, "transport.port=70000 is out of range"),
        ("data.source", "e2e", "data.path is empty; data.source=e2e needs the path"),
        ("train.micro_batch_size", 9, "train.micro_batch_size=9 is above train.batch_size=8"),
        ("train.momentum", 0.9, "train.momentum=0.9 is for train.optimizer=sgd, and it is adamw"),
        ("run.seed", 2**32, "run.seed=4294967296 is out of range"),
        ("train.rounds", 2**63, "train.rounds=9223372036854775808 is out of range; Flower carries"),
        ("plan.important_share", 1.5, "plan.important_share=1.5 is out of range"),
    ],
)
def test_wrong_values_name_key_value_and_remedy(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_run_config({key: value})
    assert says in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("method.name", "full"), ("run.merged", True)])
def test_a_quantised_base_stays_as_it_is(key: str, value: Any) -> None:
    Config.from_run_config({key: value})
    with pytest.raises(ConfigError, match=rf"model\.quantise=4bit leaves the weights .* {key}={str(value).lower()}"):
        Config.from_run_config({key: value, "model.quantise": "4bit"})


def test_a_deadline_needs_the_exact_planner() -> None:
    Config.from_run_config({"plan.deadline": 9.0})
    with pytest.raises(ConfigError, match=r"plan\.deadline=9 needs plan\.planner=exact; greedy knows memory only"):
        Config.from_run_config({"plan.deadline": 9.0, "plan.planner": "greedy"})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_goes_on_working_and_says_the_new_one(old: str, new: str) -> None:
    section, _, name = new.partition(".")
    with pytest.warns(FutureWarning, match=f"^{old} is now {new}$") as told:
        config = Config.from_run_config({"server.half": "per_client", old: "on"})
    assert getattr(getattr(config, section), name) == "on" and len(told) == 1
    assert old not in config.to_run_config()


@pytest.mark.filterwarnings("error")
def test_a_former_name_that_is_empty_is_not_given() -> None:
    """As Flower has it from ``pyproject.toml``, without which it would refuse the name on its command line."""
    tables = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert all(tables[section][name] == "" for section, name in (old.split(".") for old in RENAMED))
    assert Config.from_run_config(dict.fromkeys(RENAMED, "")) == Config()


def test_sections_of_an_app_of_ones_own_are_left_alone() -> None:
    own = {"hospital.ward": "east", "hospital.beds.free": 3, "train.rounds": 7}
    assert Config.from_run_config(own) == Config.from_run_config({"train.rounds": 7})
    with pytest.raises(ConfigError, match=r"unknown key 'train\.ward'"):
        Config.from_run_config({"train.ward": 1})


@pytest.mark.parametrize(
    ("lists", "count"),
    [
        ({}, 3),
        ({"clients.memory_gb": "2.0"}, 3),
        ({"clients.memory_gb": "6,8,12,20"}, 4),
        ({"clients.memory_gb": [6, 8], "clients.gflops": "1,2,3,4,5"}, 5),
        ({"clients.memory_gb": "6,8", "clients.count": 5}, 5),
    ],
)
def test_the_longest_list_says_how_many_clients_there_are_unless_a_number_does(lists: Any, count: int) -> None:
    config = Config.from_run_config(lists)
    assert config.clients.count == count
    assert Config.from_run_config(config.to_run_config()) == config


@pytest.mark.parametrize("key", ["clients.memory_gb", "clients.gflops", "clients.mbit_up", "clients.adapter_mb"])
def test_no_client_of_a_list_is_lost_without_a_word(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"clients\.count=3 leaves out 1 of the 4 clients in {key}='6\.0,8\.0,"):
        Config.from_run_config({key: "6,8,12,20", "clients.count": 3})


def test_lists_are_tuples_inside_and_text_outside() -> None:
    values = {"clients.memory_gb": "1, 2.5", "clients.gflops": 7, "lora.ranks": [8, 2], "run.plugins": "a.b,c"}
    config = Config.from_run_config(values)
    assert (config.clients.memory_gb, config.clients.gflops, config.lora.ranks) == ((1.0, 2.5), (7.0,), (0, 2, 8))
    assert config.run.plugins == ("a.b", "c")
    flat = config.to_run_config()
    assert (flat["clients.memory_gb"], flat["lora.ranks"], flat["clients.mbit_up"]) == ("1.0,2.5", "0,2,8", "")
    with pytest.raises(ConfigError, match=r"clients\.memory_gb='1,x' must be floats separated by commas"):
        Config(clients=replace(ClientsConfig(), memory_gb=("1", "x")))  # type: ignore[arg-type]


def test_a_name_that_is_registered_later_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer='lion' is not allowed; choose one of adamw, sgd"):
        Config.from_run_config({"train.optimizer": "lion"})
    monkeypatch.setitem(KNOWN_OPTIMIZERS._names, "lion", None)
    assert Config.from_run_config({"train.optimizer": "lion"}).train.optimizer == "lion"


def test_importing_the_schema_imports_nothing_heavy() -> None:
    code = "import sys, hsplitlora_flwr.config; print({'torch', 'flwr', 'transformers', 'hydra'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_split_bounds_in_order() -> None:
    with pytest.raises(ConfigError, match=r"split.max=2 is below split.min=3"):
        Config.from_run_config({"split.min": 3, "split.max": 2})


def test_alpha_is_a_number_or_a_multiple_of_the_rank() -> None:
    def alphas(text: str) -> list[float]:
        return [Config.from_run_config({"lora.alpha": text}).alpha(rank) for rank in (4, 16)]

    assert alphas("2r") == [8, 32]
    assert alphas("r") == [4, 16]
    assert alphas("0.5r") == [2, 8]
    assert alphas("16") == [16, 16]
    assert alphas("8sqrt(r)") == [16, 32]  # a scale of 8 / sqrt(r)
    assert alphas("sqrt(r)") == [2, 4]


def test_targets_and_ranks() -> None:
    config = Config.from_run_config({"lora.targets": "q_proj, v_proj", "lora.ranks": "8,4"})
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.lora.ranks == (0, 4, 8)
    assert Config().lora.targets == "auto"


def test_of_a_long_value_an_error_shows_the_beginning():
    with pytest.raises(ConfigError) as told:
        Config.from_run_config({"lora.ranks": "9" * 5000 + "x"})
    assert "lora.ranks='999" in str(told.value) and "..." in str(told.value) and len(str(told.value)) < 600
