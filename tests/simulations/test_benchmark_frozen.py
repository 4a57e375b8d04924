"""What a client costs with and without adapters."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from simulations.benchmarks.common import Setup
from simulations.benchmarks.frozen import frozen


def test_both_forms_of_a_client_are_measured(tiny_folder: Path) -> None:
    trains, frozen_one = islice(frozen(Setup(str(tiny_folder))), 2)
    assert (trains["split"], trains["adapters"]) == (frozen_one["split"], "rank 8")
    assert frozen_one["adapters"] == "none"
    activation = 8 * 64 * 32 * 4 / 1e3
    for row in (trains, frozen_one):
        assert activation < float(row["up_kb"]) < 1.5 * activation
        assert float(row["cpu_seconds"]) > 0
    assert float(trains["down_kb"]) > activation > 50 * float(frozen_one["down_kb"])
    assert frozen_one["update_kb"] == 0 < float(trains["update_kb"])
    assert float(frozen_one["gflop"]) < float(trains["gflop"]) / 2
