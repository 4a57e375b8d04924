"""Runs in one process: the same bits as with nodes one after another, and a process that ends with its run."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor

from hsplitlora_flwr.cli import run_process
from hsplitlora_flwr.cli.in_process import InProcessGrid, run_here
from hsplitlora_flwr.cli.interrupts import Interrupted
from hsplitlora_flwr.cli.launch import launch
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.settings import PROJECT
from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.models.cores import all_cores, limit_cores
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.transport.messages import converse
from tests.grid import LocalGrid

COUNT = 3


def settings(model: Path, folder: Path, **changes: Any) -> Config:
    values = {
        "model.path": str(model),
        "data.eval_rows": 20,
        "data.max_length": 48,
        "data.train_rows": 90,
        "clients.memory_gb": "20.0",
        "clients.process_mb": 500.0,
        "plan.server_process_mb": 500.0,
        "plan.server_memory_gb": 20.0,
        "lora.ranks": "0,2,4",
        "lora.dropout": 0.1,
        "train.rounds": 2,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.lr": 0.02,
        "run.dir": str(folder),
    }
    return Config.from_run_config(values | changes)


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class Listener:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.heard = threading.Event()

    def handle(self, event: Any) -> None:
        self.events.append(event)
        self.heard.set()


@pytest.mark.parametrize("changes", [{"server.half": "per_client"}, {"method.name": "flora"}], ids=str)
def test_threads_end_where_nodes_that_come_one_after_another_do(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    threads = torch.get_num_threads()
    config = settings(tiny_folder, tmp_path / "threads", **changes)
    run_here(config, cores=1)
    alone = settings(tiny_folder, tmp_path / "alone", **changes)
    nodes = {node: {"partition-id": node - 1, "num-partitions": COUNT} for node in range(1, COUNT + 1)}
    text = load_text(alone.data, alone.run.seed)
    HSplitLoRA(alone, text.held_out, tmp_path / "alone").start(LocalGrid(split_client_app(), nodes))
    found, expected = adapter(tmp_path / "threads"), adapter(tmp_path / "alone")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("threads", "alone"))
    assert ours["perplexity_after"] == theirs["perplexity_after"]
    assert ours["plans"] == theirs["plans"]
    assert all_cores() == 1
    limit_cores(0)
    torch.set_num_threads(threads)


def test_a_run_beside_this_process_says_what_it_knows_and_no_more(tiny_folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    launcher = Launcher.from_mapping({"engine": "process", "cpus": 1})
    config = settings(tiny_folder, tmp_path / "run")
    assert launch(config, PROJECT, launcher, listener) == 0, listener.events[-1]
    assert listener.events[-1]["kind"] == "finished"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = [row for round_ in summary["rounds"] for row in round_["clients"]]
    assert len(rows) == 2 * COUNT
    assert all(row["measured_bytes"] == 0 and row["predicted_bytes"] > 0 for row in rows)
    assert all(row["process_bytes"] == 500_000_000 for row in rows)
    assert all(round_["server_measured_bytes"] == 0 for round_ in summary["rounds"])
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert sum(held_out["tokens"]) == summary["held_out_tokens"]


def test_a_run_that_fails_says_why(tiny_folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    launcher = Launcher.from_mapping({"engine": "process", "cpus": 1})
    config = settings(tiny_folder, tmp_path / "run", **{"clients.memory_gb": "0.5001"})
    assert launch(config, PROJECT, launcher, listener) == 1
    assert listener.events[-1]["kind"] == "failed" and "PlanError: no client can hold" in listener.events[-1]["error"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


def test_a_run_that_is_no_longer_wanted_ends_with_its_process(tiny_folder: Path, tmp_path: Path) -> None:
    listener, stopping = Listener(), threading.Event()
    launcher = Launcher.from_mapping({"engine": "process", "cpus": 1})
    config = settings(tiny_folder, tmp_path / "run", **{"train.rounds": 500})

    def run() -> None:
        with pytest.raises(Interrupted):
            launch(config, PROJECT, launcher, listener, stopping=stopping)

    thread = threading.Thread(target=run)
    thread.start()
    assert listener.heard.wait(300)
    stopping.set()
    thread.join(300)
    assert not thread.is_alive() and not multiprocessing.active_children()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_worker_of_joblib_can_start_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There processes are started in a way that those which are started do not know."""
    now = ["loky"]
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: now[0])
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, *, force: now.append(method))
    run_process._context.cache_clear()
    assert run_process._context().get_start_method() == now[-1] == "forkserver"
    now[:] = ["spawn"]
    run_process._context.cache_clear()
    run_process._context()
    assert now == ["spawn"], "who has chosen a way keeps it"


def test_nodes_work_at_the_same_time_and_an_exception_is_its_node_s_error() -> None:
    app, together = ClientApp(), threading.Barrier(COUNT)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        together.wait(300)
        if context.node_id == 2:
            raise ValueError("no such block")
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, {node: {} for node in range(1, COUNT + 1)}) as grid:
        asked = [Message(RecordDict(), node, "train") for node in range(1, COUNT + 1)]
        replies = dict(converse(grid, asked, lambda reply: None, 30.0))
        assert sorted(replies) == [1, 2, 3]
        assert [node for node, reply in replies.items() if reply.has_error()] == [2]
        assert replies[2].error.reason == "ValueError: no such block"
        again = list(grid.send_and_receive(asked))
        assert {reply.metadata.src_node_id for reply in again} == {1, 2, 3}


@pytest.mark.parametrize("values", [{"superlink": "mine"}, {"ray_address": "a:1"}])
def test_a_process_is_no_flower(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"needs launcher\.engine=flower"):
        Launcher.from_mapping({"engine": "process", **values})
    with pytest.raises(ConfigError, match=r"launcher\.engine='threads' is not allowed; choose one of flower, process"):
        Launcher.from_mapping({"engine": "threads"})
