"""A reply that is not what was asked for is refused, with what is wrong about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hsplitlora_flwr.control import Description, Outcome, ReplyError
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.replies import TRAINING, check_evaluation, check_scores, check_training

LAYERS = [Layer(name, block, 8, 4, 0, 0) for name, block in (("0.q", 0), ("0.v", 0), ("1.q", 1))]
PLAN = ClientPlan(1, {"0.q": 2, "1.q": 3}, 0)  # 0.v has no adapter, 1.q is the server's
GOOD = Outcome(
    adapters={"0.q": (torch.ones(4, 2), torch.ones(2, 8))},
    importance={"0.q": 0.5, "0.v": 0.0},
    losses=[2.0],
    metrics=dict.fromkeys(TRAINING, 1.0) | {"nll": 30.0, "label-tokens": 10.0},
    description=Description("1", 40, 10, 7, 77),
)


def test_what_was_asked_for_passes() -> None:
    check_training(GOOD, LAYERS, PLAN)
    check_scores(GOOD, {"0.q", "0.v"})
    check_evaluation(GOOD)


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ({"adapters": {}}, "not those of its plan"),
        ({"adapters": {"0.q": (torch.ones(4, 3), torch.ones(3, 8))}}, "not those of its plan"),
        ({"adapters": GOOD.adapters | {"1.q": (torch.ones(4, 3), torch.ones(3, 8))}}, "not those of its plan"),
        ({"adapters": {"0.q": (torch.ones(4, 2), torch.full((2, 8), torch.inf))}}, "not finite"),
        ({"metrics": {}}, "resident-parameters=nan"),
        ({"metrics": GOOD.metrics | {"bytes-up": -1.0}}, "bytes-up=-1"),
        ({"metrics": GOOD.metrics | {"seconds": 0.0}}, "trained on nothing"),
        ({"losses": []}, "trained on nothing"),
    ],
)
def test_flawed_training(flaw: dict[str, object], says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        check_training(replace(GOOD, **flaw), LAYERS, PLAN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"0.q": 0.5}, "not those of the weights"),
        ({"0.q": 0.5, "0.v": 0.5, "1.q": 9.0}, "not those of the weights"),
        ({"0.q": 0.5, "0.v": float("nan")}, "importance of 0.v is nan"),
        ({"0.q": -0.5, "0.v": 0.5}, "importance of 0.q is -0.5"),
    ],
)
def test_flawed_scores(scores: dict[str, float], says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        check_scores(replace(GOOD, importance=scores), {"0.q", "0.v"})


@pytest.mark.parametrize(
    ("nll", "tokens", "says"),
    [
        (1.0, 0.0, "no perplexity"),
        (8000.0, 10.0, "no perplexity"),
        (float("nan"), 10.0, "nll=nan"),
        (-1.0, 10.0, "nll=-1"),
    ],
)
def test_flawed_evaluation(nll: float, tokens: float, says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        check_evaluation(replace(GOOD, metrics={"nll": nll, "label-tokens": tokens}))


@pytest.mark.parametrize(
    "flaw",
    [{"examples": 0}, {"memory_bytes": -5}, {"longest": "many"}, {"up": float("inf")}, {"held": "[1]"}, {"x": 1}],
)
def test_flawed_description(flaw: dict[str, object]) -> None:
    records = GOOD.description.to_records()
    assert Description.from_records(records) == GOOD.description
    for key, value in flaw.items():
        records.config_records["description"][key] = value  # type: ignore[assignment]
    with pytest.raises(ReplyError, match="description of itself"):
        Description.from_records(records)
