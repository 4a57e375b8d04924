"""A hostile client with a valid token sends what it likes over a TLS stream, while an honest one trains.

Every attack (:mod:`tests.attacks`) ends the hostile client's stream with the reason, in its answer and in the log. With
a half for each client the honest one's adapters are those of a run without it, bit for bit. A half that all train keeps
the steps that were accepted before, and nothing else.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages import EVALUATE, TRAIN, Task
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import Failure, Finished, Frame, decode, encode
from hsplitlora_flwr.transport.stream import StreamLink, served
from hsplitlora_flwr.transport.stream.channel import open_channel
from hsplitlora_flwr.transport.stream.chunks import assemble, cut
from tests.attacks import (
    AT_ONCE,
    ON_EVALUATION,
    ON_TRAINING,
    ROWS,
    SPLIT,
    STEPS,
    TOKENS,
    WHERE_LABELS_STAY,
    Sent,
    accepted,
    honest_until,
    steps,
)
from tests.tiny import random_batches

SECONDS = 300.0


def settings(folder: Path, labels: str, joint: str = "off", half: str = "per_client") -> Config:
    """One pass at a time, so that it has the same number of threads with and without a second client."""
    return Config.from_run_config(
        {
            "model.path": str(folder),
            "model.device": "cpu",
            "train.steps": STEPS,
            "train.batch_size": ROWS,
            "train.micro_batch_size": AT_ONCE,
            "train.passes": 1,
            "train.multi_adapter_batching": joint,
            "server.half": half,
            "split.labels": labels,
            "evaluation.client_rows": 3,
            "transport.address": "127.0.0.1",
        }
    )


def call(channel: Any, token: str, messages: Iterator[bytes]) -> Any:
    method = channel.stream_stream("/hsplitlora.Shard/Train", request_serializer=None, response_deserializer=None)
    return method(messages, metadata=(("hsplitlora-token", token),))


def answers_to(sent: Sent, task: Task) -> list[Frame]:
    """What the server answers until it ends the stream, or all has been sent."""
    messages = [m for each in sent for m in cut([each if isinstance(each, bytes) else encode(each)])]
    with open_channel(task.endpoint) as channel:
        return [decode(data) for data in assemble(call(channel, task.token, iter(messages)), 2**26)]


@dataclass
class Hostile:
    """A client that has a token for every attack.

    Parameters
    ----------
    shard : Shard
    config : Config
    attacks : list
        Those that are to come: what to send in which kind of task, and what the server should say.
    """

    shard: Shard
    config: Config
    attacks: list[tuple[str, str, Callable[[], Sent], str]]
    made: int = 0
    _held: list[Any] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def attack(self) -> None:
        """Make the next one, and see that it is refused."""
        name, kind, sent, says = self.attacks.pop()
        answers = answers_to(sent(), self.task(kind))
        last = answers[-1]
        assert isinstance(last, Failure) and re.search(says, last.error), (name, last)
        self.made += 1
        if kind == TRAIN:
            finished = any(isinstance(answer, Finished) for answer in answers)
            assert self.shard.trainer("mallory").finished == finished, name

    def hold_open(self, *messages: bytes) -> None:
        """Open a stream and never end it."""
        closed = threading.Event()

        def sent() -> Iterator[bytes]:
            yield from messages
            closed.wait(SECONDS)

        channel = self._stack.enter_context(open_channel(self.task(TRAIN).endpoint))
        self._stack.callback(closed.set)
        self._held.append(call(channel, self._token, sent()))  # a call that nobody holds is cancelled
        self._held[-1].initial_metadata()

    def connect(self) -> None:
        """Open a connection and never say anything."""
        host, _, port = self.task(TRAIN).endpoint.address.rpartition(":")
        self._stack.enter_context(socket.create_connection((host, int(port))))

    def task(self, kind: str) -> Task:
        task = self.shard.admit(task_of(self.config, "mallory", kind), {}, lambda _: None, TOKENS)
        self._token = task.token
        return task

    def leave(self) -> None:
        self._stack.close()


class Beside:
    """An honest client's link, beside which an attack is made while the server answers each of its frames."""

    def __init__(self, link: StreamLink, hostile: Hostile | None) -> None:
        self._link, self._hostile = link, hostile

    def send(self, frame: Frame) -> None:
        self._link.send(frame)
        for _ in range(9):
            if self._hostile and self._hostile.attacks:
                self._hostile.attack()

    def receive(self) -> Frame:
        return self._link.receive()


def task_of(config: Config, client: str, kind: str = TRAIN) -> Task:
    specs = {} if kind == EVALUATE else specs_from(0)
    return Task(config, kind, client, round=1, split=SPLIT, specs=specs, first_step=0, steps=STEPS)


def specs_from(first: int) -> dict[str, AdapterSpec]:
    """Of the blocks from this one up."""
    layers = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{layer}" for block in range(first, 4) for layer in layers]
    return {name: AdapterSpec(4, 8.0, 0.1) for name in names}


def train_honestly(shard: Shard, config: Config, hostile: Hostile | None = None) -> dict[str, Factors]:
    """The adapters of both sides."""
    task = shard.admit(task_of(config, "ada"), {}, lambda _: None, TOKENS)
    model, head = load_client(config.model.path, SPLIT, "float32", "cpu", {}, head=config.split.labels == "client")
    optimizer = AdapterOptimizer(inject(model, task.specs, task.seed), config.train)
    batches = random_batches(0, ROWS, TOKENS)
    trainer = ClientTrainer(
        model.train(), optimizer, batches, first_step=0, head=head, micro_batch_size=AT_ONCE, up=config.transport.up
    )
    with StreamLink(task.endpoint, task.token) as link:
        train_client(trainer, Beside(link, hostile), STEPS)
    assert shard.trainer("ada").finished
    return {**extract(model), **extract(shard.trainer("ada").model)}


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def attacks_on(labels: str) -> list[tuple[str, str, Callable[[], Sent], str]]:
    if labels == "client":
        return [(name, TRAIN, *attack) for name, attack in WHERE_LABELS_STAY.items()]
    training = [(name, TRAIN, *attack) for name, attack in ON_TRAINING.items()]
    return training + [(name, EVALUATE, *attack) for name, attack in ON_EVALUATION.items()]


def alone(config: Config) -> dict[str, Factors]:
    shard = Shard(config)
    try:
        return train_honestly(shard, config)
    finally:
        shard.stop()


@pytest.mark.parametrize(("labels", "joint"), [("server", "off"), ("client", "off"), ("server", "on")])
def test_an_honest_client_beside_a_hostile_one(
    labels: str,
    joint: str,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(served, "END_SECONDS", 0.5)
    config = settings(tiny_folder, labels, joint)
    expected = alone(config)
    assert all(bool(b.any()) for b, _ in expected.values()), "every adapter has moved"

    before = threading.active_count()
    shard = Shard(config)
    hostile = Hostile(shard, config, attacks_on(labels))
    count = len(hostile.attacks)
    try:
        for _ in range(20):
            hostile.connect()
        hostile.hold_open()
        hostile.hold_open(encode(steps(labels)[0][0]))
        found = train_honestly(shard, config, hostile)
        assert hostile.made == count
        assert caplog.text.count("the stream of client mallory ends: ") >= count
        streams = shard._stream
        assert streams is not None
        assert until(lambda: streams.open_streams == 2), "those that are held open"
        shard.dismiss_all()
        assert until(lambda: streams.open_streams == 0)
    finally:
        hostile.leave()
        shard.stop()
    assert until(lambda: threading.active_count() <= before), threading.enumerate()

    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            if joint == "off":
                assert torch.equal(mine, theirs), name
            else:  # products of more rows are rounded otherwise
                torch.testing.assert_close(
                    mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )


def together(config: Config, sent: Mapping[str, Sent]) -> tuple[dict[str, Factors], dict[str, int], list[Frame]]:
    """A round of an honest client and of clients that send this, at the same time: its adapters and those of the half
    that all train, the steps of the others, and the last answer to each of them."""
    shard = Shard(config)
    try:
        shard.share_half(dict.fromkeys(["ada", *sent], SPLIT), specs_from(SPLIT), "half", {}, {}, lambda client: None)
        tasks = {client: shard.admit(task_of(config, client), {}, lambda _: None, TOKENS) for client in sent}
        with ThreadPoolExecutor(len(sent)) as threads:
            answers = [threads.submit(answers_to, sent[client], task) for client, task in tasks.items()]
            own = train_honestly(shard, config)
            last = [frames[-1] if (frames := answer.result(SECONDS)) else Finished() for answer in answers]
        return own | shard.adapters(), shard.steps_of_others(["ada"]), last
    finally:
        shard.stop()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_half_that_all_train_moves_by_the_steps_before_the_first_frame_that_is_refused(
    labels: str, tiny_folder: Path
) -> None:
    """It ends, bit for bit, where it ends when every hostile client is honest until then and leaves."""
    config = settings(tiny_folder, labels, half="shared")
    # who breaks off is gone, and the turn of the others comes
    config = replace(config, transport=replace(config.transport, grace=0.0))
    attacks = ON_TRAINING if labels == "server" else WHERE_LABELS_STAY
    sent = {f"mallory {number:02}": list(attack()) for number, (attack, _) in enumerate(attacks.values())}
    taken = {client: accepted(frames, labels) for client, frames in sent.items()}
    found, steps_taken, answers = together(config, sent)
    for (name, (_, says)), answer in zip(attacks.items(), answers, strict=True):
        assert isinstance(answer, Failure) and re.search(says, answer.error), (name, answer)
    assert steps_taken == {client: count for client, count in taken.items() if count}
    assert len(steps_taken) > 1, "some had a step accepted"

    expected, _, _ = together(config, {client: honest_until(count, labels=labels) for client, count in taken.items()})
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for name in expected for x, y in zip(found[name], expected[name], strict=True))
    assert all(bool(b.any()) for b, _ in expected.values()), "every adapter has moved"
