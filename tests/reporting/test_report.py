"""What a run says of its end, whatever stands in the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting import EVENTS_FILE, read_events
from hsplitlora_flwr.reporting.report import RunReport, cause_of, failed_outside
from hsplitlora_flwr.reporting.summary import read_summary

OPEN = Path.open


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    return RunReport(tmp_path / "run", Config().to_run_config())


def summary(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    return content


def last_event(tmp_path: Path) -> dict[str, Any]:
    return read_events(tmp_path / "run" / EVENTS_FILE)[0][-1]


def full_disk(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
    if mode == "w":
        raise OSError(28, "No space left on device")
    return OPEN(path, mode, *arguments, **settings)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_a_failure_is_told_everywhere(report: RunReport, tmp_path: Path) -> None:
    report.failed(ValueError("no plan"))
    assert (summary(tmp_path)["status"], summary(tmp_path)["error"]) == ("failed", "ValueError: no plan")
    assert last_event(tmp_path)["error"] == "ValueError: no plan"
    assert "ValueError: no plan" in (tmp_path / "run" / "report.html").read_text()


def test_a_full_disk_hides_no_failure(report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full_disk)
    report.failed(ValueError("no plan"))
    assert summary(tmp_path)["status"] == "failed"
    assert last_event(tmp_path)["error"] == "ValueError: no plan"


def test_a_folder_that_is_gone_hides_no_failure(report: RunReport, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    report.failed(ValueError("no plan"))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("bad", [object(), {(1, 2): 3}])
def test_what_cannot_be_written_hides_no_failure(report: RunReport, tmp_path: Path, bad: object) -> None:
    report._summary.content["texts"] = bad
    report.failed(ValueError("no plan"))
    assert (summary(tmp_path)["status"], summary(tmp_path)["error"]) == ("failed", "ValueError: no plan")
    assert last_event(tmp_path)["kind"] == "failed"


def test_a_cause_is_a_few_lines_whatever_the_error() -> None:
    assert cause_of(ValueError("no plan")) == "ValueError: no plan"
    assert cause_of(ValueError()) == "ValueError"
    assert cause_of(Mute()) == "Mute"
    assert cause_of(SystemExit(143)) == "the run was told to stop (SystemExit)"
    assert len(cause_of(ValueError("x" * 10**6))) < 2_100


def test_the_summary_of_a_killed_run_is_closed_from_outside(report: RunReport, tmp_path: Path) -> None:
    report.evaluated(0, 9.0, 10, 1.0)
    failed_outside(tmp_path / "run", "its process was killed")
    assert (summary(tmp_path)["status"], summary(tmp_path)["error"]) == ("failed", "its process was killed")
    assert summary(tmp_path)["perplexity_before"] == 9.0
    assert last_event(tmp_path)["error"] == "its process was killed"
    assert "its process was killed" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("text", ['{"status": "finished"}', "{", "[]", '{"status": "running", "started": "then"}'])
def test_what_is_no_summary_of_a_running_run_stays_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    failed_outside(tmp_path, "killed")
    assert (tmp_path / "summary.json").read_text() == text
    failed_outside(tmp_path / "nowhere" / "at all", "killed")


def row(*names: str) -> list[dict[str, Any]]:
    figures = {"measured_bytes": 1, "tokens_per_second": 1.0, "bytes_up": 1, "bytes_down": 1, "losses": [1.0]}
    return [{"client": name, **figures} for name in names]


def test_a_run_that_lost_clients_says_so_at_the_end(report: RunReport, tmp_path: Path) -> None:
    report.evaluated(0, 9.0, 10, 1.0)
    report.client_failed(1, "2", "its worker process died")
    report.round_finished(1, 1.0, 0.5, row("0", "1"), known_clients=3)
    report.evaluated(1, 8.0, 10, 1.0)
    report.finished([])
    assert summary(tmp_path)["failures"] == [{"round": 1, "client": "2", "error": "its worker process died"}]
    assert (last_event(tmp_path)["clients"], last_event(tmp_path)["known_clients"]) == (2, 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 of 3" in page and "its worker process died" in page


def plan(*names: str, blocks: int = 4) -> list[dict[str, Any]]:
    ranks = {f"layers.{block}.q": 2 for block in range(blocks)}
    client = {"split": 2, "blocks": blocks, "left_out": "", "checkpointing": "none", "examples": 3, "budget_bytes": 9}
    return [{"client": name, "ranks": ranks, "predicted_bytes": 8, **client} for name in names]


def take_rounds(report: RunReport, count: int) -> Iterator[int]:
    """With other clients and a new plan in every one."""
    report.evaluated(0, 9.0, 10, 1.0)
    for number in range(1, count + 1):
        names = [str(number), str(number + 1)]
        report.planned(number, "other clients take part", {"objective": 1.0}, plan(*names))
        report.importance(number, {"layers.0.q": 0.5, "layers.1.q": 0.5}, 0.1)
        report.client_failed(number, names[1], "it is gone")
        report.round_finished(number, 1.0, 0.5, row(names[0]), known_clients=2)
        report.evaluated(number, 9.0 - number / 100, 10, 1.0)
        report.evaluated_clients(number, 8.0, {names[0]: 8.0})
        yield number


def check_tables(content: dict[str, Any], count: int) -> None:
    numbers = list(range(1, count + 1))
    assert [each["round"] for each in content["rounds"]] == numbers
    assert [each["perplexity"] for each in content["rounds"]] == [9.0 - number / 100 for number in numbers]
    assert all(each["client_perplexity"] and each["clients"] for each in content["rounds"])
    assert [(each["round"], each["clients"]) for each in content["plans"]] == [
        (number, plan(str(number), str(number + 1))) for number in numbers
    ]
    assert [each["round"] for each in content["importance_drift"]] == numbers
    assert [each["round"] for each in content["failures"]] == numbers


def test_a_round_costs_as_much_however_many_there_were(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = list[float]()
    monkeypatch.setattr("hsplitlora_flwr.reporting.report.write_page", lambda content, folder: pages.append(content))
    run, sizes, held = tmp_path / "run", dict[int, int](), dict[int, int]()
    for number in take_rounds(report, 40):
        sizes[number] = (run / "summary.json").stat().st_size
        held[number] = sum(bool(each["clients"]) for each in report.content["plans"])
    assert max(sizes.values()) - min(sizes.values()) < 20 and set(held.values()) == {1}
    check_tables(read_summary(run), 40)
    report.finished([])
    assert "journal" not in summary(tmp_path) and not (run / "rounds.jsonl").exists()
    check_tables(summary(tmp_path), 40)
    report.failed(ValueError("after its end"))
    check_tables(summary(tmp_path), 40)


def test_a_killed_run_keeps_its_rounds_and_another_takes_them_over(report: RunReport, tmp_path: Path) -> None:
    assert list(take_rounds(report, 3))
    with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
        file.write('{"table": "rounds", "row": {"rou')  # it was killed as it wrote
    resumed = RunReport(tmp_path / "next", {})
    resumed.resumed(tmp_path / "run", 2)
    assert [each["round"] for each in read_summary(tmp_path / "next")["plans"]] == [1, 2]
    failed_outside(tmp_path / "run", "its process was killed")
    assert summary(tmp_path)["status"] == "failed" and "journal" not in summary(tmp_path)
    check_tables(summary(tmp_path), 3)
    assert "its process was killed" in (tmp_path / "run" / "report.html").read_text()


def test_a_warning_is_told_at_once_and_stays_in_the_summary(tmp_path: Path) -> None:
    report = RunReport(tmp_path / "run", {})
    report.warning("long rows")
    report.warning("open port")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == ["long rows", "open port"]
    events, _ = read_events(tmp_path / "run" / EVENTS_FILE)
    assert [event["text"] for event in events] == ["warning: long rows", "warning: open port"]
