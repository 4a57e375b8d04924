"""Scoring against training, on either side."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.benchmarks import probe as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.probe import probe


def test_probe_compares_both_sides(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURNS", 1)
    client, server = probe(Setup(str(tiny_folder)))
    assert (client["side"], client["blocks"], server["side"], server["blocks"]) == ("client", 1, "server", 3)
    for row in (client, server):
        # of a single turn, the quotient of the medians is the median of the quotients
        assert float(row["probe_s"]) / float(row["training_s"]) - 1 == pytest.approx(row["extra time"])
        assert float(row["probe_peak_mb"]) > 0
