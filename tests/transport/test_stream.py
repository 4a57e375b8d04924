"""The stream over a real socket: tokens, errors, and several clients at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from hsplitlora_flwr.transport import stream
from hsplitlora_flwr.transport.frames import Activation, Finish, Finished, Frame, Gradient
from hsplitlora_flwr.transport.stream import StreamError, StreamLink, StreamServer


@pytest.fixture
def server() -> Iterator[StreamServer]:
    server = StreamServer("127.0.0.1", 0)
    yield server
    server.stop()


def activation(rows: int = 2) -> Activation:
    ids = torch.ones(rows, 3, dtype=torch.long)
    return Activation(0, torch.ones(rows, 3, 4), ids, ids, 4, True, 0.0)


def double(frame: Frame) -> Frame:
    return Gradient(2 * frame.cut, 1.0, 0.0) if isinstance(frame, Activation) else Finished()


def test_frames_are_answered_and_bytes_counted(server: StreamServer) -> None:
    with StreamLink(server.address, server.admit(double)) as link:
        for rows in (1, 5):
            answer = link.exchange(activation(rows))
            assert isinstance(answer, Gradient)
            assert torch.equal(answer.gradient, torch.full((rows, 3, 4), 2.0))
        assert isinstance(link.exchange(Finish(0.0)), Finished)
        assert link.bytes_up > link.bytes_down > 0


def test_a_frame_of_many_megabytes(server: StreamServer) -> None:
    big = torch.randn(8, 512, 1024)  # 16 MiB; gRPC's own limit is 4
    ids = torch.ones(8, 512, dtype=torch.long)
    with StreamLink(server.address, server.admit(double)) as link:
        answer = link.exchange(Activation(0, big, ids, ids, 4, True, 0.0))
        assert isinstance(answer, Gradient)
        assert torch.equal(answer.gradient, 2 * big)


@pytest.mark.parametrize("token", ["", "guess"])
def test_a_wrong_token_is_refused(server: StreamServer, token: str) -> None:
    server.admit(double)
    with StreamLink(server.address, token) as link, pytest.raises(StreamError, match="UNAUTHENTICATED: no live token"):
        link.exchange(Finish(0.0))


def test_a_token_serves_one_stream_and_dies_with_its_round(server: StreamServer) -> None:
    token = server.admit(double)
    with StreamLink(server.address, token) as link:
        link.exchange(Finish(0.0))
        with StreamLink(server.address, token) as second, pytest.raises(StreamError, match="no live token"):
            second.exchange(Finish(0.0))
    late = server.admit(double)
    server.dismiss_all()
    with StreamLink(server.address, late) as link, pytest.raises(StreamError, match="no live token"):
        link.exchange(Finish(0.0))


def test_the_client_learns_why_the_server_failed(server: StreamServer) -> None:
    def fail(frame: Frame) -> Frame:
        raise ValueError("labels are missing")

    with (
        StreamLink(server.address, server.admit(fail)) as link,
        pytest.raises(StreamError, match="the server shard failed: ValueError: labels are missing"),
    ):
        link.exchange(activation())


def test_an_address_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(StreamError, match=r"127.0.0.1:1 within .* check transport.address"),
        StreamLink("127.0.0.1:1", ""),
    ):
        pass


def test_a_port_that_is_taken(server: StreamServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(StreamError, match=f"transport.port={port}: the port cannot be opened"):
        StreamServer("127.0.0.1", port)


def test_clients_are_served_at_the_same_time(server: StreamServer) -> None:
    meeting = threading.Barrier(3, timeout=20)  # passed only if three handlers run at once

    def meet(frame: Frame) -> Frame:
        meeting.wait()
        return Finished()

    def visit() -> None:
        with StreamLink(server.address, server.admit(meet)) as link:
            link.exchange(Finish(0.0))

    threads = [threading.Thread(target=visit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not meeting.broken
    assert not any(thread.is_alive() for thread in threads)
