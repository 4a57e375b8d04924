"""What a client holds while it trains, and what it does not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from hsplitlora_flwr.client import handlers, turn
from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.client.node import LoadData
from hsplitlora_flwr.client.task import ClientTask, SplitEvaluation, SplitTraining, WholeModelTask
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data import Example
from hsplitlora_flwr.messages import DESCRIBE, Description, settings_records, take_patch, take_start
from tests.grid import LocalGrid
from tests.server.test_strategy import grid_of, run, settings

Tensors = list["weakref.ref[torch.Tensor]"]


def alive(tensors: Tensors) -> int:
    gc.collect()
    return sum(each() is not None for each in tensors)


@pytest.mark.parametrize("method", ["hsplitlora", "flora", "fedit"])
def test_what_came_with_a_message_is_gone_while_a_client_trains(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: Tensors = []
    found: list[tuple[int, int]] = []  # tensors that came for a task, and those of them that are still there

    def noted(what: Any, tensors: list[torch.Tensor]) -> Any:
        came.extend(map(weakref.ref, tensors))
        return what

    def patch(records: RecordDict) -> Any:
        came.clear()
        taken = take_patch(records)
        updates = [update for part in taken.layers.values() for update in part.updates]
        return noted(taken, [tensor for update in updates for tensor in update.tensors])

    def start(records: RecordDict) -> Any:
        taken = take_start(records)
        return noted(taken, [tensor for pair in taken.values() for tensor in pair])

    def watch(kind: type[ClientTask], verb: str) -> None:
        original = getattr(kind, verb)

        def counted(self: ClientTask, *arguments: Any) -> Any:
            found.append((len(came), alive(came)))
            came.clear()
            return original(self, *arguments)

        monkeypatch.setattr(kind, verb, counted)

    monkeypatch.setattr(turn, "take_patch", patch)
    monkeypatch.setattr(turn, "take_start", start)
    watch(SplitTraining, "work")
    watch(SplitEvaluation, "work")
    watch(WholeModelTask, "take_turn")
    one_at_a_time = {"clients.count": 1, "clients.memory_gb": "20.0", "plan.probe_every": 0}
    run(settings(tiny_folder, tmp_path, **{"method.name": method, **one_at_a_time}), tmp_path, grid_of({0: 20.0}))
    assert found[-1][0] > 0, "the last round brings what the rounds before it changed"
    assert [left for _, left in found] == [0] * len(found)


def test_the_text_of_a_client_is_a_part_of_its_process(tiny_folder: Path, tmp_path: Path) -> None:
    held: list[torch.Tensor] = []

    def load_large(context: Context, config: Config) -> Sequence[Example]:
        held.append(torch.ones(25 << 20))  # 100 MiB
        return handlers.load_own_text(context, config)

    def process_of(load_data: LoadData) -> int:
        grid = grid_of({0: 20.0})
        ask = Message(settings_records(settings(tiny_folder, tmp_path)), 10, DESCRIBE)
        reply = LocalGrid(split_client_app(load_data), grid.node_configs).answer(ask)
        return Description.from_records(reply.content).process_bytes

    process_of(handlers.load_own_text)  # brings code in
    plain = process_of(handlers.load_own_text)
    assert process_of(load_large) - plain > 80 << 20


@pytest.mark.parametrize(
    ("changes", "node", "named"),
    [
        ({}, {}, ""),
        ({"split.clip": 3.0}, {}, "clip 3"),
        ({"split.clip": 3.0}, {"cut-noise": 0.5}, "clip 3, noise 0.5"),
        ({"split.clip": 3.0, "split.noise": 0.1}, {"cut-clip": 2.0, "cut-noise": 1}, "clip 2, noise 1"),
        ({"split.clip": 3.0, "method.name": "fedit"}, {}, ""),
    ],
)
def test_a_node_may_ask_for_more_noise_than_the_run(
    changes: dict[str, Any], node: dict[str, Any], named: str, tiny_folder: Path, tmp_path: Path
) -> None:
    grid = grid_of({0: 20.0})
    grid.node_configs[10] |= node
    reply = grid.answer(Message(settings_records(settings(tiny_folder, tmp_path, **changes)), 10, DESCRIBE))
    assert Description.from_records(reply.content).cut_transform == named


def test_noise_without_a_clip_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of({0: 20.0})
    grid.node_configs[10]["cut-noise"] = 0.5
    reply = grid.answer(Message(settings_records(settings(tiny_folder, tmp_path)), 10, DESCRIBE))
    assert reply.has_error() and "split.noise=0.5 needs split.clip" in reply.error.reason
