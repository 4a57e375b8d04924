"""What goes into a message comes out of it."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora import AdapterSpec, Change
from hsplitlora_flwr.lora.update import LayerPatch, Patch
from hsplitlora_flwr.messages import (
    PROBE,
    TRAIN,
    Description,
    Outcome,
    Task,
    read_settings,
    settings_records,
    take_patch,
    take_start,
    take_tensors,
    to_arrays,
)
from hsplitlora_flwr.transport.link import Endpoint


def test_description() -> None:
    description = Description("2", 40, 10**12, 700_000_000, 77, {"model.layers.0.q": "1-abc"}, 1, up=2.5)
    assert Description.from_records(description.to_records()) == description


def test_settings() -> None:
    config = Config.from_run_config({"train.lr": 0.25, "lora.dropout": 0.1})
    assert read_settings(settings_records(config)) == config


def test_task() -> None:
    config = Config.from_run_config({"lora.dropout": 0.25})
    specs = {"model.layers.0.q": AdapterSpec(4, 8.0, 0.25), "model.layers.1.q": AdapterSpec(16, 32.0, 0.25)}
    change = Change(factors=(torch.randn(4, 2), torch.randn(2, 4)))
    patch = Patch(2, {"model.layers.0.q": LayerPatch("0", "2-ab", (change,))})
    start = {"model.layers.1.q": (torch.randn(4, 3), torch.randn(3, 4))}
    sent = Task(config, TRAIN, "1", 3, 2, specs, 24, 12, True, patch=patch, start=start, checkpointing=True)
    sent = replace(sent, forward_only=True)
    sent = sent.over_stream(Endpoint("127.0.0.1:5", "PEM", "name"), "secret")
    records = sent.to_records()
    task = Task.from_records(records)
    assert (task.client, task.round, task.split, task.first_step, task.steps) == ("1", 3, 2, 24, 12)
    assert (task.endpoint, task.token, task.seed) == (sent.endpoint, "secret", "0/3/1")
    assert task.config == config
    assert task.spacious
    assert task.specs == specs
    assert (task.checkpointing, task.server_checkpointing, task.forward_only) == (True, False, True)
    assert task.patch == Patch(0, {}) and task.start == {}, "a task lives too long to hold tensors"
    patch, got = take_patch(records), take_start(records)
    [part] = patch.layers.values()
    assert (part.start, part.end, patch.version) == ("0", "2-ab", 2)
    for mine, theirs in zip(part.updates[0].tensors, change.tensors, strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(x, y) for x, y in zip(got["model.layers.1.q"], start["model.layers.1.q"], strict=True))
    assert not records.array_records["update"], "the message must not hold on to the bytes"
    assert not records.array_records["start"]
    assert Task.from_text(config, json.loads(json.dumps(task.to_text()))) == replace(
        sent.without_tensors(), endpoint=Endpoint("", "", ""), token=""
    )


def test_tensors_travel_in_few_packets() -> None:
    tensors = {f"layer.{i}:B": torch.randn(40, 1 + i) for i in range(300)}
    tensors |= {
        "large": torch.randn(1100, 1000),
        "none": torch.zeros(3, 0),
        "double": torch.randn(2, dtype=torch.float64),
    }
    arrays = to_arrays(tensors)
    assert len(arrays) == 4  # 7.2 MB of small ones in two packets, one that is larger than a packet, and the rest
    back = take_tensors(arrays)
    assert not arrays
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    back["large"].zero_()  # memory of its own, that can be written to


def test_an_empty_task_is_a_probe() -> None:
    records = Task(Config(), PROBE, "0", 0, 1, {}, 0, 2).to_records()
    assert Task.from_records(records).specs == {}
    assert (take_patch(records), take_start(records)) == (Patch(0, {}), {})


def test_outcome() -> None:
    adapters = {"model.layers.0.q": (torch.randn(4, 2), torch.randn(2, 8))}
    outcome = Outcome(
        adapters, {"model.layers.0.q": 0.5}, [3.0, 2.0], {"seconds": 1.5}, Description("2", 40, 10, 7, 77)
    )
    back = Outcome.from_records(outcome.to_records())
    assert back.importance == outcome.importance
    assert back.losses == outcome.losses
    assert back.description == outcome.description
    assert back.metrics == outcome.metrics
    for mine, theirs in zip(back.adapters["model.layers.0.q"], adapters["model.layers.0.q"], strict=True):
        assert torch.equal(mine, theirs)
