"""The jobs of a sweep: known by their settings, kept, gone on with or done anew, and counted."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hsplitlora_flwr.cli import run
from hsplitlora_flwr.cli.jobs import EARLIER, Job, Place, SweepCallback, do, failed_jobs, sweep_folder, swept
from hsplitlora_flwr.cli.room import Room
from hsplitlora_flwr.comparison.points import JOB_FILE, read_points
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting import Listener
from hsplitlora_flwr.server import checkpoint
from tests.comparison.test_points import run_folder


def config(lr: float) -> Config:
    base = Config()
    return dataclasses.replace(base, train=dataclasses.replace(base.train, lr=lr))


def finishes(settled: Config, console: Listener) -> int:
    folder = Path(settled.run.dir)
    run_folder(folder, "made", perplexity=settled.train.lr)
    for each in (folder / "made").iterdir():
        each.rename(folder / each.name)
    return 0


def fails(settled: Config, console: Listener) -> int:
    (Path(settled.run.dir) / "checkpoints" / "round-1").mkdir(parents=True)
    summary = {"status": "failed", "error": "no memory", "config": {}, "rounds": [], "started": 0.0}
    (Path(settled.run.dir) / "summary.json").write_text(json.dumps(summary))
    return 1


def cannot_begin(settled: Config, console: Listener) -> int:
    raise ValueError("data.path is not there")


def never(settled: Config, console: Listener) -> int:
    raise AssertionError("a finished job is not to be done again")


def place(sweep: Path, number: int, lr: float) -> Place:
    return Place(sweep, number, [f"train.lr={lr}"], beside=False)


def test_a_finished_job_is_known_by_its_settings_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert do(place(tmp_path, 0, 3.0), config(3.0), "", finishes) == 3.0
    assert do(place(tmp_path, 1, 4.0), config(4.0), "", finishes) == 4.0
    capsys.readouterr()
    assert do(place(tmp_path, 0, 4.0), config(4.0), "", never) == 4.0, "its number is another in another command"
    assert "job 1: train.lr=4.0: finished before, perplexity: 4.000" in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0", "1"]


def test_other_settings_get_a_folder_of_their_own(tmp_path: Path) -> None:
    do(place(tmp_path, 0, 3.0), config(3.0), "", finishes)
    assert do(place(tmp_path, 0, 5.0), config(5.0), "", finishes) == 5.0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0", "1"]


def test_a_folder_that_is_not_empty_is_nobody_elses_to_take(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine.txt").write_text("keep")
    assert Job.claim(tmp_path, 0, [], config(1.0)).folder == tmp_path / "1"
    assert (tmp_path / "0" / "mine.txt").read_text() == "keep"


def test_a_job_without_a_finished_round_starts_anew(tmp_path: Path) -> None:
    assert math.isnan(do(place(tmp_path, 0, 1.0), config(1.0), "", cannot_begin))
    assert json.loads((tmp_path / "0" / JOB_FILE).read_text())["error"] == "data.path is not there"
    (tmp_path / "0" / "events.jsonl").write_text("half")

    def looks(settled: Config, console: Listener) -> int:
        assert not settled.run.resume
        assert [each.name for each in Path(settled.run.dir).iterdir()] == [JOB_FILE]
        return finishes(settled, console)

    assert do(place(tmp_path, 0, 1.0), config(1.0), "", looks) == 1.0
    assert json.loads((tmp_path / "0" / JOB_FILE).read_text())["error"] == ""


@pytest.mark.parametrize("possible", [True, False])
def test_a_job_with_a_finished_round_goes_on_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, possible: bool
) -> None:
    checked = []

    def check(config: Config, folder: Path) -> None:
        checked.append(config.run.resume)
        if not possible:
            raise ValueError("a file is damaged")

    monkeypatch.setattr(checkpoint, "check_resume", check)
    do(place(tmp_path, 0, 1.0), config(1.0), "", fails)
    seen = []

    def looks(then: Callable[[Config, Listener], int]) -> Callable[[Config, Listener], int]:
        def start(settled: Config, console: Listener) -> int:
            seen.append(settled.run.resume)
            return then(settled, console)

        return start

    earlier = tmp_path / "0" / EARLIER

    def is_killed(settled: Config, console: Listener) -> int:
        (Path(settled.run.dir) / "events.jsonl").touch()
        return 1

    do(place(tmp_path, 0, 1.0), config(1.0), "", looks(is_killed))
    do(place(tmp_path, 0, 1.0), config(1.0), "", looks(finishes))
    assert checked == [str(earlier)] * (2 if possible else 1), "what was done before a second failure is still there"
    assert seen == ([str(earlier)] * 2 if possible else ["", ""])
    assert not earlier.exists()


def test_why_a_run_failed_that_left_no_summary_is_known(tmp_path: Path) -> None:
    def is_interrupted(settled: Config, console: Listener) -> int:
        console.handle({"kind": "failed", "error": "interrupted by SIGINT"})
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        do(place(tmp_path, 0, 1.0), config(1.0), "", is_interrupted)
    [point] = read_points(tmp_path)
    assert (point.status, point.cause) == ("failed", "interrupted by SIGINT")


def test_settings_that_are_wrong_are_a_failed_job_in_the_same_folder(tmp_path: Path) -> None:
    for _ in range(2):
        assert math.isnan(do(place(tmp_path, 0, -1.0), None, "train.lr=-1 is out of range", never))
    [folder] = tmp_path.iterdir()
    assert "out of range" in (folder / JOB_FILE).read_text()


def test_a_job_beside_others_writes_its_lines_to_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tells(settled: Config, console: Listener) -> int:
        console.handle({"kind": "status", "text": "waiting for 3 clients"})
        return finishes(settled, console)

    do(dataclasses.replace(place(tmp_path, 0, 1.0), beside=True), config(1.0), "", tells)
    assert "waiting for 3 clients" in (tmp_path / "0" / "console.log").read_text()
    assert capsys.readouterr().out.splitlines()[0] == "job 1: train.lr=1.0"


def test_what_is_swept_and_how_many_jobs_that_makes() -> None:
    assert swept(["train.lr=1,2,3", "method=ffa", "clients.memory_gb=[1,2],[3]"]) == (
        ["train.lr", "clients.memory_gb"],
        6,
    )
    assert swept(["train.lr=interval(0.1,1)"]) == (["train.lr"], 0)
    assert swept(["train.lr=range(1,4)"]) == (["train.lr"], 3)


def test_a_sweep_that_names_no_folder_gets_the_same_one_every_time() -> None:
    typed = ["-m", "train.lr=1,2", "clients.memory_gb=[1,2],[3]"]
    assert sweep_folder(typed)[-1] == "run.dir=runs/sweep-lr+memory_gb"
    for single in (["train.lr=1"], [*typed, "run.dir=here"], ["-m", "+sweep=budgets"]):
        assert sweep_folder(single) == single


def test_a_sweep_through_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finishes, one fails, one has wrong settings."""
    done = []

    def start(settled: Config, launcher: run.Launcher, console: Listener, place: Place) -> int:
        done.append(settled.train.lr)
        return (fails if settled.train.lr == 2.0 else finishes)(settled, console)

    monkeypatch.setattr(run, "_start", start)
    monkeypatch.setattr(run, "_statuses", [])
    monkeypatch.setattr(SweepCallback, "folder", None)
    monkeypatch.setattr(run, "interruptible", lambda: None)
    monkeypatch.setenv("HSPLITLORA_SWEEP", "{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "-m", "train.lr=1,2,-3", "train.rounds=1"])
    with pytest.raises(SystemExit) as exit_:
        run.command()
    assert exit_.value.code == 2, "as many jobs failed"
    assert done == [1.0, 2.0]
    sweep = tmp_path / "runs" / "sweep-lr"
    assert failed_jobs(sweep) == 2
    assert "3 runs: 1 finished, 2 failed" in (sweep / "sweep.html").read_text()
    assert (sweep / "sweep.csv").read_text().count("\n") == 4


def test_a_job_that_waits_for_memory_says_so_under_its_headline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = place(tmp_path, 0, 1.0)
    with alone.room_for(10**9):
        pass
    assert not capsys.readouterr().out, "nobody is beside it"
    with dataclasses.replace(alone, room=Room(tmp_path / "room", 10**8)).room_for(10**9):
        pass
    assert capsys.readouterr().out == (
        "job 1: train.lr=1.0: it is planned to take 1.00 GB of the 0.10 GB there are: alone\n"
    )
