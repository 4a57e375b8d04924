"""The cores that a process may use, and not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hsplitlora_flwr.models import cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("6400000 100000", 3), ("max 100000", 3), (None, 3)],
)
def test_a_container_has_its_own(
    quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.max"
    if quota:
        path.write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_QUOTA", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores.all_cores() == expected


def test_where_a_process_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_QUOTA", Path("absent"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.all_cores() == 1
