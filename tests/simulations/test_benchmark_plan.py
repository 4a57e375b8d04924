"""Plans for a large model."""

from __future__ import annotations

import pytest

from hsplitlora_flwr.models.families import tiny_config
from simulations.benchmarks import plan as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.plan import all_different, of_three_sizes, plan


def test_planners_with_and_without_a_scarce_server(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        ("MODEL", tiny_config(module.MODEL, 4)),
        ("PROCESS_BYTES", 1000),
        ("CLIENTS", {4: module.CASES}),
        ("TURNS", 1),
        ("SERVER_SHARE", 0.97),
    )
    for name, value in small:
        monkeypatch.setattr(module, name, value)
    rows = list(plan(Setup()))
    kinds = [(server, planner) for server in ("not stated", "scarce") for planner in ("exact", "greedy")]
    assert [(row["budgets"], row["server"], row["planner"]) for row in rows] == [
        (budgets, *kind) for budgets in ("3 sizes", "all different") for kind in kinds
    ]
    for row in rows:
        assert row["clients"] == 4
        assert row["left out"] == 0
        assert 0 < float(row["plan_s"]) < 100
        assert 0.5 < float(row["objective / bound"]) <= 1 + 1e-9
    for free, scarce in ((rows[0], rows[2:4]), (rows[4], rows[6:])):
        assert all(float(row["server_gb"]) <= module.SERVER_SHARE * float(free["server_gb"]) for row in scarce)


def test_budgets() -> None:
    assert [of_three_sizes(client, 4) for client in range(4)] == [24 * 10**9, 40 * 10**9, 80 * 10**9, 24 * 10**9]
    for count in module.CLIENTS:
        memory = [all_different(client, count) for client in range(count)]
        assert len(set(memory)) == count
        assert 24e9 == min(memory) < max(memory) < 80e9
