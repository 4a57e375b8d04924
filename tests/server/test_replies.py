"""A reply that is not what was asked for is refused, with what is wrong about it, whatever it is."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora import AdapterSpec
from hsplitlora_flwr.messages import (
    EVALUATE,
    PACKET_TYPE,
    PROBE,
    TRAIN,
    Description,
    Outcome,
    ReplyError,
    Task,
    to_arrays,
)
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.server.replies import TRAINING, read_outcome

LAYERS = [Layer(name, block, 8, 4, 0, 0) for name, block in (("0.q", 0), ("0.v", 0), ("1.q", 1))]
CONFIG = Config.from_run_config({"train.steps": 2, "train.lr": 0.01, "evaluation.client_rows": 3})
# 0.v has no adapter, 1.q is the server's
TASK = Task(CONFIG, TRAIN, "1", 1, 1, {"0.q": AdapterSpec(2, 4.0), "1.q": AdapterSpec(3, 6.0)}, 0, 2)
SCORING, PROBING = replace(TASK, scored_steps=1), replace(TASK, kind=PROBE, specs={}, scored_steps=2)
MEASURING = replace(TASK, kind=EVALUATE, specs={}, steps=0)
ME = Description("1", 40, 10, 7, 77, tokens=100, cut_rows=1, cut_tokens=5)
FIGURES = dict.fromkeys(TRAINING, 1.0)
GOOD = Outcome({"0.q": (torch.full((4, 2), 0.01), torch.full((2, 8), 0.3))}, {}, [2.0, 1.5], FIGURES, ME)
TRAINED = replace(GOOD, importance={"0.q": 0.5})
SCORED = Outcome({}, {"0.q": 0.5, "0.v": 0.0}, [2.0, 1.5], FIGURES, ME)
MEASURED = Outcome({}, {}, [], {"nll": 30.0, "label-tokens": 10.0}, ME)


def read(outcome: Outcome, task: Task) -> Outcome:
    return read_outcome(outcome.to_records(), task, LAYERS)


@pytest.mark.parametrize(
    ("outcome", "task"), [(GOOD, TASK), (TRAINED, SCORING), (SCORED, PROBING), (MEASURED, MEASURING)]
)
def test_what_was_asked_for_passes(outcome: Outcome, task: Task) -> None:
    found = read(outcome, task)
    assert (found.losses, found.importance, found.metrics) == (outcome.losses, outcome.importance, outcome.metrics)
    assert found.description == ME
    for name, pair in outcome.adapters.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.adapters[name], pair, strict=True))


def test_who_computes_forward_alone_scores_nothing() -> None:
    task = replace(PROBING, forward_only=True)
    read(replace(SCORED, importance={}), task)
    with pytest.raises(ReplyError, match="2 scores, and at most 0"):
        read(SCORED, task)


def pair(rank: int = 2, fill: float = 0.01, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, rank), fill, dtype=dtype), torch.full((rank, 8), fill, dtype=dtype)


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ({"adapters": {}}, "not those of its plan"),
        ({"adapters": {"0.q": pair(1)}}, "not those of its plan"),
        ({"adapters": {"0.v": pair()}}, "not those of its plan"),
        ({"adapters": {"0.q": (pair()[0].T.contiguous(), pair()[1])}}, "not those of its plan"),
        ({"adapters": GOOD.adapters | {"1.q": pair(3)}}, "4 arrays|bytes of adapters|not those of its plan"),
        ({"adapters": {"0.q": pair(300)}}, "bytes of adapters"),
        ({"adapters": {"0.q": pair(fill=torch.inf)}}, "not finite"),
        ({"adapters": {"0.q": pair(fill=torch.nan)}}, "not finite"),
        ({"adapters": {"0.q": pair(fill=1, dtype=torch.int32)}}, "torch.int32, and not torch.float32"),
        ({"adapters": {"0.q": pair(dtype=torch.float64)}}, "torch.float64, and not"),
        ({"adapters": {"0.q": pair(dtype=torch.bfloat16)}}, "torch.bfloat16, and not"),
        ({"adapters": {"0.q": pair(fill=1e4)}}, "0.q cannot come from 2 steps of train.lr=0.01: B has a norm"),
        ({"adapters": {"0.q": (pair()[0], pair(fill=1e15)[1])}}, "A has a norm"),
        ({"metrics": {}}, "resident-parameters=nan"),
        ({"metrics": FIGURES | {"bytes-up": -1.0}}, "bytes-up=-1"),
        ({"metrics": FIGURES | {"bytes-up": 1e300}}, r"bytes-up=1e\+300"),
        ({"metrics": FIGURES | {"seconds": 0.0}}, "seconds=0"),
        ({"metrics": FIGURES | {"tokens": 2 * 8 * 128 + 1.0}}, "tokens=2049, which must be from 1 to 2048"),
        ({"metrics": dict.fromkeys(map(str, range(40)), 1.0)}, "40 metrics"),
        ({"losses": []}, "0 losses of 2 steps"),
        ({"losses": [1.0] * 1_000_000}, "1,000,000 losses of 2 steps"),
        ({"losses": [1.0, float("nan")]}, "losses are not finite"),
        ({"importance": {"x": 1.0}}, "1 scores"),
    ],
)
def test_flawed_training(flaw: dict[str, Any], says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        read(replace(GOOD, **flaw), TASK)


def test_what_training_makes_passes_and_ten_times_as_much_does_not() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.AdamW([parameter], lr=CONFIG.train.lr)
    for gradient in (1e-6, 1e6):
        parameter.grad = torch.full((4, 2), gradient)
        optimizer.step()
    a = GOOD.adapters["0.q"][1]
    read(replace(GOOD, adapters={"0.q": (parameter.detach(), a)}), TASK)
    with pytest.raises(ReplyError, match="cannot come from"):
        read(replace(GOOD, adapters={"0.q": (parameter.detach() * 10, a)}), TASK)


def test_an_adapter_that_is_carried_on_is_held_against_where_it_started() -> None:
    large = {"0.q": (torch.full((4, 2), 50.0), torch.full((2, 8), 50.0))}
    assert read_outcome(replace(GOOD, adapters=large).to_records(), TASK, LAYERS, large).adapters
    with pytest.raises(ReplyError, match="cannot come from"):
        read(replace(GOOD, adapters=large), TASK)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"0.q": 0.5}, "not those of the weights"),
        ({"0.q": 0.5, "1.q": 9.0}, "not those of the weights"),
        ({"0.q": 0.5, "0.v": 0.5, "1.q": 9.0}, "3 scores"),
        ({"0.q": 0.5, "0.v": float("nan")}, "importance of 0.v is nan"),
        ({"0.q": 0.5, "0.v": 1e300}, r"importance of 0.v is 1e\+300"),
        ({"0.q": -0.5, "0.v": 0.5}, "importance of 0.q is -0.5"),
    ],
)
def test_flawed_scores(scores: dict[str, float], says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        read(replace(SCORED, importance=scores), PROBING)


def test_training_scores_the_weights_that_it_was_asked_for() -> None:
    for importance in ({}, {"0.v": 0.5}):
        with pytest.raises(ReplyError, match="not those of the weights"):
            read(replace(GOOD, importance=importance), SCORING)
    with pytest.raises(ReplyError, match="1 scores"):
        read(TRAINED, TASK)


@pytest.mark.parametrize(("outcome", "task"), [(SCORED, PROBING), (MEASURED, MEASURING)])
def test_adapters_that_were_not_asked_for(outcome: Outcome, task: Task) -> None:
    with pytest.raises(ReplyError, match="holds adapters, and none were asked for"):
        read(replace(outcome, adapters=GOOD.adapters), task)


@pytest.mark.parametrize(
    ("nll", "tokens", "says"),
    [
        (1.0, 0.0, "no perplexity"),
        (8000.0, 10.0, "no perplexity"),
        (float("nan"), 10.0, "nll=nan"),
        (-1.0, 10.0, "nll=-1"),
        (10.0, 3 * 128 + 1.0, "label-tokens=385, which must be from 0 to 384"),
    ],
)
def test_flawed_evaluation(nll: float, tokens: float, says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        read(replace(MEASURED, metrics={"nll": nll, "label-tokens": tokens}), MEASURING)


def packet(data: bytes, kind: str = PACKET_TYPE) -> ArrayRecord:
    return ArrayRecord({"0": Array("uint8", (len(data),), kind, data)})


HEADER = json.dumps({"0.q:B": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 10**9]}}).encode()
NESTED = b"[" * 3000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapters", packet(b"")),
        ("adapters", packet(b"\0" * 50)),
        ("adapters", packet(b"\xff" * 50)),
        ("adapters", packet(struct.pack("<Q", len(NESTED)) + NESTED)),
        ("adapters", packet(struct.pack("<Q", len(HEADER)) + HEADER)),
        ("adapters", packet(save({"0.q:A": torch.zeros(2, 8)}))),
        ("adapters", packet(save({"0.q:B": torch.zeros(4, 2)}))),
        ("adapters", packet(save({"0.q:B": torch.zeros(4, 2, dtype=torch.uint16), "0.q:A": torch.zeros(2, 8)}))),
        ("adapters", packet(save(dict(zip(("0.q:B", "0.q:A"), GOOD.adapters["0.q"], strict=True))), "numpy.ndarray")),
        ("adapters", packet(b"\0" * 10**7)),
        ("adapters", ConfigRecord()),
        ("adapters", ArrayRecord({str(i): Array("uint8", (0,), PACKET_TYPE, b"") for i in range(10_000)})),
        ("losses", MetricRecord({"losses": 1.0})),
        ("losses", MetricRecord()),
        ("metrics", MetricRecord({"tokens": [1.0] * 100})),
        ("metrics", ArrayRecord()),
        ("description", ConfigRecord()),
        ("description", MetricRecord()),
    ],
)
def test_a_record_that_is_none(name: str, content: Any) -> None:
    records = GOOD.to_records()
    del records[name]
    records[name] = content
    with pytest.raises(ReplyError, match="its "):
        read_outcome(records, TASK, LAYERS)


@pytest.mark.parametrize(
    "flaw",
    [
        {"examples": 0},
        {"examples": 10**15},
        {"examples": True},
        {"examples": 1.5},
        {"memory_bytes": -5},
        {"memory_bytes": 10**18},
        {"process_bytes": -1},
        {"host_bytes": -1},
        {"host_process_bytes": 0.5},
        {"longest": "many"},
        {"longest": 10**12},
        {"version": -1},
        {"flops": 1e-300},
        {"flops": 1e300},
        {"flops": float("nan")},
        {"up": float("inf")},
        {"down": 1e-300},
        {"down": -1.0},
        {"held": "[1]"},
        {"held": "1" * 5000},
        {"held": "[" * 100_000},
        {"held": '{"a": "' + "x" * (4 << 20) + '"}'},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "st\x1b[2Jmary"},
        {"name": "st\u202emary"},
        {"name": "two\nlines"},
        {"name": " mary"},
        {"name": 7},
        {"x": 1},
        {"tokens": 10**18},
        {"cut_rows": -1},
        {"cut_rows": 41},
        {"cut_rows": 3, "cut_tokens": 2},
        {"cut_tokens": 101},
    ],
)
def test_flawed_description(flaw: dict[str, Any]) -> None:
    records = ME.to_records()
    assert Description.from_records(records) == ME
    for key, value in flaw.items():
        records.config_records["description"][key] = value
    with pytest.raises(ReplyError, match="description of itself") as raised:
        Description.from_records(records)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


# ---------------------------------------------------------------------- anything at all

SCALAR = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(), st.binary(max_size=20))
NUMBER = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
NAME = st.one_of(st.sampled_from([*vars(ME), "losses", "0.q", "tokens", "nll", "label-tokens"]), st.text(max_size=5))
RECORD = st.one_of(
    st.builds(ConfigRecord, st.dictionaries(NAME, st.one_of(SCALAR, st.lists(st.floats(), max_size=3)), max_size=5)),
    st.builds(MetricRecord, st.dictionaries(NAME, st.one_of(NUMBER, st.lists(st.floats(), max_size=3)), max_size=5)),
    st.builds(packet, st.binary(max_size=200), st.sampled_from([PACKET_TYPE, "numpy.ndarray"])),
)
TASKS = {TRAIN: (TASK, GOOD), PROBE: (PROBING, SCORED), EVALUATE: (MEASURING, MEASURED)}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(list(TASKS)),
    others=st.dictionaries(st.sampled_from(["adapters", "losses", "metrics", "importance", "description"]), RECORD),
)
def test_whatever_records_hold_there_is_a_typed_error_or_what_was_asked_for(kind: str, others: dict[str, Any]) -> None:
    task, outcome = TASKS[kind]
    records = RecordDict(dict(outcome.to_records()) | others)
    try:
        found = read_outcome(records, task, LAYERS)
    except ReplyError as error:
        assert str(error)
    else:
        assert len(found.losses) == task.steps and set(found.adapters) == set(outcome.adapters)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_bytes_an_adapter_has_there_is_a_typed_error_or_an_adapter_in_reach(data: st.DataObject) -> None:
    [array] = to_arrays(dict(zip(("0.q:B", "0.q:A"), GOOD.adapters["0.q"], strict=True))).values()
    content = bytearray(array.data)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))]
    records = GOOD.to_records()
    records["adapters"] = packet(bytes(content))
    try:
        b, a = read_outcome(records, TASK, LAYERS).adapters["0.q"]
    except ReplyError:
        return
    assert b.shape == (4, 2) and b.norm() < 1 and a.norm() < 10


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*vars(ME), "other"]), SCALAR))
def test_whatever_a_client_says_of_itself_there_is_a_typed_error_or_something_sane(changes: dict[str, Any]) -> None:
    records = ME.to_records()
    records["description"] = ConfigRecord(dict(records.config_records["description"]) | changes)
    try:
        found = Description.from_records(records)
    except ReplyError as error:
        assert str(error).isprintable()
    else:
        assert found.name.isprintable() and 0 < found.examples <= 1e12 and found.budget
