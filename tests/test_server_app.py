"""What the Flower ``ServerApp`` leaves behind, whatever ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from hsplitlora_flwr import server_app
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting import EVENTS_FILE, read_events
from hsplitlora_flwr.reporting.report import failed_outside
from hsplitlora_flwr.reporting.summary import STOPPED
from hsplitlora_flwr.server import strategy
from tests.grid import LocalGrid
from tests.server.test_strategy import grid_of, settings

PROCESS = """
import sys, threading
from pathlib import Path
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.server_app import tell_a_stop

running, finished = (RunReport(Path(sys.argv[1]) / name, Config().to_run_config()) for name in ("running", "finished"))
finished.evaluated(0, 9.0, 10, 1.0)
finished.finished([])
tellers = [threading.Thread(target=tell_a_stop, args=(report,), daemon=True) for report in (running, finished)]
for teller in tellers:
    teller.start()
# the run, which Flower lets go on for some seconds
threading.Thread(target=lambda: [teller.join() for teller in tellers]).start()
sys.exit(0)
"""


def context(values: dict[str, Any]) -> Context:
    return Context(1, 0, {}, RecordDict(), values)


def test_a_run_that_flower_stops_says_so(tmp_path: Path) -> None:
    def summary(name: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return said

    subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path)], check=True, timeout=600)
    assert summary("finished")["status"] == "finished"
    assert (summary("running")["status"], summary("running")["error"]) == ("failed", STOPPED)
    failed_outside(tmp_path / "running", "no memory for Ray")
    assert summary("running")["error"] == "no memory for Ray"


def test_a_run_that_cannot_begin_says_why(tmp_path: Path) -> None:
    values = Config().to_run_config() | {"run.dir": str(tmp_path), "train.rounds": 0}
    with pytest.raises(ValueError, match=r"train\.rounds=0"):
        server_app.app(grid_of(), context(values))
    events, _ = read_events(tmp_path / EVENTS_FILE)
    assert [event["kind"] for event in events] == ["failed"]
    assert "train.rounds=0" in events[0]["error"]


def test_a_run_that_fails_while_it_is_set_up_says_why(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> LocalGrid:
        raise MemoryError("no room")

    monkeypatch.setattr(strategy, "Clients", broken)  # after the summary began
    with pytest.raises(MemoryError):
        server_app.app(grid_of(), context(settings(tiny_folder, tmp_path).to_run_config()))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "MemoryError: no room")
