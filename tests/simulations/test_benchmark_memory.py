"""A client's memory against the cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.benchmarks.common import Setup
from simulations.benchmarks.memory import memory


def test_memory_measures_a_client_in_a_process_of_its_own(tiny_folder: Path) -> None:
    found = next(memory(Setup(str(tiny_folder))))
    assert (found["split"], found["batch"], found["update"]) == (1, "8 x 64", "none")
    row = {key: float(found[key]) for key in found if key not in ("batch", "update")}
    # Of a tiny model nothing is seen beside the process itself, so all three agree.
    assert row["predicted_mb"] == pytest.approx(row["process_mb"], abs=10)
    assert row["measured_mb"] == pytest.approx(row["predicted_mb"], rel=0.1)
    # embeddings and one block of 32 numbers a token, and what a step of 8 x 64 of them keeps: a few MB
    assert 0.1 < row["unavoidable_mb"] < 20
    own = row["measured_mb"] - row["process_mb"]
    assert row["measured / unavoidable"] == pytest.approx(own / row["unavoidable_mb"])
