"""Runs side by side: axes, figures, the front that no other run beats, and the page that shows them."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.comparison.page import points_page, write_points
from hsplitlora_flwr.comparison.points import (
    ADAPTER_WEIGHTS,
    JOB_FILE,
    QUALITY,
    Point,
    axes_of,
    number_of,
    pareto_front,
    read_points,
    typed_axes,
)


def client(measured: int) -> dict[str, Any]:
    sizes = {"measured_bytes": measured, "predicted_bytes": 800, "budget_bytes": 1000}
    return {"tokens": 10, "bytes_up": 100, "bytes_down": 50, "trainable_parameters": 5, **sizes}


def run_folder(
    parent: Path, name: str, perplexity: float = 3.0, *, typed: list[str] | None = None, **more: Any
) -> Path:
    """A finished run of two rounds and two clients, unless ``more`` of its summary says otherwise."""
    folder = parent / name
    folder.mkdir(parents=True)
    rounds = [{"perplexity": value, "clients": [client(700), client(900)]} for value in (5.0, perplexity)]
    summary = {
        **{"status": "finished", "config": {"train.lr": 0.1, "run.dir": name}, "rounds": rounds, "seconds": 7.0},
        **{"versions": {}, "perplexity_before": 9.0, "started": 0.0, **more},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "report.html").touch()
    (folder / ADAPTER_WEIGHTS).parent.mkdir()
    (folder / ADAPTER_WEIGHTS).write_bytes(b"x" * 1234)
    if typed is not None:
        (folder / JOB_FILE).write_text(json.dumps({"overrides": typed, "settings": {}, "error": ""}))
    return folder


def test_a_finished_run_has_its_figures(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", 3.5)
    [point] = read_points(tmp_path)
    expected = {QUALITY: 3.5, "peak_bytes": 900, "traffic": 2 * 2 * 150, "seconds": 7.0, "adapter_bytes": 1234}
    assert point.figures == expected
    assert (point.status, point.page, point.measured) == ("finished", "a/report.html", True)


def test_where_no_client_measures_its_memory_the_planned_one_stands_for_it(tmp_path: Path) -> None:
    rounds = [{"perplexity": 2.0, "clients": [client(0)]}]
    run_folder(tmp_path, "a", rounds=rounds)
    [point] = read_points(tmp_path)
    assert (point.figures["peak_bytes"], point.measured) == (800, False)


def test_runs_that_did_not_finish_have_a_state_and_a_cause(tmp_path: Path) -> None:
    run_folder(tmp_path, "0", status="failed", error="no memory")
    run_folder(tmp_path, "1", status="running")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / JOB_FILE).write_text(json.dumps({"overrides": [], "settings": None, "error": "lr=-1 is wrong"}))
    (tmp_path / "logs").mkdir()
    found = read_points(tmp_path)
    assert [(point.status, point.cause) for point in found] == [
        ("failed", "no memory"),
        ("running", ""),
        ("failed", "lr=-1 is wrong"),
    ]
    assert not any(point.figures for point in found)


def test_jobs_come_by_number_and_differ_in_what_was_typed(tmp_path: Path) -> None:
    for number, rate in ((10, "0.3"), (2, "0.2"), (1, "0.1")):
        run_folder(tmp_path, str(number), typed=["method=hsplitlora", f"train.lr={rate}", "sweep=rates"])
    points = read_points(tmp_path)
    assert [point.name for point in points] == ["1", "2", "10"]
    assert axes_of(points) == ["train.lr"]
    assert [point.axes["train.lr"] for point in points] == ["0.1", "0.2", "0.3"]


def test_runs_that_no_sweep_started_differ_in_their_settings(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config={"train.lr": 0.1, "lora.rank": 8, "run.dir": "a"})
    run_folder(tmp_path, "b", config={"train.lr": 0.2, "lora.rank": 8, "run.dir": "b"}, typed=["method=ffa"])
    assert axes_of(read_points(tmp_path)) == ["train.lr"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.5", 0.5), ("[1,2,6]", 3.0), ("1e-3", 1e-3), ("splitlora", None), ("", None), (None, None), ("nan", None)],
)
def test_a_value_has_a_place_on_an_axis_if_it_is_made_of_numbers(text: str | None, number: float | None) -> None:
    assert number_of(text) == number


def test_how_a_sweep_was_named_and_quotes_are_no_part_of_what_was_typed() -> None:
    assert typed_axes(["+sweep=budgets", "data.path='a,b'", "run.dir=x"]) == {"data.path": "a,b"}


def test_the_front_is_every_run_that_no_other_dominates() -> None:
    rng = random.Random(0)
    for _ in range(50):
        pairs = [(rng.randint(0, 5), rng.randint(1, 6)) for _ in range(8)]
        points = [Point(str(i), {}, "finished", {"seconds": x, QUALITY: y}) for i, (x, y) in enumerate(pairs)]
        dominated = {
            str(i) for i, (x, y) in enumerate(pairs) if any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs)
        }
        front = pareto_front(points, "seconds")
        assert {point.name for point in front} == {point.name for point in points} - dominated
        assert [point.figures["seconds"] for point in front] == sorted(point.figures["seconds"] for point in front)


def test_a_run_that_diverged_is_on_no_front_and_has_no_perplexity(tmp_path: Path) -> None:
    run_folder(tmp_path, "0", float("nan"), typed=["train.lr=9"])
    run_folder(tmp_path, "1", 2.0, typed=["train.lr=1"])
    points = read_points(tmp_path)
    assert QUALITY not in points[0].figures
    assert [point.name for point in pareto_front(points, "seconds")] == ["1"]
    assert "lowest perplexity 2.000" in points_page(points, "t")


def test_the_page_has_a_link_for_every_point_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    for number, rate in enumerate(("0.1", "0.2", "0.4")):
        run_folder(tmp_path, str(number), 3.0 - number, typed=[f"train.lr={rate}", f"method=m{number % 2}"])
    run_folder(tmp_path, "3", typed=["train.lr=<b>", "method=m1"], status="failed", error="<script>")
    points = read_points(tmp_path)
    write_points(points, tmp_path, "sweep", "Sweep: x")
    text = (tmp_path / "sweep.html").read_text()
    assert "4 runs: 3 finished, 1 failed" in text
    costs, axes, figures = 4, 2, 5
    for point in points[:3]:
        assert text.count(f'<a href="{point.page}">') == 1 + costs + axes * figures
    assert "<script>" not in text
    assert "<b>" not in text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert text.count("Pareto front</title>") == 0, "the last is the best and costs no more: its front is itself"
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["train.lr"] for row in rows] == ["0.1", "0.2", "0.4", "<b>"]
    assert [row["pareto_front"] != "" for row in rows] == [False, False, True, False]
    assert rows[0]["adapter_bytes"] == "1234"


def test_the_front_of_a_trade_is_drawn(tmp_path: Path) -> None:
    for number in range(3):
        run_folder(tmp_path, str(number), 3.0 - number, typed=[f"train.lr={number}"], seconds=float(1 + number))
    assert points_page(read_points(tmp_path), "t").count("Pareto front</title>") == 1
