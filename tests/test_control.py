"""What goes into a message comes out of it."""

from __future__ import annotations

import torch

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.control import Description, Outcome, Task, read_settings, settings_records
from hsplitlora_flwr.lora import AdapterSpec


def test_description() -> None:
    description = Description("2", 40, 10**12, 700_000_000, 77, 0)
    assert Description.from_records(description.to_records()) == description


def test_settings() -> None:
    config = Config.from_run_config({"train.lr": 0.25, "lora.dropout": 0.1})
    assert read_settings(settings_records(config)) == config


def test_task() -> None:
    config = Config.from_run_config({"lora.dropout": 0.25})
    specs = {"model.layers.0.q": AdapterSpec(4, 8.0, 0.25), "model.layers.1.q": AdapterSpec(16, 32.0, 0.25)}
    changes = {"model.layers.0.q:B": torch.randn(4, 2), "model.layers.0.q:A": torch.randn(2, 4)}
    records = Task(config, "1", 3, 2, specs, 24, 12, "127.0.0.1:5", "secret", changes).to_records()
    task = Task.from_records(records)
    assert (task.client, task.round, task.split, task.first_step, task.steps) == ("1", 3, 2, 24, 12)
    assert (task.address, task.token, task.seed) == ("127.0.0.1:5", "secret", "0/3/1")
    assert task.config == config
    assert task.specs == specs
    assert all(torch.equal(task.changes[name], tensor) for name, tensor in changes.items())
    assert not records.array_records["update"], "the message must not hold on to the bytes"


def test_an_empty_task_is_a_probe() -> None:
    task = Task.from_records(Task(Config(), "0", 0, 1, {}, 0, 2, "a:1", "t").to_records())
    assert task.specs == {}
    assert task.changes == {}


def test_outcome() -> None:
    adapters = {"model.layers.0.q": (torch.randn(4, 2), torch.randn(2, 8))}
    outcome = Outcome(adapters, {"model.layers.0.q": 0.5}, [3.0, 2.0], {"seconds": 1.5})
    back = Outcome.from_records(outcome.to_records())
    assert back.importance == outcome.importance
    assert back.losses == outcome.losses
    assert back.metrics == outcome.metrics
    for mine, theirs in zip(back.adapters["model.layers.0.q"], adapters["model.layers.0.q"], strict=True):
        assert torch.equal(mine, theirs)
