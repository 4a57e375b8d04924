"""Whole runs over each transport and cut: the same adapters, whatever carries frames and whoever holds the labels."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hsplitlora_flwr.client import task as task_module
from hsplitlora_flwr.messages import DESCRIBE, EVALUATE, FORGET, PROBE, TRAIN, TURN
from hsplitlora_flwr.models.parts import ClientModel, ModelPart
from hsplitlora_flwr.planning import Plan
from hsplitlora_flwr.planning import round as round_module
from hsplitlora_flwr.planning.round import make_round_plan
from hsplitlora_flwr.server import plans, shard
from hsplitlora_flwr.training.client import ClientTrainer, TrainingRecord, train_client
from hsplitlora_flwr.training.multi_adapter import MultiAdapterPass
from hsplitlora_flwr.training.server import MicroBatch
from hsplitlora_flwr.transport.frames import Activation
from hsplitlora_flwr.transport.stream import client as client_end
from tests.grid import LocalGrid
from tests.server.test_strategy import DOUBLE, GB, grid_of, run, settings
from tests.transport.relay import Relay

STEPS, ROUNDS = 3, 2
SAME = {"lora.dropout": 0.1, "server.order": "fixed", **DOUBLE}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The exported update as dense matrices by layer."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {n: tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.linalg.norm(found[name] - matrix) <= 1e-4 * torch.linalg.norm(matrix), name


@pytest.fixture(scope="module")
def over_stream(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stream")
    summary, grid = same_run(tiny_folder, folder)
    assert not [m for m in grid.sent if m.metadata.message_type == TURN]
    return {"adapter": adapter(folder), "summary": summary}


def same_run(tiny_folder: Path, tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], LocalGrid]:
    """Three clients at the same time, whose steps take turns."""
    grid = grid_of()
    with pytest.MonkeyPatch.context() as patch:
        train_at_once(grid, patch)
        patch.setattr(shard, "all_cores", lambda: 1)  # all share MKL's threads
        summary = run(settings(tiny_folder, tmp_path, **SAME | changes), tmp_path, grid)
    return summary, grid


def test_computing_activations_again_gives_the_same_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    same_plan = {"method.name": "hsplitlora-no-armsc", "split.point": 2, "train.rounds": 1}
    same_run(tiny_folder, tmp_path / "kept", **same_plan)
    same_run(tiny_folder, tmp_path / "again", **same_plan | {"train.activation_checkpointing": "on"})
    assert_same(adapter(tmp_path / "again"), adapter(tmp_path / "kept"))


def test_each_side_computes_again_what_its_plan_says(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[ModuleType, list[ModelPart]] = {task_module: [], shard: []}

    def planned(*arguments: Any, **own: Any) -> Plan:
        plan = make_round_plan(*arguments, **own)
        clients = {
            name: replace(client, checkpointing=name == "1", server_checkpointing=name != "0")
            for name, client in plan.clients.items()
        }
        return replace(plan, clients=clients)

    monkeypatch.setattr(plans, "make_round_plan", planned)
    for module, seen in parts.items():
        monkeypatch.setattr(module, "checkpoint_blocks", seen.append)
    same_plan = {"method.name": "hsplitlora-no-armsc", "split.point": 2, "train.rounds": 1}
    summary, _ = same_run(tiny_folder, tmp_path, **same_plan)
    rows = {row["client"]: row["checkpointing"] for row in summary["rounds"][-1]["clients"]}
    assert rows == {str(i): ("none", "both", "server")[min(i, 2)] for i in range(len(GB))}
    assert len(parts[task_module]) == 1 and isinstance(parts[task_module][0], ClientModel)
    assert len(parts[shard]) == len(GB) - 1


def train_at_once(grid: LocalGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nodes train at the same time, each in a thread; whatever else they do is one after another."""
    turn = Lock()  # loading a model changes torch for all threads

    def in_turn(message: Message) -> Message:
        with turn:
            return grid.answer(message)

    def train(*arguments: Any) -> TrainingRecord:
        turn.release()
        try:
            return train_client(*arguments)
        finally:
            turn.acquire()

    monkeypatch.setattr(grid, "beside", in_turn)
    monkeypatch.setattr(task_module, "train_client", train)


def test_clients_that_share_passes_end_where_single_ones_do(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"server.half": "per_client"}
    single, _ = same_run(tiny_folder, tmp_path / "single", **own)
    sizes: list[int] = []
    enter, together, gate = MultiAdapterPass.__call__, MultiAdapterPass.differentiate, Barrier(len(GB))

    def all_at_once(self: MultiAdapterPass, work: MicroBatch) -> float:
        gate.wait(600)  # else a fast machine may be done with one before the next comes
        return enter(self, work)

    def counted(self: MultiAdapterPass, works: Sequence[MicroBatch]) -> list[float]:
        sizes.append(len(works))
        return together(self, works)

    monkeypatch.setattr(MultiAdapterPass, "__call__", all_at_once)
    monkeypatch.setattr(MultiAdapterPass, "differentiate", counted)
    summary, _ = same_run(tiny_folder, tmp_path / "joint", **own | {"train.multi_adapter_batching": "on"})
    assert max(sizes, default=0) > 1
    assert_same(adapter(tmp_path / "joint"), adapter(tmp_path / "single"))
    assert summary["perplexity_after"] == pytest.approx(single["perplexity_after"], rel=1e-5)


def test_steps_take_turns_in_the_same_order_whoever_is_slow(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_stream: dict[str, Any]
) -> None:
    begin, chance = ClientTrainer.begin, random.Random(0)

    def slowly(self: ClientTrainer) -> int:
        time.sleep(0.05 * chance.random())
        return begin(self)

    monkeypatch.setattr(ClientTrainer, "begin", slowly)
    summary, _ = same_run(tiny_folder, tmp_path)
    found, expected = adapter(tmp_path), over_stream["adapter"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["steps_of_failed"] for row in summary["rounds"]] == [{}] * ROUNDS


def test_connections_that_break_change_no_bit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_stream: dict[str, Any]
) -> None:
    forward, dice = ClientTrainer.forward, random.Random(0)

    def cut_off(self: ClientTrainer, index: int) -> Activation:
        frame = forward(self, index)
        if dice.random() < 0.4:
            relay.cut()
        return frame

    monkeypatch.setattr(ClientTrainer, "forward", cut_off)
    with Relay(port := free_port()) as relay:
        way = {"transport.port": port, "transport.public_port": relay.port, "transport.address": "127.0.0.1"}
        same_run(tiny_folder, tmp_path, **way)
        assert relay.connections > 2 * ROUNDS * len(GB)
    found, expected = adapter(tmp_path), over_stream["adapter"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_client_that_fails_leaves_its_steps_and_the_summary_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ClientTrainer.begin

    def fails(self: ClientTrainer) -> int:
        if self.global_step == STEPS - 1 and self.batches in doomed:
            raise RuntimeError("out of memory")
        return begin(self)

    doomed: list[Any] = []
    make = ClientTrainer.__init__

    def noted(self: ClientTrainer, *arguments: Any, **more: Any) -> None:
        make(self, *arguments, **more)
        if len(doomed) < 1 and self.optimizer.tensors():  # of the first client that trains
            doomed.append(self.batches)

    monkeypatch.setattr(ClientTrainer, "__init__", noted)
    monkeypatch.setattr(ClientTrainer, "begin", fails)
    summary, _ = same_run(tiny_folder, tmp_path, **{"train.rounds": 1})
    [row] = summary["rounds"]
    assert len(row["clients"]) == len(GB) - 1
    [(client, steps)] = row["steps_of_failed"].items()
    assert steps == STEPS - 1 and client not in {one["client"] for one in row["clients"]}
    assert summary["perplexity_after"] < summary["perplexity_before"]


def test_a_run_ends_in_the_same_bits_whoever_trains_beside_whom(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(tiny_folder, wide)
    config = LlamaConfig.from_pretrained(tiny_folder, intermediate_size=1024, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(wide)
    # torch shares a sum of more than 2**15 numbers among its threads
    same_plan = {"method.name": "hsplitlora-no-armsc", "split.point": 1, "lora.rank": 40, "train.rounds": 1}
    same_plan["server.half"] = "per_client"
    monkeypatch.setattr(shard, "all_cores", lambda: 4)
    monkeypatch.setattr(round_module, "all_cores", lambda: 4)
    ends = []
    for order in ("one after another", "at once"):
        grid = grid_of()

        def alone(message: Message, grid: LocalGrid = grid) -> Message:
            torch.set_num_threads(1)  # of this thread: a node has its own process, and shares no threads with others
            return LocalGrid.answer(grid, message)

        monkeypatch.setattr(grid, "answer", alone)
        with monkeypatch.context() as patch:
            if order != "one after another":
                train_at_once(grid, patch)
            run(settings(wide, tmp_path / order, **same_plan), tmp_path / order, grid)
        ends.append(load_file(tmp_path / order / "adapter" / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def turns(grid: LocalGrid) -> int:
    return sum(message.metadata.message_type == TURN for message in grid.sent)


def test_messages_give_the_adapters_of_the_stream(
    tiny_folder: Path, tmp_path: Path, over_stream: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(shard, "open_stream")  # messages alone need no port
    summary, grid = same_run(tiny_folder, tmp_path, **{"transport.kind": "messages"})
    assert_same(adapter(tmp_path), over_stream["adapter"])
    # one message a step: the first frames come with the reply to the task, the last answer needs no reply
    assert turns(grid) == len(GB) * (ROUNDS * STEPS + 2)  # and the two batches of the probe
    for mine, theirs in zip(summary["rounds"], over_stream["summary"]["rounds"], strict=True):
        for client, twin in zip(mine["clients"], theirs["clients"], strict=True):
            assert client["losses"] == pytest.approx(twin["losses"], rel=1e-4)
            assert client["bytes_up"] == pytest.approx(twin["bytes_up"], rel=0.01)
            assert client["bytes_down"] == pytest.approx(twin["bytes_down"], rel=0.01)
    # nothing of the run stays on a node
    assert grid.sent[-1].metadata.message_type == FORGET
    assert not list(Path(grid.disk).rglob("*.safetensors"))
    assert all(not context.state for context in grid.contexts.values())


def test_the_pointer_in_the_context_is_small(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    sizes: list[int] = []
    original = grid.push_messages

    def watching(messages: Any) -> Any:
        sizes.extend(
            len(json.dumps(dict(c.state.config_records.get("hsplitlora", {})))) for c in grid.contexts.values()
        )
        return original(messages)

    grid.push_messages = watching  # type: ignore[method-assign]
    run(settings(tiny_folder, tmp_path, **{"transport.kind": "messages", "train.rounds": 1}), tmp_path, grid)
    assert 0 < max(sizes) < 1000


def test_auto_goes_on_over_messages_where_no_stream_opens(
    tiny_folder: Path, tmp_path: Path, over_stream: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound and not listening: whoever connects is refused
        taken.bind(("127.0.0.1", 0))
        closed = taken.getsockname()[1]
        monkeypatch.setattr(client_end, "CONNECT_SECONDS", 0.5)
        unreachable = {"transport.kind": "auto", "transport.bind": "127.0.0.1", "transport.public_port": closed}
        _, grid = same_run(tiny_folder, tmp_path, **unreachable)
        assert turns(grid) == len(GB) * (ROUNDS * STEPS + 2)
        assert_same(adapter(tmp_path), over_stream["adapter"])


def test_without_auto_a_client_that_cannot_connect_says_what_it_tried(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = taken.getsockname()[1]
        monkeypatch.setattr(client_end, "CONNECT_SECONDS", 0.5)
        changes = {"transport.address": "127.0.0.1", "transport.public_port": closed}
        with pytest.raises(Exception, match=f"no client is left: clients 0, 1, 2 failed: .*127.0.0.1:{closed}"):
            same_run(tiny_folder, tmp_path, **changes)


def test_without_tls_the_run_is_the_same_and_warns(
    tiny_folder: Path, tmp_path: Path, over_stream: dict[str, Any]
) -> None:
    same_run(tiny_folder, tmp_path, **{"transport.tls": False})
    assert_same(adapter(tmp_path), over_stream["adapter"])
    assert "warning: transport.tls=false" in (tmp_path / "events.jsonl").read_text()


def test_a_node_may_keep_the_model_elsewhere(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    shutil.copytree(tiny_folder, tmp_path / "model")
    for config in grid.node_configs.values():
        config["model-path"] = str(tmp_path / "model")
    grid.node_configs[12]["model-path"] = str(tmp_path / "nowhere")
    summary = run(settings(tiny_folder, tmp_path, **{"train.rounds": 1}), tmp_path, grid)
    assert [client["client"] for client in summary["rounds"][0]["clients"]] == ["0", "1"]
    failures = [e for e in map(json.loads, (tmp_path / "events.jsonl").open()) if e["kind"] == "client_failed"]
    assert [failure["round"] for failure in failures] == [0, 1], "before training, and for the first round"
    for failure in failures:
        assert failure["client"] == "12" and f"model.path={tmp_path / 'nowhere'}" in failure["error"]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_clients_that_train_nothing_over_stream_and_messages(labels: str, tiny_folder: Path, tmp_path: Path) -> None:
    """The same adapters and losses, and no gradient on the way down; hidden states come where the labels stay."""
    changes: dict[str, Any] = {"lora.clients": "none", "split.labels": labels, "train.micro_batch_size": 2}
    rounds = {}
    for kind in ("stream", "messages"):
        summary, grid = same_run(tiny_folder, tmp_path / kind, **changes | {"transport.kind": kind, "train.rounds": 1})
        rounds[kind] = summary["rounds"][0]["clients"]
        assert bool([m for m in grid.sent if m.metadata.message_type == TURN]) == (kind == "messages")
    assert_same(adapter(tmp_path / "messages"), adapter(tmp_path / "stream"))
    for one, other in zip(*rounds.values(), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-9) and len(one["losses"]) == STEPS
        frames = 2 * (STEPS + 2) + 2  # micro-batches of steps and probe, and the ends of both
        for row in (one, other):
            assert not row["trains"]
            assert row["bytes_up"] > 8 * 32 * row["tokens"], "activations in float64"
            if labels == "server":
                assert row["bytes_down"] < 200 * frames, "a loss each"


@pytest.mark.parametrize("kind", ["stream", "messages"])
def test_labels_may_stay_with_the_client(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    same_plan = {"method.name": "hsplitlora-no-armsc", "split.point": 2, "train.rounds": 1, "lora.dropout": 0.1}
    changes: dict[str, Any] = {"split.labels": "client", "transport.kind": kind}
    if kind == "stream":
        changes |= {"train.micro_batch_size": 2, "transport.in_flight": 2}
    summary, _ = same_run(tiny_folder, tmp_path, **changes | same_plan)
    expected = {"train.micro_batch_size": changes.get("train.micro_batch_size", 0)}  # its masks are by micro-batch
    same_run(tiny_folder, tmp_path / "server", **same_plan | expected)
    assert_same(adapter(tmp_path), adapter(tmp_path / "server"))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    head = 0 if base.config.tie_word_embeddings else base.lm_head.weight.numel()
    block = sum(p.numel() for p in base.model.layers[0].parameters())
    for client in summary["rounds"][0]["clients"]:
        rest = client["resident_parameters"] - client["split"] * block - base.model.embed_tokens.weight.numel()
        assert rest == head + base.model.norm.weight.numel()


@pytest.mark.parametrize(("kind", "labels"), [("stream", "server"), ("messages", "client")])
def test_clients_measure_their_own_text(kind: str, labels: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"evaluation.client_rows": 5, "transport.kind": kind, "split.labels": labels, "train.rounds": 1}
    summary, _ = same_run(tiny_folder, tmp_path, **changes)
    found = summary["rounds"][0]["client_perplexity"]
    assert found.keys() == {"all", "0", "1", "2"}
    each = [value for name, value in found.items() if name != "all"]
    assert min(each) < found["all"] < max(each)
    assert all(math.isfinite(value) and value < summary["perplexity_before"] * 2 for value in each)
    examples = [client["examples"] for client in summary["plans"][0]["clients"]]
    assert sum(examples) == 90 - 5 * len(GB)


def test_a_client_gets_every_task_once_and_rounds_after_the_first_measure_the_importance_as_they_train(
    tiny_folder: Path, tmp_path: Path
) -> None:
    found = {}
    for transport in ("stream", "messages"):
        changes = {"evaluation.client_rows": 5, "train.rounds": 3, "transport.kind": transport}
        summary, grid = same_run(tiny_folder, tmp_path / transport, **changes)
        kinds = [message.metadata.message_type for message in grid.sent]
        assert [kinds.count(kind) for kind in (DESCRIBE, PROBE, TRAIN, EVALUATE)] == [3, 3, 9, 9]
        drifts = [row["drift"] for row in summary["importance_drift"]]
        assert [drift > 0 for drift in drifts] == [False, False, True], "the second round is measured for the third"
        found[transport] = summary["importance"]
    assert found["messages"] == pytest.approx(found["stream"], rel=1e-9)


def test_a_method_without_a_cut_measures_clients_too(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"evaluation.client_rows": 5, "train.rounds": 1}
    split, _ = same_run(
        tiny_folder, tmp_path / "a", **changes | {"method.name": "hsplitlora", "lora.rank": 4, "train.lr": 1e-9}
    )
    whole, _ = same_run(tiny_folder, tmp_path / "b", **changes | {"method.name": "flora", "train.lr": 1e-9})
    for name, value in split["rounds"][0]["client_perplexity"].items():
        assert whole["rounds"][0]["client_perplexity"][name] == pytest.approx(value, rel=1e-4)


def test_narrow_wires_cost_fewer_bytes_and_little_else(tiny_folder: Path, tmp_path: Path) -> None:
    gained, frame_bytes = {}, {}
    for wire in ("float64", "bfloat16", "int8"):
        narrow = {"transport.up": wire, "transport.down": wire, "train.lr": 0.005}
        summary, _ = same_run(tiny_folder, tmp_path / wire, **narrow)
        gained[wire] = math.log(summary["perplexity_before"] / summary["perplexity_after"])
        frame_bytes[wire] = sum(c["frame_bytes_per_token"] for c in summary["rounds"][0]["clients"])
    assert gained["bfloat16"] == pytest.approx(gained["float64"], rel=0.03)
    assert gained["int8"] == pytest.approx(gained["float64"], rel=0.1)
    assert frame_bytes["int8"] < 0.9 * frame_bytes["bfloat16"] < 0.5 * frame_bytes["float64"]


def test_a_node_gets_only_what_it_lacks_and_a_damaged_store_is_replaced(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.rounds": 3, "plan.probe_every": 0, "server.order": "fixed"}
    config, grid = settings(tiny_folder, tmp_path, **changes), grid_of()
    original = grid.push_messages
    sent: list[tuple[str, int, int]] = []

    def watching(messages: Any) -> Any:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                version = json.loads(message.content.config_records["patch"]["states"])
                whole = sum(start == "0" for start, _, _ in version.values())
                sent.append((message.content.config_records["task"]["client"], len(version), whole))
            if message.metadata.message_type == "train" and len(sent) == 7:
                damaged = next(Path(grid.disk).rglob("11/delta.safetensors"))
                damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        return original(messages)

    grid.push_messages = watching  # type: ignore[method-assign]
    train_at_once(grid, monkeypatch)
    summary = run(config, tmp_path, grid)
    assert [p["round"] for p in summary["plans"]] == [1]  # so nobody needs layers that are new to it
    first, second, third = sent[:3], sent[3:6], sent[6:]
    assert all(layers == 0 for _, layers, _ in first)
    assert all(layers == whole > 0 for _, layers, whole in second)
    # the whole change where that has fewer bytes than what came since, and everywhere for the store that was damaged
    assert [(client, whole == layers) for client, layers, whole in third] == [
        ("0", False),
        ("1", False),
        ("2", False),
        ("1", True),
    ]
    assert len(summary["rounds"][2]["clients"]) == 3
    again = grid_of()
    train_at_once(again, monkeypatch)
    exact = run(config, tmp_path / "again", again)
    assert summary["perplexity_after"] == pytest.approx(exact["perplexity_after"], rel=1e-5)
