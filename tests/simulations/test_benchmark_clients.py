"""Clients at once against one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simulations.benchmarks import clients as module
from simulations.benchmarks import common
from simulations.benchmarks.clients import clients, spread_splits
from simulations.benchmarks.common import Setup


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in their place: importing torch once more takes longer than all the rest."""
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda _, mp_context, **how: ThreadPoolExecutor(1, **how))


def test_two_clients_against_one(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COUNTS", (1, 2)), ("SECONDS", 0.2), ("TURNS", 1)):
        monkeypatch.setattr(module, name, value)
    rows = list(clients(Setup(str(tiny_folder))))
    assert [row["server"] for row in rows] == ["separate", "separate", "joint", "joint"]
    for one, two in (rows[:2], rows[2:]):
        assert (one["clients"], one["splits"], two["clients"], two["splits"]) == (1, "2", 2, "2, 1")
        assert one["total / one"] == one["slowest / fastest"] == 1.0
        assert two["total / one"] == pytest.approx(float(two["tokens_per_s"]) / float(one["tokens_per_s"]))
        assert 0 < float(two["slowest / fastest"]) <= 1


def test_split_points_are_spread_over_the_model() -> None:
    assert spread_splits(32, 8) == [16, 8, 24, 4, 20, 12, 28, 2]
    assert spread_splits(30, 4) == [15, 8, 22, 4]
    assert set(spread_splits(2, 8)) == {1}
    for blocks in (4, 80):
        assert all(1 <= split <= blocks - 1 for split in spread_splits(blocks, 8))
