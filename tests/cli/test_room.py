"""Jobs of a sweep share a machine's memory: one waits until what it takes is there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from hsplitlora_flwr.cli import room
from hsplitlora_flwr.cli.room import Room


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_AGAIN_SECONDS", 0.01)


def test_as_many_run_side_by_side_as_there_is_memory_for(tmp_path: Path) -> None:
    told: list[str] = []
    with ExitStack() as others:
        for _ in range(2):
            others.enter_context(Room(tmp_path, 10 * 10**9).taken(4 * 10**9, told.append))
        assert not told, "both fit"
        waits, begins = threading.Event(), threading.Event()

        def third() -> None:
            def tell(text: str) -> None:
                told.append(text)
                waits.set()

            with Room(tmp_path, 10 * 10**9).taken(3 * 10**9, tell):
                begins.set()

        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(third)
            assert waits.wait(30) and not begins.is_set()
            others.close()
            done.result(30)
    assert begins.is_set()
    assert told == ["waits for memory: 3.00 GB planned, 8.00 GB of 10.00 GB taken"]
    assert not list(tmp_path.glob("*.job"))


def test_a_job_that_is_too_large_runs_alone(tmp_path: Path) -> None:
    told: list[str] = []
    with Room(tmp_path, 10**9).taken(2 * 10**9, told.append):
        assert Room(tmp_path, 10**9)._take(1) is None
    assert told == ["it is planned to take 2.00 GB of the 1.00 GB there are: alone"]


def test_a_process_that_has_ended_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "0a1b-10.job").touch()
    with Room(tmp_path, 10).taken(10, pytest.fail):
        assert len(list(tmp_path.glob("*.job"))) == 1
