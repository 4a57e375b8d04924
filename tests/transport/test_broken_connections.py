"""Connections that break: the stream goes on, no frame is lost, and none is answered twice."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.frames import Finish, Finished, Frame, Gradient
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamError, StreamLink, StreamServer, protocol
from tests.transport.relay import Relay
from tests.transport.test_stream import SECONDS, activation, every_thread_ends, exchange, until

IDENTITY = make_identity("shard")
BIG = 2**20  # 24 MiB a frame: more than fits on the way

assert every_thread_ends, "a fixture of this module too"


class Server:
    """A stream's server that counts what it handles, behind a relay."""

    def __init__(self, grace: float = SECONDS, in_flight: int = 1, handler: Callable[[Frame], Frame] | None = None):
        self.seen: list[float] = []
        self.ended = threading.Event()
        self.server = StreamServer("127.0.0.1", 0, identity=IDENTITY, grace=grace, in_flight=in_flight)
        self.relay = Relay(int(self.server.endpoint.address.rpartition(":")[2]))
        self.endpoint = Endpoint(f"127.0.0.1:{self.relay.port}", IDENTITY.pin, IDENTITY.name)
        self.token = self.server.admit(handler or self.answer, ended=self.ended.set, name="client ada")
        self.grace, self.in_flight = grace, in_flight

    def answer(self, frame: Frame) -> Frame:
        if isinstance(frame, Finish):
            self.seen.append(frame.previous_grad_norm_sq)
            return Gradient(
                torch.full((1,), frame.previous_grad_norm_sq), torch.empty(0), frame.previous_grad_norm_sq, 0.0
            )
        return frame

    def link(self, grace: float | None = None) -> StreamLink:
        return StreamLink(self.endpoint, self.token, self.in_flight, grace=self.grace if grace is None else grace)

    def __enter__(self) -> Server:
        self.relay.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.relay.__exit__(None, None, None)


@pytest.mark.parametrize("when", ["idle", "frame on its way", "answer on its way", "handled"])
def test_a_stream_goes_on_over_another_connection(when: str) -> None:
    begun, free = threading.Event(), threading.Event()

    def answer(frame: Frame) -> Frame:
        begun.set()
        if when == "handled":
            free.wait(SECONDS)
        return frame

    with Server(handler=answer) as server, server.link() as link:
        if when == "idle":
            exchange(link, Finish(1.0))
        large = activation(2, BIG if "way" in when else 4)
        on_its_way = {"idle": 0, "frame on its way": BIG, "answer on its way": 25 * BIG, "handled": 0}[when]
        if when != "idle":
            link.send(large)
            assert until(lambda: server.relay.bytes > on_its_way and (when != "handled" or begun.is_set()))
        server.relay.cut()
        free.set()
        if when == "idle":
            link.send(large)
        answered = link.receive()
        assert torch.equal(answered.cut, large.cut)  # type: ignore[attr-defined]
        exchange(link, Finish(2.0))
        assert server.relay.connections > 1
    assert server.ended.wait(SECONDS)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_every_frame_is_handled_once_and_answered_in_order_however_often_it_breaks(in_flight: int) -> None:
    count, dice = 150, random.Random(0)
    with Server(in_flight=in_flight) as server, ExitStack() as stack:
        done = threading.Event()

        def break_it() -> None:
            while not done.wait(dice.uniform(0.05, 0.3)):
                server.relay.cut()

        breaking = threading.Thread(target=break_it)
        breaking.start()
        stack.callback(breaking.join)
        stack.callback(done.set)
        link = stack.enter_context(server.link())
        answers, sent = list[Frame](), 0
        while len(answers) < count:
            while sent < min(count, len(answers) + in_flight):
                link.send(Finish(float(sent)))
                sent += 1
            answers.append(link.receive())
            time.sleep(0.005)
        done.set()
        breaking.join()
        assert server.relay.connections > 3
    assert server.seen == list(range(count))
    assert [answer.loss for answer in answers if isinstance(answer, Gradient)] == server.seen


def test_a_silent_connection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is reset: what is sent gets nowhere, as when a cable is pulled or a machine stands still."""
    seconds = dict(protocol.OPTIONS)["grpc.keepalive_time_ms"], dict(protocol.OPTIONS)["grpc.keepalive_timeout_ms"]
    assert sum(map(int, seconds)) <= 10_000
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    quick |= {"grpc.http2.min_ping_interval_without_data_ms": 500}
    monkeypatch.setattr(protocol, "OPTIONS", list((dict(protocol.OPTIONS) | quick).items()))
    with Server() as server, server.link() as link:
        exchange(link, Finish(1.0))
        server.relay.hold()
        exchange(link, Finish(2.0))
        assert server.relay.connections == 2
    assert server.seen == [1.0, 2.0]


def test_who_does_not_come_back_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    with Server(grace=0.4) as server, server.link() as link:
        exchange(link, Finish(1.0))
        server.relay.refuse()
        assert server.ended.wait(SECONDS)
        with pytest.raises(StreamError, match=r"broke: .*; it did not come back: no stream to the server shard"):
            link.receive()
        assert "the connection of client ada broke off; it has 0.4 s to come back" in caplog.text
        assert "client ada did not come back within 0.4 s" in caplog.text
        assert server.server.open_streams == 0


CLIENT = """
import sys
from hsplitlora_flwr.transport.frames import Finish
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink

with StreamLink(Endpoint(*sys.argv[1:4]), sys.argv[4], grace=0.4) as link:
    link.send(Finish(1.0))
    print(link.receive().loss, flush=True)
    link.receive()  # for what comes next, as a client does whose message lasts
"""


def test_a_process_whose_link_is_gone_ends_after_the_grace() -> None:
    """Nobody else ends it: it was started by nobody who is still there."""
    with Server(grace=0.4) as server:
        endpoint = server.endpoint
        command = [sys.executable, "-c", CLIENT, endpoint.address, endpoint.certificate, endpoint.name, server.token]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stdout.readline() == "1.0\n"
            server.relay.refuse()
            _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 1 and "it did not come back" in said


def test_who_comes_back_too_late_is_refused() -> None:
    with Server(grace=0.3) as server, server.link(grace=SECONDS) as link:
        exchange(link, Finish(1.0))
        server.relay.refuse()
        assert server.ended.wait(SECONDS)
        server.relay.admit()
        with pytest.raises(StreamError, match=r"did not come back: .* refused the stream: no live token"):
            link.receive()


def test_a_round_that_ends_meanwhile_ends_the_stream() -> None:
    with Server() as server, server.link() as link:
        exchange(link, Finish(1.0))
        server.relay.refuse()
        assert until(lambda: server.server.open_streams == 0)
        server.server.dismiss_all()
        assert server.ended.wait(SECONDS)
        server.relay.admit()
        with pytest.raises(StreamError, match="no live token"):
            link.receive()


def test_a_client_that_leaves_is_not_waited_for() -> None:
    with Server() as server:
        with server.link() as link:
            exchange(link, Finish(1.0))
        assert server.ended.wait(SECONDS)
        with pytest.raises(StreamError, match="no live token"):
            server.link().__enter__()


def test_without_a_grace_a_broken_connection_ends_the_stream() -> None:
    with Server(grace=0.0) as server, server.link() as link:
        exchange(link, Finish(1.0))
        server.relay.cut()
        with pytest.raises(StreamError, match="broke: "):
            link.receive()
        assert server.ended.wait(SECONDS)


def test_answers_that_are_gone_cannot_be_asked_for() -> None:
    with Server() as server, server.link() as link:
        for number in range(4):
            exchange(link, Finish(float(number)))
        other = server.link()
        with pytest.raises(StreamError, match="refused the stream: number 0 is asked for"):
            other.__enter__()
        assert isinstance(exchange(link, Finish(4.0)), Gradient)  # the honest one goes on


def test_a_finished_answer_is_not_lost() -> None:
    def answer(frame: Frame) -> Frame:
        server.relay.refuse()
        return Finished()

    with Server(handler=answer) as server, server.link() as link:
        link.send(Finish(0.0))
        assert until(lambda: server.server.open_streams == 0)
        server.relay.admit()
        assert isinstance(link.receive(), Finished)


@pytest.fixture(autouse=True)
def _threads(every_thread_ends: None) -> Iterator[None]:
    yield
