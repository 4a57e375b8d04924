"""The page of a run: all that a reader looks for is on it, of a run in any state, and nothing on it is live."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.example import Example
from hsplitlora_flwr.reporting.page import (
    COLOURS,
    MAX_CLIENTS,
    MAX_MAPS,
    bar_chart,
    importance_map,
    line_chart,
    links,
    page,
    rank_map,
    ticks,
    write_page,
)
from hsplitlora_flwr.reporting.report import RunReport

LAYERS = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
RANKS = dict(zip(LAYERS, (2, 4, 8, 8, 8, 8), strict=True))


def plan_row(client: str = "0", **changes: Any) -> dict[str, Any]:
    row = {"client": client, "examples": 12, "budget_bytes": 1_500_000_000, "blocks": 3, "left_out": "", "split": 1}
    return row | {"ranks": RANKS, "checkpointing": "none", "predicted_bytes": 1_400_000_000} | changes


def round_row(client: str, losses: list[float], measured: int) -> dict[str, Any]:
    return {
        "client": client,
        "losses": losses,
        "measured_bytes": measured,
        "predicted_bytes": 1_400_000_000,
        "tokens_per_second": 50.0,
        "bytes_up": 3_000_000,
        "bytes_down": 1_000_000,
        "seconds": 2.0,
    }


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    return RunReport(tmp_path, Config().to_run_config())


def text_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for row in rows]


def test_a_run_stands_on_its_page(report: RunReport, tmp_path: Path) -> None:
    report.evaluated(0, 12.5, 700, 1.0)
    assert "running" in text_of(tmp_path)
    report.planned(1, "", {"objective": 1.0}, [plan_row(), plan_row("1", left_out="misses 5 bytes of memory")])
    report.importance(1, {name: 0.1 * i for i, name in enumerate(LAYERS)}, 0.0)
    for number, (losses, measured, perplexity) in enumerate(
        (([4.0, 3.5], 900_000_000, 9.0), ([3.25, 3.125], 1_100_000_000, 7.25)), 1
    ):
        report.round_finished(
            number, 2.5, 0.75, [round_row("0", losses, measured)], server_measured_bytes=2_000_000_000
        )
        report.evaluated(number, perplexity, 700, 1.0)
    report.generated({"BLEU": 0.5, "METEOR": None})
    report.finished(("adapter/adapter_model.safetensors",), adapter={"folder": "adapter"})

    html, rows = text_of(tmp_path), cells(text_of(tmp_path))
    assert "perplexity 12.50 → 7.25" in html and "of 700 tokens" in html
    assert ["0", "12", "1 of 3", "6.3", "none", "1.50 GB", "1.40 GB", "1.10 GB", "50", "2", "3.125"] in rows
    assert ["1", "12", "left out: misses 5 bytes of memory", "1.50 GB", "1.40 GB", "-", "-", "0", "-"] in rows
    assert ["1", "9.000", "0.75", "1", "2.5 s", "3.0 MB", "1.0 MB", "2.00 GB", "first plan"] in rows
    assert ["2", "7.250", "0.75", "1", "2.5 s", "3.0 MB", "1.0 MB", "2.00 GB", ""] in rows
    assert ["BLEU", "METEOR"] in rows and ["0.5000", "-"] in rows
    assert 'href="adapter/adapter_model.safetensors"' in html and 'href="report.html"' not in html
    assert ["train.lr", str(Config().train.lr)] in rows
    assert not re.search(r"https?://|<script|src=", html), "it needs no network and runs nothing"


def test_texts_before_and_after_and_a_smaller_adapter_stand_on_the_page(report: RunReport, tmp_path: Path) -> None:
    report.evaluated(0, 12.5, 700, 1.0)
    report.answered("before", [Example("Who?", "Ann.")], ["<b>?"])
    report.round_finished(1, 2.5, 0.75, [round_row("0", [4.0, 3.0], 900_000_000)])
    report.evaluated(1, 9.0, 700, 1.5)
    report.answered("after", [Example("Who?", "Ann.")], ["Ann"])
    report.shrunk(4, "adapter-rank-4", 9.25, 0.125)
    report.finished(["adapter/adapter_config.json"])
    html = text_of(tmp_path)
    assert ["Who?", "&lt;b&gt;?", "Ann", "Ann."] in cells(html)
    assert "At rank 4 at most (<code>adapter-rank-4</code>):\nperplexity 9.250" in html
    assert "measured the held-out text for 1.5 s" in html
    for title in ("client 0, up: 3 MB", "client 0, steps: 2 s", "client 0, measured peak: 0.9 GB"):
        assert f"<title>{title}</title>" in html, title


def test_what_lies_beside_a_page_is_linked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text("")
    for name in ("flwr.log", "events.jsonl"):
        (tmp_path / "b" / name).write_text("")
    (tmp_path / "b" / "checkpoints").mkdir()
    assert links(tmp_path / "b") == {
        "logs and checkpoints": ["events.jsonl", "flwr.log", "checkpoints"],
        "runs beside this one": ["../a/report.html"],
    }


def test_a_run_that_failed_says_so_and_shows_what_it_had(report: RunReport, tmp_path: Path) -> None:
    report.failed(MemoryError("no plan for 3 GB"))
    assert "MemoryError: no plan for 3 GB" in text_of(tmp_path)
    assert "<svg" not in text_of(tmp_path), "there is nothing to draw"


def test_what_comes_from_other_machines_is_only_text(report: RunReport, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    report.evaluated(0, 12.5, 700, 1.0)
    report.planned(1, bad, {}, [plan_row(bad, ranks={f"model.layers.0.{bad}": 2})])
    report.round_finished(1, 2.5, 0.75, [round_row(bad, [4.0, 3.0], 9)])
    report.evaluated(1, 9.0, 700, 1.0)
    report.failed(RuntimeError(bad))
    html = text_of(tmp_path)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 5


def test_a_thousand_clients_make_no_page_of_a_thousand_rows(report: RunReport, tmp_path: Path) -> None:
    report.planned(1, "", {}, [plan_row(f"node-{i}") for i in range(1000)])
    report.failed(RuntimeError("stopped"))
    html = text_of(tmp_path)
    assert html.count(">node-") == MAX_CLIENTS
    assert f"and {1000 - MAX_CLIENTS} more, in summary.json" in html
    assert html.count("<h3>client") == MAX_MAPS
    assert len(html) < 200_000


def test_a_page_is_replaced_in_one_piece(tmp_path: Path) -> None:
    summary = {"status": "failed", "started": 0.0, "seconds": 1.0, "config": Config().to_run_config()}
    summary |= {"versions": {}, "rounds": [], "perplexity_before": None, "perplexity_after": None}
    write_page(summary, tmp_path)
    assert text_of(tmp_path) == page(summary, links(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# ---------------------------------------------------------------------- pictures


def drawn(picture: str) -> ET.Element:
    return ET.fromstring(picture.partition("<p class")[0])


def test_points_stand_where_their_values_are() -> None:
    svg = drawn(line_chart({"a": [(0, 10.0), (1, 20.0), (2, 15.0)]}, "round", width=160, height=146))
    [line] = svg.findall("polyline")
    assert line.get("points") == "48.0,112.0 98.0,12.0 148.0,62.0"
    marks = {text.text: (float(text.get("x", 0)), float(text.get("y", 0))) for text in svg.findall("text")}
    assert marks["10"][1] - 4 == 112 and marks["20"][1] - 4 == 12
    assert (marks["0"][0], marks["1"][0], marks["2"][0]) == (48, 98, 148)
    assert line.get("stroke") == COLOURS[0]


def test_axes_have_names_and_every_value_is_under_the_mouse() -> None:
    many = [(float(step), float(step * step)) for step in range(100)]
    svg = drawn(line_chart({"a": many}, "step", "loss, nats a token"))
    assert {"step", "loss, nats a token"} <= {text.text for text in svg.findall("text")}
    values = {str(dot[0].text): dot.get("fill-opacity") for dot in svg.findall("circle")}
    assert len(values) == 100 and values["a, step 7: 49"] == "0"  # found by the mouse, and not seen


def test_bars_are_as_long_as_their_values() -> None:
    rows = {"0": [1.0, 3.0], "1": [2.0, 0.0]}
    below = drawn(bar_chart(rows, ("up", "down"), "MB", width=380))
    assert [float(bar.get("width", 0)) for bar in below.findall("rect")] == [66.7, 200.0, 133.3, 0.0]
    after = drawn(bar_chart(rows, ("up", "down"), "MB", stacked=True, width=380))
    assert [(float(bar.get("x", 0)), float(bar.get("width", 0))) for bar in after.findall("rect")] == [
        *((90.0, 50.0), (140.0, 150.0), (90.0, 100.0), (190.0, 0.0))
    ]
    assert [bar[0].text for bar in after.findall("rect")][1] == "client 0, down: 3 MB"
    assert bar_chart({"0": [0.0]}, ("up",), "MB") == bar_chart({}, ("up",), "MB") == ""


def test_points_that_are_not_finite_are_left_out() -> None:
    assert line_chart({"a": [(0, 1.0), (1, float("nan"))]}, "round") == ""
    svg = drawn(line_chart({"a": [(0, 1.0), (1, float("inf")), (2, 3.0)]}, "round"))
    assert len(svg.findall("circle")) == 2


@pytest.mark.parametrize(
    ("values", "whole", "expected"),
    [
        ((6.1, 15.0), False, [6, 8, 10, 12, 14, 16]),
        ((0, 2), True, [0, 1, 2]),
        ((1, 20), True, [5, 10, 15, 20]),
        ((0, 4000), True, [0, 1000, 2000, 3000, 4000]),
        ((3.5, 3.5), False, [3.0, 3.2, 3.4, 3.6, 3.8, 4.0]),
        ((-0.02, 0.03), False, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_and_span_the_values(values: tuple[float, ...], whole: bool, expected: list[float]) -> None:
    assert ticks(values, whole=whole) == expected


def test_a_map_has_a_column_for_every_block_and_a_line_at_the_cut() -> None:
    svg = drawn(rank_map(plan_row(split=1)))
    squares = {str(rect[0].text): rect for rect in svg.findall("rect")}
    assert squares.keys() == {f"{name}: rank {rank}" for name, rank in RANKS.items()}
    at = {name.split(":")[0]: (float(rect.get("x", 0)), float(rect.get("y", 0))) for name, rect in squares.items()}
    columns = [at[f"model.layers.{block}.mlp.up_proj"][0] for block in range(3)]
    assert columns[1] - columns[0] == columns[2] - columns[1] == 14
    assert at["model.layers.0.mlp.up_proj"][1] < at["model.layers.0.self_attn.q_proj"][1]
    shown = [f"{name}: rank {rank}" for name, rank in list(RANKS.items())[:3]]
    strength = [float(squares[title].get("fill-opacity", 0)) for title in shown]
    assert strength[0] < strength[1] < strength[2] == 1
    [cut] = svg.findall("line")
    assert columns[0] < float(cut.get("x1", 0)) < columns[1]


def test_a_model_that_is_not_cut_has_no_line() -> None:
    assert not drawn(rank_map(plan_row(split=3))).findall("line")


def test_equal_importance_is_not_drawn() -> None:
    assert importance_map({}) == importance_map(dict.fromkeys(LAYERS, 0.1)) == ""
    svg = drawn(importance_map({"h.0.c_attn": 0.25, "h.1.c_attn": 0.5}))
    assert [rect[0].text for rect in svg.findall("rect")] == ["h.0.c_attn: 0.25", "h.1.c_attn: 0.5"]
