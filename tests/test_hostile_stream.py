"""A hostile client with a valid token sends what it likes over a TLS stream, while an honest one trains.

Every attack ends the hostile client's stream with the reason, in its answer and in the log, and the honest client's
adapters are those of a run without it, bit for bit.
"""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages import EVALUATE, TRAIN, Task
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport import stream
from hsplitlora_flwr.transport.chunks import assemble, cut
from hsplitlora_flwr.transport.frames import (
    Activation,
    Failure,
    Finish,
    Finished,
    Frame,
    HiddenGradient,
    Loss,
    Ping,
    decode,
    encode,
)
from hsplitlora_flwr.transport.stream import StreamLink
from hsplitlora_flwr.transport.wire import pack
from tests.tiny import random_batches

STEPS, ROWS, AT_ONCE, TOKENS, HIDDEN, SPLIT = 3, 4, 2, 11, 32, 2
NONE = torch.empty(0)
SECONDS = 20.0

Sent = Iterable[Frame | bytes]


def settings(folder: Path, labels: str, joint: str) -> Config:
    """One pass at a time, so that it has the same number of threads with and without a second client."""
    return Config.from_run_config(
        {
            "model.path": str(folder),
            "model.device": "cpu",
            "train.steps": STEPS,
            "train.batch_size": ROWS,
            "train.micro_batch_size": AT_ONCE,
            "train.passes": 1,
            "train.joint": joint,
            "server.half": "per_client",
            "split.labels": labels,
            "evaluation.client_rows": 3,
            "transport.address": "127.0.0.1",
        }
    )


def steps(labels: str = "server") -> list[list[Activation]]:
    """What an honest client might send, by step and micro-batch."""
    stay, made = labels == "client", []
    for step, batch in zip(range(STEPS + 1), random_batches(5, ROWS, TOKENS), strict=False):
        values = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))
        made.append(
            [
                Activation(
                    step,
                    values[at : at + AT_ONCE],
                    NONE,
                    batch.attention_mask[at : at + AT_ONCE],
                    torch.empty(0, dtype=torch.int64) if stay else batch.labels[at : at + AT_ONCE],
                    batch.label_tokens,
                    at + AT_ONCE == ROWS,
                    0.125,
                )
                for at in range(0, ROWS, AT_ONCE)
            ]
        )
    return made


def first(**changes: Any) -> list[Frame]:
    """The first micro-batch of a task, with something else in it."""
    return [replace(steps()[0][0], **changes)]


def shaped(rows: int, tokens: int) -> list[Frame]:
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    return first(cut=torch.zeros(rows, tokens, HIDDEN), attention_mask=ids, labels=ids, label_tokens=1)


def told(frame: Frame, number: bytes, instead: bytes) -> bytes:
    """A frame that says something that none of ours can: another number of as many characters."""
    data = encode(frame)
    assert data.count(number) == 1 and len(number) == len(instead)
    return data.replace(number, instead)


def honest_until(step: int, micro_batch: int = 0) -> list[Frame]:
    done: list[Frame] = [frame for frames in steps()[:step] for frame in frames]
    return [*done, *steps()[step][:micro_batch]]


ONE, MASK = steps()[0][0], steps()[0][0].attention_mask
VALUES, LABELS = ONE.cut, ONE.labels


def but(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


ON_TRAINING: dict[str, tuple[Callable[[], Sent], str]] = {
    # steps
    "a step before all": (lambda: first(step=-50), "step -50 came where step 0 is due"),
    "a step far ahead": (lambda: first(step=10**9), "step 1000000000 came where step 0 is due"),
    "a step again": (lambda: [*honest_until(1), *steps()[0]], "step 0 came where step 1 is due"),
    "a step left out": (lambda: [*honest_until(1), *steps()[2]], "step 2 came where step 1 is due"),
    "a step in a step": (lambda: [*honest_until(0, 1), *steps()[1]], "step 1 came where step 0 is due"),
    "a step too many": (lambda: honest_until(STEPS, 1), "step 3 came after the last one, 2"),
    "an end too soon": (lambda: [*honest_until(1), Finish(0.5)], "ends after 1 of 3 steps"),
    "an end at once": (lambda: [Finish(0.5)], "in the middle of step 0"),
    "an end in a step": (lambda: [*honest_until(2, 1), Finish(0.5)], "in the middle of step 2"),
    "more after the end": (
        lambda: [*honest_until(STEPS), Finish(0.5), *steps()[STEPS]],
        "Activation came after the end of the training",
    ),
    # sizes
    "no last micro-batch": (lambda: [replace(ONE, label_tokens=40)] * 9, "has 6 rows; the task allows 4"),
    "many rows": (lambda: shaped(3, 1), "3 rows x 1 tokens; the task allows 2 rows x 11 tokens"),
    "long rows": (lambda: shaped(1, 22), "1 rows x 22 tokens; the task allows"),
    "a large frame": (lambda: shaped(500, TOKENS), "Activation has .* bytes; at most .* are accepted here"),
    "no rows": (lambda: shaped(0, TOKENS), "without a token"),
    "another width": (lambda: first(cut=VALUES[..., :7]), r"cut activation \(2, 11, 7\) must be \(2, 11, 32\)"),
    # labels and masks
    "too few label tokens": (lambda: first(label_tokens=1), "but said 1"),
    "too many label tokens": (lambda: first(label_tokens=2**62), "at most 40 fit"),
    "a lie about label tokens": (
        lambda: [replace(frame, label_tokens=frame.label_tokens + 1) for frame in steps()[0]],
        "labelled tokens in 2 micro-batches, but said",
    ),
    "two minds about label tokens": (
        lambda: [ONE, replace(steps()[0][1], label_tokens=ONE.label_tokens + 1)],
        "those before it said",
    ),
    "a token beyond the vocabulary": (lambda: first(labels=but(LABELS, 257)), "token ids from 0 to 256"),
    "a negative token": (lambda: first(labels=but(LABELS, -1)), "token ids from 0 to 256"),
    "a mask of twos": (lambda: first(attention_mask=2 * MASK), "1 for tokens and 0 for padding"),
    "a mask of nothing": (lambda: first(attention_mask=0 * MASK), "a row without a token"),
    "a mask of floats": (lambda: first(attention_mask=MASK.float()), "holds int64 numbers"),
    # numbers
    "nan": (lambda: first(cut=but(VALUES, math.nan)), "not finite"),
    "inf": (lambda: first(cut=but(VALUES, math.inf)), "not finite"),
    "numbers that overflow": (lambda: first(cut=torch.full_like(VALUES, 3e38)), r"lower train\.lr"),
    "another wire": (lambda: first(cut=VALUES.double()), "torch.float64 where the wire float32"),
    "int8 with a scale of nan": (
        lambda: first(cut=pack(VALUES, "int8")[0], scale=but(pack(VALUES, "int8")[1], math.nan)),
        "torch.int8 where the wire float32",
    ),
    "a square of nan": (lambda: [told(Finish(0.5), b"0.5", b"NaN")], "'previous_square' is nan"),
    "a square of inf": (lambda: [told(ONE, b"0.125", b"1e999")], "'previous_square' is inf"),
    "a negative square": (lambda: first(previous_square=-1.0), "previous_square is -1.0"),
    "a last square below zero": (lambda: [*honest_until(STEPS), Finish(-1.0)], "previous_square is -1.0"),
    "a last square of nan": (
        lambda: [*honest_until(STEPS), told(Finish(0.5), b"0.5", b"NaN")],
        "'previous_square' is nan",
    ),
    # what is no frame of a client
    "a server's frame": (lambda: [Loss(1.0)], "a client does not send Loss"),
    "a gradient for nothing": (lambda: [HiddenGradient(VALUES, NONE, 1.0)], "no hidden state that was sent"),
    "noise": (lambda: [b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n"], "not a frame"),
    "a frame of a petabyte": (lambda: [b"HSPL\2\0" + (9).to_bytes(4, "little") + b"\0" * 6 + b"\4\0"], "at most"),
    "a deep header": (lambda: [b"HSPL\2\0\x60\xea\0\0\x72\xea\0\0\0\0\0\0" + b"[" * 60000], "not JSON"),
    "a frame cut short": (lambda: [encode(ONE)[:500]], "goes on with 500 after 0"),
    "a frame in crumbs": (lambda: [encode(ONE)[:500], encode(ONE)[500:600], encode(ONE)[600:]], "goes on with 500"),
    "many pings": (lambda: [Ping(torch.empty(0, dtype=torch.uint8), 0)] * 99, "more than 64 pings"),
    "a ping for a gigabyte": (lambda: [Ping(torch.empty(0, dtype=torch.uint8), 2**30)], "a ping asks for"),
}


def back(**changes: Any) -> list[Frame]:
    good = HiddenGradient(torch.full_like(VALUES, 1e-3), NONE, 0.125)
    return [steps("client")[0][0], replace(good, **changes)]


WHERE_LABELS_STAY: dict[str, tuple[Callable[[], Sent], str]] = {
    "no gradient ever": (lambda: [replace(steps("client")[0][0], label_tokens=40)] * 200, "1 hidden states wait"),
    "a gradient of nan": (lambda: back(gradient=but(VALUES, math.nan)), "not finite"),
    "a gradient that overflows": (lambda: back(gradient=torch.full_like(VALUES, 3e38)), "not finite|is inf|is nan"),
    "a gradient of another shape": (lambda: back(gradient=VALUES[:1]), "must be like the state"),
    "a gradient of another wire": (lambda: back(gradient=VALUES.bfloat16()), "where the wire float32"),
    "a loss below zero": (lambda: back(loss=-1.0), "the loss is -1.0"),
    "a loss of nan": (lambda: [back()[0], told(back()[1], b"0.125", b"  NaN")], "'loss' is nan"),
    "a gradient twice": (lambda: [*back(), back()[1]], "no hidden state that was sent"),
    "an end with gradients due": (lambda: [back()[0], Finish(0.5)], "in the middle of step 0"),
    "labels all the same": (lambda: first(), r"or \(0,\) where they stay"),
}

ON_EVALUATION: dict[str, tuple[Callable[[], Sent], str]] = {
    "rows without end": (lambda: [ONE] * 50, "4 rows to evaluate; the task allows 3"),
    "training": (lambda: [Finish(0.5)], "a client that evaluates does not send Finish"),
    "long evaluation": (lambda: shaped(1, 12), "1 rows x 12 tokens; the task allows"),
    "nan to evaluate": (lambda: first(cut=but(VALUES, math.nan)), "not finite"),
    "no token to evaluate": (lambda: first(labels=but(LABELS, 10**6)), "token ids from 0 to 256"),
}


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
        messages = [m for each in sent() for m in cut([each if isinstance(each, bytes) else encode(each)])]
        with stream._channel(self.task(kind).endpoint) as channel:
            answers = [decode(data) for data in assemble(self.call(channel, iter(messages)), 2**26)]
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

        channel = self._stack.enter_context(stream._channel(self.task(TRAIN).endpoint))
        self._stack.callback(closed.set)
        self._held.append(self.call(channel, sent()))  # a call that nobody holds is cancelled
        self._held[-1].initial_metadata()

    def connect(self) -> None:
        """Open a connection and never say anything."""
        host, _, port = self.task(TRAIN).endpoint.address.rpartition(":")
        self._stack.enter_context(socket.create_connection((host, int(port))))

    def task(self, kind: str) -> Task:
        self._task = self.shard.admit(task_of(self.config, "mallory", kind), {}, lambda _: None, TOKENS)
        return self._task

    def call(self, channel: Any, messages: Iterator[bytes]) -> Any:
        method = channel.stream_stream("/hsplitlora.Shard/Train", request_serializer=None, response_deserializer=None)
        return method(messages, metadata=(("hsplitlora-token", self._task.token),))

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
    names = [
        f"model.layers.{block}.{layer}"
        for block in range(4)
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    specs = {} if kind == EVALUATE else {name: AdapterSpec(4, 8.0, 0.1) for name in names}
    return Task(config, kind, client, round=1, split=SPLIT, specs=specs, first_step=0, steps=STEPS)


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
    monkeypatch.setattr(stream, "END_SECONDS", 0.5)
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
