"""The frame of the benchmarks: sides in turn, processes apart, batches, and what is shown and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.models.parts import IGNORED
from simulations.benchmark import ALONE, BENCHMARKS, OWN_SHAPES, main
from simulations.benchmarks.common import STEPS, Apart, Row, Sample, Setup, spread_batches, take_turns


def test_sides_take_turns_and_the_first_turn_only_warms_up() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    first, second = take_turns([lambda: side("a"), lambda: side("b")], turns=2)
    assert "".join(order) == "abbaab"
    assert (first.values, second.values) == ([4.0, 5.0], [3.0, 6.0])


def test_quotients_are_those_of_the_turns() -> None:
    slow, fast = Sample([2.0, 9.0, 40.0, 8.0, 50.0]), Sample([1.0, 3.0, 10.0, 8.0, 10.0])
    ratio = slow / fast
    assert ratio.values == [2.0, 3.0, 4.0, 1.0, 5.0]
    assert (ratio.median, ratio.spread) == (3.0, 4.0 - 2.0)
    assert slow.median / fast.median != ratio.median
    assert Sample([7.0]).spread == 0
    with pytest.raises(ValueError, match="zip"):
        Sample([1.0]) / slow


def test_an_object_lives_in_a_process_apart() -> None:
    with Apart(os.getpid) as apart:
        pid = apart.call("__int__")
        assert pid != os.getpid()
        assert apart.start("__add__", 1).result() == pid + 1
        with pytest.raises(AttributeError, match="nothing"):
            apart.call("nothing")


def test_batches_reach_every_part_of_the_vocabulary_and_are_padded() -> None:
    batches = list(islice(spread_batches(2, 16, 1000), STEPS))
    used = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
    assert int(used.diff().max()) <= -(-1000 // (2 * 16 * STEPS)) + 1
    assert all(batch.attention_mask.sum() == 2 * 16 - 1 and batch.labels[-1, -1] == IGNORED for batch in batches)


def fast(setup: Setup) -> Iterator[Row]:
    yield {"model": setup.model, "seconds": 0.123456, "blocks": 3}


def test_figures_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BENCHMARKS, "fast", fast)
    out = tmp_path / "new" / "figures.json"
    assert main(["fast", "--model", "here", "--data", "there", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["model"], written["data"]) == ("here", "there")
    assert written["benchmarks"] == {"fast": [{"model": "here", "seconds": 0.123456, "blocks": 3}]}
    assert written["environment"]["torch"] == version("torch")
    assert {"date", "cpu", "cores", "load_5_min", "memory_gb", "python", "peft"} <= written["environment"].keys()
    shown = capsys.readouterr().out
    assert "0.1235" in shown
    assert f"torch {version('torch')}" in shown


def test_a_benchmark_with_a_model_of_its_own_names_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALONE, "soak", fast)
    monkeypatch.setitem(BENCHMARKS, "fast", fast)
    for names, model in ((["soak"], "of its own"), (["soak", "fast"], Setup.model)):
        assert main([*names, "--out", str(tmp_path / "figures.json")]) == 0
        assert json.loads((tmp_path / "figures.json").read_text())["model"] == model
    assert set(OWN_SHAPES) <= (BENCHMARKS | ALONE).keys()


def test_without_a_name_all_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    def note(setup: Setup) -> Iterator[Row]:
        called.append(setup)
        yield from fast(setup)

    for name in BENCHMARKS:
        monkeypatch.setitem(BENCHMARKS, name, note)
    assert main([]) == 0
    assert called == [Setup()] * len(BENCHMARKS)


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["memory", "memry"])
    assert stopped.value.code == 2
    assert "no benchmark is called memry; choose from memory, frozen, step" in capsys.readouterr().err
