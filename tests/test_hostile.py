"""A client that sends something else in every round, and the others end where they end without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.messages import DESCRIBE, PACKET_TYPE, TRAIN, TURN, take_tensors, to_arrays
from hsplitlora_flwr.transport.frames import Activation, decode, encode
from tests.grid import LocalGrid
from tests.server.test_strategy import run, settings

HOSTILE = 11
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


def parts(change: Callable[[list[bytes]], list[Any]]) -> Deed:
    """Other frames in a message."""

    def deed(content: RecordDict) -> None:
        content["frames"] = ConfigRecord({"frames": change(content.config_records["frames"]["frames"])})

    return deed


def again(frames: list[bytes]) -> list[bytes]:
    """The step before, with what belongs to this one."""
    frame = decode(frames[0])
    assert isinstance(frame, Activation)
    return [encode(replace(frame, step=frame.step - 1))]


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

IN_FRAMES: list[tuple[str, Deed, str]] = [
    (TURN, parts(lambda frames: frames * 1000), "a message with 1,000 frames; at most 1"),
    (TURN, parts(lambda frames: [bytes(10**7)]), "a message with a frame of 10,000,000 bytes; at most"),
    (TURN, parts(lambda frames: [b"GET / HTTP/1.1"]), "shorter than its prefix"),
    (TURN, parts(lambda frames: [1, 2]), "the frames of a message are not bytes"),
    (TURN, parts(again), "came where step"),
]


class HostileGrid(LocalGrid):
    """One of its nodes does one deed after another; every deed is refused, so it is asked anew in every round.

    Parameters
    ----------
    deeds : list
        Those of :data:`DEEDS` that it does.
    dies : bool
        It fails in the place of each of them.
    """

    def __init__(self, nodes: Iterable[int], deeds: Sequence[tuple[str, Deed, str]], dies: bool) -> None:
        super().__init__(split_client_app(), {each: node(each - 10) for each in nodes})
        self._deeds, self._dies, self._number, self._done = deeds, dies, -1, False

    def answer(self, message: Message) -> Message:
        reply, kind = super().answer(message), message.metadata.message_type
        if message.metadata.dst_node_id == HOSTILE and not reply.has_error():
            if kind == DESCRIBE:
                self._number, self._done = self._number + 1, False
            wanted, deed, _ = self._deeds[min(self._number, len(self._deeds) - 1)]
            if kind == wanted and not self._done:
                self._done = True
                if self._dies:
                    reply = Message(Error(code=0, reason="no power"), reply_to=message)
                    reply.metadata.__dict__["_src_node_id"] = HOSTILE
                else:
                    deed(reply.content)
        return reply


def node(index: int) -> dict[str, Any]:
    return {"partition-id": index, "num-partitions": 3, "memory-gb": 20.0}


@pytest.mark.parametrize(
    ("half", "transport", "deeds"),
    [("per_client", "stream", DEEDS), ("shared", "stream", DEEDS[::3]), ("shared", "messages", IN_FRAMES)],
    ids=["own halves", "one half", "one half, by messages"],
)
def test_the_others_end_where_they_end_without_a_client_that_sends_all_of_this(
    half: str, transport: str, deeds: list[tuple[str, Deed, str]], tiny_folder: Path, tmp_path: Path
) -> None:
    """A half that all train keeps the steps that were accepted before, as of a client that dies then; who is refused
    before its first has left none. With a half for each client nothing is left."""
    ends, summaries = {}, {}
    in_rounds = deeds[1:] if deeds[0][0] == DESCRIBE else deeds  # before training it is asked too
    for name in ("without", "with"):
        nodes = (10, 12) if (half, name) == ("per_client", "without") else (10, HOSTILE, 12)
        changes = {
            "method.name": "hsplitlora-no-armsc",
            "server.half": half,
            "transport.kind": transport,
            "split.point": 2,
            "data.eval_rows": 4,
            "train.rounds": len(in_rounds),
            "train.steps": 2,
            "clients.count": len(nodes),
            "lora.rank_cap": 4,
        }
        folder = tmp_path / name
        grid = HostileGrid(nodes, deeds, dies=name == "without")
        summary = summaries[name] = run(settings(tiny_folder, folder, **changes), folder, grid)
        trained = [[row["client"] for row in each["clients"]] for each in summary["rounds"]]
        assert trained == [["0", "2"]] * len(in_rounds)
        ends[name] = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert ends["with"].keys() == ends["without"].keys()
    assert all(torch.equal(tensor, ends["without"][key]) for key, tensor in ends["with"].items())
    taken = {DESCRIBE: 0, TURN: 1, TRAIN: 2 if half == "shared" else 0}
    kept = [{"1": taken[kind]} if taken[kind] else {} for kind, _, _ in in_rounds]
    for summary in summaries.values():
        assert [each["steps_of_failed"] for each in summary["rounds"]] == kept
    events = list(map(json.loads, (tmp_path / "with" / "events.jsonl").open()))
    failures = [event["error"] for event in events if event["kind"] == "client_failed"]
    assert len(failures) == len(deeds)
    for said, (_, _, says) in zip(failures, deeds, strict=True):
        assert says in said and said.isprintable() and len(said) <= 500
    told = [event["text"] for event in events if "steps of client 1, which failed" in event.get("text", "")]
    assert len(told) == sum(map(bool, kept))
