"""A client that sends something else in every round, and the others end where they end without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.messages import DESCRIBE, PACKET_TYPE, TRAIN, take_tensors, to_arrays
from tests.grid import LocalGrid
from tests.server.test_strategy import run, settings

HONEST, HOSTILE = (10, 12), 11
Deed = Callable[[RecordDict], None]


def say(**claims: Any) -> Deed:
    """Something else in the description of itself."""

    def deed(content: RecordDict) -> None:
        content["description"] = ConfigRecord(dict(content.config_records["description"]) | claims)

    return deed


def train(change: Callable[[torch.Tensor], torch.Tensor]) -> Deed:
    """Other adapters."""

    def deed(content: RecordDict) -> None:
        tensors = take_tensors(content.array_records["adapters"])
        content["adapters"] = to_arrays({name: change(tensor) for name, tensor in tensors.items()})

    return deed


def packet(data: bytes, kind: str = PACKET_TYPE) -> Deed:
    """Other bytes where adapters should be."""
    return lambda content: content.update(adapters=ArrayRecord({"0": Array("uint8", (len(data),), kind, data)}))


def metric(record: str, **values: Any) -> Deed:
    """Other figures."""

    def deed(content: RecordDict) -> None:
        content[record] = MetricRecord(dict(content.metric_records[record]) | values)

    return deed


NESTED = b"[" * 5000
DEEDS: list[tuple[str, Deed, str]] = [
    (DESCRIBE, say(examples=10**15), "examples=1000000000000000, which must be"),
    (DESCRIBE, say(flops=1e-300), "flops=1e-300, which must be"),
    (DESCRIBE, say(longest=10**9), "data.max_length=48 cuts them before"),
    (DESCRIBE, say(name="0"), "another node calls itself client 0"),
    (DESCRIBE, say(name="\x1b[2J\u202e"), "none of them invisible"),
    (DESCRIBE, say(held="[" * 50_000), "cannot be read (RecursionError"),
    (DESCRIBE, lambda content: content.clear(), "holds no ConfigRecord 'description'"),
    (TRAIN, train(lambda t: t * 0 + 1e4), "cannot come from 2 steps"),
    (TRAIN, train(lambda t: t * torch.nan), "not finite"),
    (TRAIN, train(lambda t: (t * 100).to(torch.int32)), "torch.int32, and not torch.float32"),
    (TRAIN, packet(struct.pack("<Q", len(NESTED)) + NESTED), "cannot be read"),
    (TRAIN, packet(b"\0" * 10**7), "10,000,000 bytes of adapters"),
    (TRAIN, metric("losses", losses=[1.0] * 10**6), "1,000,000 losses of 2 steps"),
    (TRAIN, metric("losses", losses=[float("nan")] * 2), "losses are not finite"),
    (TRAIN, metric("metrics", seconds=0.0), "seconds=0"),
    (TRAIN, say(name="2"), "another node calls itself client 2"),
    (TRAIN, say(name="elsewhere"), "a node keeps its name"),
    (TRAIN, lambda content: content.clear(), "neither frames nor an outcome"),
]


class HostileGrid(LocalGrid):
    """One of its nodes does one deed after another; every deed is refused, so it is asked anew in every round."""

    deeds = 0

    def answer(self, message: Message) -> Message:
        reply, kind = super().answer(message), message.metadata.message_type
        if message.metadata.dst_node_id == HOSTILE and not reply.has_error():
            self.deeds += kind == DESCRIBE
            wanted, deed, _ = DEEDS[min(self.deeds, len(DEEDS)) - 1]
            if kind == wanted:
                deed(reply.content)
        return reply


def node(index: int) -> dict[str, Any]:
    return {"partition-id": index, "num-partitions": 3, "memory-gb": 20.0}


def test_the_others_end_where_they_end_without_a_client_that_sends_all_of_this(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ends = {}
    for name, nodes in (("without", HONEST), ("with", (10, HOSTILE, 12))):
        changes = {
            "method.name": "hsplitlora-no-armsc",
            "server.half": "per_client",  # what it trains of a shared half, with frames that are in order, stays there
            "split.point": 2,
            "train.rounds": len(DEEDS),
            "train.steps": 2,
            "clients.count": len(nodes),
            "lora.rank_cap": 4,
        }
        folder = tmp_path / name
        grid = HostileGrid(split_client_app(), {each: node(each - 10) for each in nodes})
        summary = run(settings(tiny_folder, folder, **changes), folder, grid)
        assert [[row["client"] for row in each["clients"]] for each in summary["rounds"]] == [["0", "2"]] * len(DEEDS)
        ends[name] = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert ends["with"].keys() == ends["without"].keys()
    assert all(torch.equal(tensor, ends["without"][key]) for key, tensor in ends["with"].items())
    events = map(json.loads, (tmp_path / "with" / "events.jsonl").open())
    failures = [event["error"] for event in events if event["kind"] == "client_failed"]
    assert len(failures) == len(DEEDS)
    for said, (_, _, says) in zip(failures, DEEDS, strict=True):
        assert says in said and said.isprintable() and len(said) <= 500
