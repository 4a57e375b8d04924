"""What a client's process takes: remembered for the same model, text and packages, and as runs measure it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.cli import own_memory, run
from hsplitlora_flwr.cli.checks import Checked
from hsplitlora_flwr.cli.own_memory import learn, measured, remember, remembered
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting.events import Event


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HSPLITLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tiny_folder: Path) -> Config:
    return Config.from_run_config({"model.path": str(tiny_folder)})


def changed(config: Config, key: str, value: Any) -> Config:
    return Config.from_run_config(config.to_run_config() | {key: value})


def known(config: Config) -> int | None:
    found = remembered(config)
    return found.bytes if found else None


def test_a_number_holds_for_the_same_model_text_and_packages(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known(config) is None
    remember(config, 500, in_run=True)
    for key, value in (("clients.memory_gb", "3.0"), ("train.rounds", 9), ("lora.ranks", "0,4"), ("run.seed", 3)):
        assert known(changed(config, key, value)) == 500, key
    for key, value in (("data.max_length", 64), ("data.train_rows", 5), ("model.quantise", "8bit")):
        assert known(changed(config, key, value)) is None, key
    monkeypatch.setattr(own_memory, "version", lambda package: "another")
    assert known(config) is None


def test_what_a_run_measured_is_kept_against_a_forecast(config: Config) -> None:
    remember(config, 400, in_run=False)
    remember(config, 500, in_run=True)
    remember(config, 400, in_run=False)
    assert known(config) == 500
    remember(config, 510, in_run=True)
    assert known(config) == 510


def test_a_damaged_file_is_none(config: Config, cache: Path) -> None:
    remember(config, 500, in_run=True)
    (cache / "process.json").write_text("{half")
    assert known(config) is None
    remember(config, 500, in_run=True)
    assert known(config) == 500


def test_a_run_teaches_the_largest_of_its_first_round(config: Config, tmp_path: Path) -> None:
    rounds = [{"clients": [{"process_bytes": 7}, {"process_bytes": 9}]}, {"clients": [{"process_bytes": 99}]}]
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": rounds}))
    learn(own_memory.key(config), tmp_path)
    assert known(config) == 9


def test_a_process_of_its_own_is_asked_once_and_remembered(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answers(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads(input)["model.path"])
        return subprocess.CompletedProcess(command, 0, "a warning\n123456\n")

    monkeypatch.setattr(subprocess, "run", answers)
    assert measured(config).bytes == 123456
    assert (asked, known(config)) == ([config.model.path], 123456)


def test_what_that_process_says_is_what_a_client_says(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it has imported everything, so only bounds can be given; and Ray would take seconds."""
    monkeypatch.setattr(own_memory, "find_spec", lambda name: None)
    assert 100_000_000 < own_memory._measure(config) < 10_000_000_000


class Console:
    def __init__(self) -> None:
        self.said: list[str] = []

    def handle(self, event: Event) -> None:
        self.said.append(str(event.get("text")))


@pytest.mark.parametrize(
    ("engine", "in_run", "taken"),
    [("flower", True, 570.0), ("process", True, 570.0), ("process", False, 570.0), ("flower", False, 0.0)],
)
def test_a_run_takes_what_is_known(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, in_run: bool, taken: float
) -> None:
    """Through Flower only what such a run has measured, since clients can measure it themselves."""
    started: list[Config] = []

    def launch(config: Config, *_: Any) -> int:
        started.append(config)
        rows = [{"process_bytes": 580_000_000}]
        (tmp_path / "summary.json").write_text(json.dumps({"rounds": [{"clients": rows}]}))
        return 0

    monkeypatch.setattr(run, "launch", launch)
    monkeypatch.setattr(
        run, "prepare_apart", lambda config, *_, **__: Checked(own_memory.key(config), remembered(config))
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path)))
    remember(config, 570_000_000, in_run=in_run)
    console = Console()
    assert run._start(config, run.Launcher(engine=engine), console) == 0
    assert started[0].clients.process_mb == taken
    assert "0.57 GB" in console.said[-1]
    assert known(config) == (570_000_000 if taken else 580_000_000)
    stated = changed(config, "clients.process_mb", 300.0)
    run._start(stated, run.Launcher(engine=engine), console)
    assert started[-1] == stated
