"""Trackers are told a run's figures, in the order that they take them; TensorBoard's own files are read back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hsplitlora_flwr.config import Config, ConfigError, RunConfig
from hsplitlora_flwr.reporting.report import RunReport, make_listeners
from hsplitlora_flwr.reporting.trackers import PACKAGES, check_trackers


def told(folder: Path, *names: str) -> None:
    """A run of two rounds with two clients, whose steps come one client after the other."""
    config = Config(run=RunConfig(trackers=names))
    report = RunReport(folder, config.to_run_config(), make_listeners(config, folder))
    report.evaluated(0, 20.0, 100, 1.0)
    for server_round in (1, 2):
        for client in ("0", "1"):
            for step in (1, 2):
                loss = 10.0 * server_round + step + int(client) / 10
                report.step(
                    round=server_round, rounds=2, client=client, step=step, steps=2, loss=loss, tokens=5, all_tokens=9
                )
            row = {"client": client, "seconds": 3.0, "measured_bytes": 0 if client == "1" else 2 * 10**9}
            row |= {"predicted_bytes": 0, "losses": [1.0], "tokens_per_second": 1.0, "bytes_up": 1, "bytes_down": 1}
            report.client_finished(server_round, row)
        report.round_finished(server_round, 4.0, 0.5, [row])
        report.evaluated(server_round, 20.0 - server_round, 100, 1.0)
    report.finished([])


EXPECTED = {
    "loss/0": [(1, 11.0), (2, 12.0), (3, 21.0), (4, 22.0)],
    "loss/1": [(1, 11.1), (2, 12.1), (3, 21.1), (4, 22.1)],
    "perplexity": [(0, 20.0), (2, 19.0), (4, 18.0)],
    "seconds/0": [(2, 3.0), (4, 3.0)],
    "seconds/1": [(2, 3.0), (4, 3.0)],
    "memory_gb/0": [(2, 2.0), (4, 2.0)],
    "seconds/round": [(2, 4.0), (4, 4.0)],
    "update_norm": [(2, 0.5), (4, 0.5)],
}


def test_tensorboard_has_every_figure_at_its_step(tmp_path: Path) -> None:
    told(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == EXPECTED.keys()
    for name, points in EXPECTED.items():
        got = [(event.step, event.value) for event in found.Scalars(name)]
        assert got == [(step, pytest.approx(value)) for step, value in points], name
    assert any(tmp_path.glob("tensorboard/*/hparams.yml"))  # the settings


class Fake:
    """What accelerate uses of wandb and trackio."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.ended = False

    def init(self, **options: Any) -> Fake:
        self.started = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.settings = values

    def finish(self) -> None:
        self.ended = True


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Fake]]:
    made, module = Fake(), ModuleType(request.param)
    module.__spec__ = ModuleSpec(request.param, None)  # as of one that is installed
    vars(module).update(init=made.init, log=made.log, config=made, finish=made.finish)
    monkeypatch.setitem(sys.modules, request.param, module)
    yield request.param, made


def test_trackers_that_take_no_step_of_before_are_told_in_order(fake: tuple[str, Fake], tmp_path: Path) -> None:
    name, tracker = fake
    told(tmp_path / "my-run", name)
    assert (tracker.started["project"], tracker.started["name"]) == ("hsplitlora", "my-run")
    steps = [step for step, _ in tracker.logged]
    assert steps == sorted(steps) and tracker.ended
    found: dict[str, list[tuple[int, float]]] = {}
    for step, values in tracker.logged:
        for figure, value in values.items():
            found.setdefault(figure, []).append((step, value))
    assert found == EXPECTED
    assert tracker.settings["run.trackers"] == name


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_says_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ModuleNotFoundError, match=f"run.trackers={name} needs .*pip install {name}"):
        check_trackers([name])


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.trackers names neptun; choose of tensorboard, mlflow, wandb, trackio"):
        Config(run=RunConfig(trackers=("tensorboard", "neptun")))
