"""A plan holds until what it was made for moved, and then says what that was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.planning import Budget, PlanError
from hsplitlora_flwr.planning.round import Size
from hsplitlora_flwr.server.checkpoint import RunState
from hsplitlora_flwr.server.plans import RoundPlanner

BUDGETS = {"ada": Budget(10**10), "bob": Budget(2 * 10**10)}
SIZES = {"ada": Size(20), "bob": Size(30)}
SHARES = {"ada": 0.5, "bob": 0.5}


@pytest.fixture
def config(tiny_folder: Path) -> Config:
    return Config.from_run_config({"model.path": str(tiny_folder), "lora.ranks": "0,2", "plan.drift": 0.2})


@pytest.fixture
def planner(config: Config) -> RoundPlanner:
    """With a plan in force, made of importance that leans to no weight."""
    made = RoundPlanner(config, SIZES, process_bytes=0)
    assert made.probe_due and made.why_replan(BUDGETS) == "" and made.drift == 0
    made.take_scores(1, [1.0], [{layer.name: 1.0 for layer in made.layers}])
    made.replan(BUDGETS, SHARES, Budget(10**11))
    assert made.plans.keys() == BUDGETS.keys() and not made.probe_due
    return made


def test_a_plan_holds_while_nothing_moves(planner: RoundPlanner) -> None:
    assert planner.why_replan(BUDGETS) is None
    measured_anew = {name: replace(budget, process_bytes=7) for name, budget in BUDGETS.items()}
    assert planner.why_replan(measured_anew) is None, "what a process takes is no budget"
    planner.fit(dict(SIZES))
    assert planner.why_replan(BUDGETS) is None


def test_what_moved_is_why_it_is_made_anew(planner: RoundPlanner) -> None:
    assert planner.why_replan({"ada": BUDGETS["ada"]}) == "other clients take part"
    assert planner.why_replan(BUDGETS | {"bob": Budget(10**10)}) == "budgets changed"
    planner.fit({"ada": Size(20), "bob": Size(90)})
    assert planner.why_replan(BUDGETS) == "the size of examples or of what is sent changed"
    planner.replan(BUDGETS, SHARES, Budget(10**11))
    assert planner.why_replan(BUDGETS) is None
    first, *others = [layer.name for layer in planner.layers]
    planner.importance = {first: 1.0} | dict.fromkeys(others, 0.0)
    # the distance of one weight from all of them alike
    assert planner.drift == pytest.approx(1 - 1 / (1 + len(others)))
    assert planner.why_replan(BUDGETS) == f"importance moved by {planner.drift:.3f}, more than plan.drift=0.2"


def test_a_weight_that_was_not_scored_stands_to_the_others_as_before(config: Config, planner: RoundPlanner) -> None:
    """Of two clients that score two weights each, one in common; every other weight has no score at all."""
    one, two, three, *others = [layer.name for layer in planner.layers]
    before = {one: 0.1, two: 0.2, three: 0.3} | dict.fromkeys(others, 0.4 / len(others))
    planner.importance, rounds = dict(before), config.train.rounds
    planner.take_scores(2, [0.25, 0.75], [{one: 6.0, two: 3.0}, {two: 3.0, three: 2.0}])
    # what is known of the two scored weights sums to 0.3 and 0.5, their scores to 9 and 5: 30 and 10 times as much
    mean = {one: 0.25 * 6 + 0.75 * 10 * 0.1, two: 3.0, three: 0.25 * 30 * 0.3 + 0.75 * 2}
    mean |= {name: (0.25 * 30 + 0.75 * 10) * before[name] for name in others}
    measured = {name: value / sum(mean.values()) for name, value in mean.items()}
    g = {name: 1 - math.exp(-measured[name] / (before[name] * rounds)) for name in before}
    raw = {name: g[name] * before[name] + (1 - g[name]) * measured[name] for name in before}
    assert planner.importance == pytest.approx({name: value / sum(raw.values()) for name, value in raw.items()})


def test_what_an_earlier_run_left_holds_for_the_same_settings(config: Config, planner: RoundPlanner) -> None:
    state = RunState(
        3,
        config.to_run_config(),
        AccumulatedUpdate(),
        importance=planner.importance,
        planned_importance=planner.planned_importance,
        plans=planner.plans,
        planned_budgets=planner.planned_budgets,
    )
    assert RoundPlanner(config, SIZES, 0, state).why_replan(BUDGETS) is None
    other = replace(config, lora=replace(config.lora, ranks=(0, 4)))
    resumed = RoundPlanner(other, SIZES, 0, state)
    assert resumed.why_replan(BUDGETS) == "" and resumed.importance == planner.importance


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"model.device": "cuda:0", "plan.server_gpu_memory_gb": 40, "plan.server_memory_gb": 4}, Budget(40 * 10**9)),
        ({"model.device": "cuda:0", "plan.server_memory_gb": 4}, Budget(4 * 10**9)),
        ({"model.device": "cpu", "plan.server_memory_gb": 4}, Budget(4 * 10**9, 10**9)),
    ],
)
def test_the_server_s_process_counts_where_its_half_lies(
    changes: dict[str, Any], budget: Budget, config: Config
) -> None:
    of_run = Config.from_run_config(config.to_run_config() | changes)
    assert RoundPlanner(of_run, SIZES, process_bytes=10**9).server_budget() == budget


def test_a_server_process_that_the_machine_does_not_hold_is_told(config: Config) -> None:
    changes = {"model.device": "cuda:0", "plan.server_gpu_memory_gb": 40, "plan.server_memory_gb": 0.5}
    planner = RoundPlanner(Config.from_run_config(config.to_run_config() | changes), SIZES, process_bytes=10**9)
    with pytest.raises(PlanError, match=r"takes 1,000,000,000 bytes by itself, and plan.server_memory_gb=0.5 lets it"):
        planner.server_budget()
