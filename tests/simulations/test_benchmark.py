"""The benchmarks run on a tiny model, and their frame writes what they found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.models.split import IGNORED
from simulations import benchmark
from simulations.benchmark import BENCHMARKS, Row, main, memory, probe, spread_batches


def test_memory_measures_a_client_in_a_process_of_its_own(tiny_folder: Path) -> None:
    row = next(memory(str(tiny_folder)))
    assert row["split"] == 1
    assert row["update"] == "none"
    # Of a tiny model nothing is seen beside the process itself, so all three agree.
    assert row["predicted_mb"] == pytest.approx(row["process_mb"], abs=10)
    assert row["measured_mb"] == pytest.approx(row["predicted_mb"], rel=0.1)


def test_probe_compares_both_sides(tiny_folder: Path) -> None:
    client, server = probe(str(tiny_folder))
    assert (client["side"], client["blocks"], server["side"], server["blocks"]) == ("client", 1, "server", 3)
    for row in (client, server):
        assert float(row["probe_s"]) / float(row["training_s"]) - 1 == pytest.approx(row["extra time"])
        assert float(row["probe_peak_mb"]) > 0


def test_batches_reach_every_part_of_the_vocabulary_and_are_padded() -> None:
    batches = list(islice(spread_batches(2, 16, 1000), benchmark.STEPS))
    used = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
    assert int(used.diff().max()) <= -(-1000 // (2 * 16 * benchmark.STEPS)) + 1
    assert all(batch.attention_mask.sum() == 2 * 16 - 1 and batch.labels[-1, -1] == IGNORED for batch in batches)


def test_figures_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fast(path: str) -> Iterator[Row]:
        yield {"model": path, "seconds": 0.123456, "blocks": 3}

    monkeypatch.setitem(BENCHMARKS, "fast", fast)
    out = tmp_path / "new" / "figures.json"
    assert main(["fast", "--model", "here", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["benchmarks"] == {"fast": [{"model": "here", "seconds": 0.123456, "blocks": 3}]}
    assert written["environment"]["torch"] == version("torch")
    assert {"date", "cpu", "cores", "memory_gb", "python", "transformers"} <= written["environment"].keys()
    assert "0.1235" in capsys.readouterr().out


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["memry"])
    assert stopped.value.code == 2
    assert "memory" in capsys.readouterr().err
