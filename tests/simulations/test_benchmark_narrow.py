"""The errors of narrow numbers on the wire."""

from __future__ import annotations

from pathlib import Path

from simulations.benchmarks.common import Setup
from simulations.benchmarks.narrow import PLAIN, WIRES, narrow


def test_errors_are_those_of_the_wires(tiny_folder: Path) -> None:
    rows = list(narrow(Setup(str(tiny_folder))))
    assert [row["wire"] for row in rows] == [*WIRES, PLAIN] * len({row["split"] for row in rows})
    relative = {"bfloat16": 2**-9, "float16": 2**-12}  # of a number, at most and about
    for row in rows:
        bound = relative.get(str(row["wire"]), 0.02)
        for error in ("activation", "down"):
            assert 0 < float(row[error]) < bound, row
        assert abs(float(row["loss"])) < 0.01 and 0 < float(row["gradient"]) < 0.5
