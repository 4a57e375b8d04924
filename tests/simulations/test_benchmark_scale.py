"""Rounds with many clients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from simulations.benchmarks import common
from simulations.benchmarks import scale as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.scale import scale


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in their place: importing torch once more takes longer than all the rest."""
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda _, mp_context, **how: ThreadPoolExecutor(1, **how))


def test_rounds_of_a_small_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIENTS", {3: (2, 3)})
    rows = list(scale(Setup()))
    assert [(row["clients"], row["round"]) for row in rows] == [(2, number) for number in range(1, 4)]
    assert rows[0]["server / round 1"] == 1.0
    for row in rows:
        assert float(row["server_mb"]) > 100
        assert float(row["summary_kb"]) == pytest.approx(float(rows[0]["summary_kb"]), abs=0.3)
        assert float(row["s_per_client"]) > 0
        assert 0 < float(row["server_cpu_s_per_client"]) < float(row["cpu_s_per_client"])
    assert float(rows[0]["cpu_s_per_client / fewest"]) == 1.0
