"""Aggregation against a dense sum and against PEFT: the same result, and figures that add up."""

from __future__ import annotations

import pytest
import torch

from simulations.benchmarks import aggregate as module
from simulations.benchmarks.aggregate import PeftBlock, add_dense, aggregate, aggregated, extra_bytes, make_client
from simulations.benchmarks.common import Setup

SHAPES = {"q_proj": (64, 48), "down_proj": (48, 160)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("BLOCKS", 2),
        ("NARROW", 2),
        ("SHAPES", SHAPES),
        ("CLIENTS", (2, 3)),
        ("RANKS", (2, 4, 8)),
        ("TURNS", 1),
    ):
        monkeypatch.setattr(module, name, value)


def test_all_sides_compute_the_same() -> None:
    clients, shares = [make_client(index) for index in range(3)], [0.5, 0.3, 0.2]
    weights = {f"0.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    add_dense(weights, clients, shares)
    ours, peft = aggregated(clients, shares).changes(), PeftBlock(clients)
    merged = peft.change(shares)
    assert peft.seconds(shares) > 0
    for name in weights:
        each = [client[name] for client in clients]
        assert [b.shape[1] for b, _ in each] == [2, 4, 8]
        exact = sum(share * b.double() @ a.double() for share, (b, a) in zip(shares, each, strict=True))
        for found in (weights[name], ours[name].dense(), merged[name], peft.change(shares)[name]):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_memory_besides_the_change() -> None:
    extra, kept = extra_bytes(3)
    ranks, sizes = 1 + 2 + 4, sum(rows + columns for rows, columns in SHAPES.values())
    assert kept == 4 * 2 * ranks * sizes / 2  # of two blocks, half as wide
    assert 0 < extra < kept / 2  # what a layer takes while it is computed: what comes out of it is the change


def test_rows() -> None:
    rows = list(aggregate(Setup()))
    assert [(row["clients"], row["ranks"]) for row in rows] == [(2, 6), (3, 14)]
    for row in rows:
        for side in ("dense", "peft"):
            assert row[f"{side} / ours"] == pytest.approx(float(row[f"{side}_s"]) / float(row["ours_s"]))
        assert float(row["extra / layer"]) * 4 * 48 * 160 == pytest.approx(float(row["extra_mb"]) * 1e6)
