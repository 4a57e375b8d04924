"""The checks in a process of their own: what it tells, what it is told, and what it leaves behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hsplitlora_flwr.cli import checks
from hsplitlora_flwr.cli.checks import Checked, prepare_apart
from hsplitlora_flwr.cli.forecast import forecast
from hsplitlora_flwr.cli.own_memory import OwnMemory
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.reporting.events import Event


class Console:
    """Remembers what it is told; the first word may break the talk off."""

    def __init__(self, interrupt: type[BaseException] | None = None) -> None:
        self.heard: list[Event] = []
        self._interrupt = interrupt

    def handle(self, event: Event) -> None:
        self.heard.append(event)
        if self._interrupt:
            raise self._interrupt


def settings(folder: Path, **data: Any) -> Config:
    return Config.from_run_config({"run.dir": str(folder / "run"), **data})


def answering(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have another program in the place of the one that checks."""
    (folder / "stand_in.py").write_text(f"import json, os, sys, time\nasked = json.load(sys.stdin)\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(checks, "_MODULE", "stand_in")


def test_what_goes_on_and_what_is_known_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "print(json.dumps({'kind': 'phase', 'text': asked['settings']['run.dir']}), flush=True)\n"
        "memory = {'bytes': 7, 'source': 'the last run here', 'in_run': True}\n"
        "known = {'key': str(asked['simulated']), 'memory': memory, 'planned_bytes': 9 * asked['planned']}\n"
        "print(json.dumps({'kind': 'checked'} | known))"
    )
    answering(code, tmp_path, monkeypatch)
    console = Console()
    checked = prepare_apart(settings(tmp_path), console, simulated=False, planned=True)
    assert checked == Checked("False", OwnMemory(7, "the last run here", in_run=True), 9)
    assert console.heard == [{"kind": "phase", "text": str(tmp_path / "run")}]


def test_what_is_wrong_is_told_in_its_words_and_libraries_are_not_heard(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The program that really checks."""
    with pytest.raises(ConfigError, match=r"nowhere.*"):
        prepare_apart(settings(tmp_path, **{"data.source": "own", "data.path": "nowhere"}), Console())
    assert capfd.readouterr() == ("", "")


def test_a_process_that_breaks_off_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering("print('many\\nwords', file=sys.stderr); os._exit(3)", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="the checks before the run broke off\nmany\nwords"):
        prepare_apart(settings(tmp_path), Console())


def test_who_is_interrupted_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(
        "print(json.dumps({'kind': 'phase', 'text': str(os.getpid())}), flush=True); time.sleep(600)",
        tmp_path,
        monkeypatch,
    )
    console, started = Console(KeyboardInterrupt), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prepare_apart(settings(tmp_path), console)
    assert not psutil.pid_exists(int(console.heard[0]["text"]))
    assert time.monotonic() - started < checks._PATIENCE


def test_what_a_run_is_planned_to_take(folder: Path, monkeypatch: pytest.MonkeyPatch, known_process: None) -> None:
    """The server, and those clients that can be there at once; nothing where there is no plan."""
    monkeypatch.setattr(checks, "prepare", lambda *_, **__: None)

    def planned(**changes: Any) -> int:
        stated = {"model.path": str(folder), "clients.count": 3, "clients.memory_gb": "1.0,3.0,2.0"}
        told = Console()
        asked = {"settings": stated | changes, "simulated": True, "planned": True, "path": sys.path}
        checks._check(asked, told)
        return int(told.heard[-1]["planned_bytes"])

    config = Config.from_run_config({"model.path": str(folder), "clients.memory_gb": "1.0,3.0,2.0"})
    plan = forecast(config).plan
    by_client = sorted(client.predicted_bytes for client in plan.clients.values())
    assert planned() == plan.server_bytes + sum(by_client)
    assert planned(**{"clients.per_round": 2}) == plan.server_bytes + sum(by_client[1:])
    assert planned(**{"clients.memory_gb": "0.01,0.01,0.01"}) == 0
