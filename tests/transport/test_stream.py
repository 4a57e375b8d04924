"""The stream over real sockets: who gets in, what overlaps, what is bounded, and how each way of failing reads."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
import torch

from hsplitlora_flwr.transport.certificates import Identity, make_identity
from hsplitlora_flwr.transport.frames import (
    Activation,
    Failure,
    Finish,
    Finished,
    Frame,
    Gradient,
    Loss,
    Ping,
    Pong,
    decode,
    encode,
)
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamError, StreamLink, StreamServer, Unreachable, served
from hsplitlora_flwr.transport.stream import client as client_end
from hsplitlora_flwr.transport.stream import server as server_end
from tests.transport.pki import certificate, p256, pem

IDENTITY = make_identity("shard")
NONE = torch.empty(0)
SECONDS = 300.0  # after which a wait has failed


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert until(lambda: threading.active_count() <= before), threading.enumerate()


@pytest.fixture(params=[None, IDENTITY], ids=["plain", "tls"])
def server(request: pytest.FixtureRequest) -> Iterator[StreamServer]:
    server = StreamServer("127.0.0.1", 0, identity=request.param)
    yield server
    server.stop()


@pytest.fixture
def held_open() -> Iterator[threading.Event]:
    """What a client waits for before it ends its side of a call."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def plain() -> Iterator[StreamServer]:
    server = StreamServer("127.0.0.1", 0, identity=None)
    yield server
    server.stop()


def activation(rows: int = 2, hidden: int = 4) -> Activation:
    ids = torch.ones(rows, 3, dtype=torch.long)
    return Activation(0, torch.ones(rows, 3, hidden), NONE, ids, ids, 4, True, 0.0)


def double(frame: Frame) -> Frame:
    return Gradient(2 * frame.cut, NONE, 1.0, 0.0) if isinstance(frame, Activation) else Finished()


def exchange(link: StreamLink, frame: Frame) -> Frame:
    link.send(frame)
    return link.receive()


# Frames and messages


def test_frames_are_answered_and_bytes_counted(server: StreamServer) -> None:
    up = down = 0
    with StreamLink(server.endpoint, server.admit(double)) as link:
        for rows in (1, 5):
            answer = exchange(link, activation(rows))
            assert isinstance(answer, Gradient)
            assert torch.equal(answer.gradient, torch.full((rows, 3, 4), 2.0))
            answer.gradient.add_(1)  # its own memory
            up += len(encode(activation(rows)))
            down += len(encode(Gradient(torch.full((rows, 3, 4), 2.0), NONE, 1.0, 0.0)))
        assert isinstance(exchange(link, Finish(0.0)), Finished)
        assert (link.bytes_up, link.bytes_down) == (up + len(encode(Finish(0.0))), down + len(encode(Finished())))


def test_a_frame_beyond_what_grpc_takes_as_one_message(server: StreamServer) -> None:
    big = torch.randn(3, 3, 2**18)  # 9 MiB; gRPC takes 4
    ids = torch.ones(3, 3, dtype=torch.long)
    with StreamLink(server.endpoint, server.admit(double)) as link:
        answer = exchange(link, Activation(0, big, NONE, ids, ids, 4, True, 0.0))
        assert isinstance(answer, Gradient)
        assert torch.equal(answer.gradient, 2 * big)


def test_a_frame_that_is_too_long_is_refused(plain: StreamServer) -> None:
    calls: list[Frame] = []

    def count(frame: Frame) -> Frame:
        calls.append(frame)
        return Finished()

    size = len(encode(activation()))
    with (
        pytest.raises(StreamError, match=f"FrameError: Activation has {size} bytes; at most {size - 1} are accepted"),
        StreamLink(plain.endpoint, plain.admit(count, max_frame_bytes=size - 1)) as link,
    ):
        exchange(link, activation())
    with StreamLink(plain.endpoint, plain.admit(count, max_frame_bytes=size)) as link:
        exchange(link, activation())
    assert len(calls) == 1


# Who gets in


@pytest.mark.parametrize("token", ["", "guess"])
def test_a_wrong_token_is_refused(server: StreamServer, token: str) -> None:
    server.admit(double)
    with pytest.raises(StreamError, match="refused the stream: no live token") as caught:
        StreamLink(server.endpoint, token).__enter__()
    assert not isinstance(caught.value, Unreachable)


def test_a_token_serves_one_stream(plain: StreamServer) -> None:
    token = plain.admit(double)
    with StreamLink(plain.endpoint, token) as link:
        exchange(link, Finish(0.0))
        with pytest.raises(StreamError, match="no live token"):
            StreamLink(plain.endpoint, token).__enter__()


def test_the_end_of_a_round_ends_unused_tokens_and_open_streams(plain: StreamServer) -> None:
    late = plain.admit(double)
    with StreamLink(plain.endpoint, plain.admit(double)) as link:
        exchange(link, activation())
        plain.dismiss_all()
        with pytest.raises(StreamError, match="no live token"):
            StreamLink(plain.endpoint, late).__enter__()
        for _ in range(2):
            with pytest.raises(StreamError, match="the server shard failed: the round is over"):
                exchange(link, activation())
        assert until(lambda: plain.open_streams == 0)
    with StreamLink(plain.endpoint, plain.admit(double)) as link:  # the next round
        exchange(link, activation())


def test_a_round_that_ends_while_a_step_is_computed(plain: StreamServer) -> None:
    started, free = threading.Event(), threading.Event()

    def wait(frame: Frame) -> Frame:
        started.set()
        free.wait(SECONDS)
        return Loss(1.0)

    with StreamLink(plain.endpoint, plain.admit(wait)) as link:
        link.send(activation())
        link.send(activation())
        assert started.wait(SECONDS)
        plain.dismiss_all()
        free.set()
        assert isinstance(link.receive(), Loss)
        with pytest.raises(StreamError, match="the round is over"):
            link.receive()


def threads_of_streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("stream-read", "stream-compute")]


def test_a_client_that_does_not_leave_is_shown_out(server: StreamServer, held_open: threading.Event) -> None:
    with raw_channel(server) as channel:
        call = raw_call(channel, server.admit(double), never_ending(held_open, encode(activation())))
        decode(next(call))
        server.dismiss_all()
        assert until(lambda: server.open_streams == 0 and not threads_of_streams())
        (answer,) = map(decode, call)
    assert isinstance(answer, Failure) and answer.error == "the round is over"


def test_a_client_that_does_not_listen_is_cut_off(
    server: StreamServer, held_open: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "END_SECONDS", 0.3)
    big = Gradient(torch.zeros(8, 3, 2**18), NONE, 1.0, 0.0)  # 24 MiB, more than fits on the way
    with raw_channel(server) as channel:
        call = raw_call(channel, server.admit(lambda _: big), never_ending(held_open, encode(activation())))
        assert until(lambda: server.open_streams == 1)
        time.sleep(0.2)  # until the answer is on its way, if that is quick
        for _ in range(2):
            server.dismiss_all()
        assert until(lambda: server.open_streams == 0 and not threads_of_streams())
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED


def never_ending(closed: threading.Event, *messages: bytes) -> Iterator[bytes]:
    yield from messages
    closed.wait(SECONDS)


def raw_channel(server: StreamServer) -> grpc.Channel:
    """As a client of its own making has it."""
    return client_end.open_channel(server.endpoint)


def raw_call(channel: grpc.Channel, token: str, messages: Iterator[bytes]) -> Any:
    method = channel.stream_stream("/hsplitlora.Shard/Train", request_serializer=None, response_deserializer=None)
    return method(messages, metadata=(("hsplitlora-token", token),))


def test_tokens_are_never_logged(plain: StreamServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    token = plain.admit(double)
    with StreamLink(plain.endpoint, token) as link:
        exchange(link, Finish(0.0))
    for shown in (token, "guess-of-a-token"):
        with pytest.raises(StreamError) as caught:
            StreamLink(plain.endpoint, shown).__enter__()
        assert shown not in str(caught.value)
        assert shown not in caplog.text


# TLS


def moved(endpoint: Endpoint, certificate: str, name: str) -> Endpoint:
    return Endpoint(endpoint.address, certificate, name)


def test_another_certificate_than_the_pinned_one() -> None:
    server = StreamServer("127.0.0.1", 0, identity=IDENTITY)
    token = server.admit(double)
    stranger = make_identity("shard")
    with pytest.raises(Unreachable, match="shows another certificate than the one of this run's server"):
        StreamLink(moved(server.endpoint, stranger.pin, "shard"), token).__enter__()
    with pytest.raises(Unreachable, match="made out to another name"):
        StreamLink(moved(server.endpoint, IDENTITY.pin, "other"), token).__enter__()
    with StreamLink(server.endpoint, token) as link:
        exchange(link, activation())
    server.stop()


def test_plain_text_and_tls_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_end, "CONNECT_SECONDS", 1.0)  # it might only have had no room
    tls, plain = (StreamServer("127.0.0.1", 0, identity=identity) for identity in (IDENTITY, None))
    with pytest.raises(
        Unreachable, match=r"\(plain text\): what answers there closed the connection; is transport\.tls"
    ):
        StreamLink(moved(tls.endpoint, "", ""), tls.admit(double)).__enter__()
    with pytest.raises(Unreachable, match=r"\(TLS\): what answers there does not speak TLS"):
        StreamLink(moved(plain.endpoint, IDENTITY.pin, "shard"), plain.admit(double)).__enter__()
    tls.stop()
    plain.stop()


@pytest.mark.parametrize("with_chain", [False, True])
def test_a_certificate_signed_by_others_is_pinned_alone(with_chain: bool) -> None:
    """gRPC takes a certificate as trusted root that is none: nothing has to lead up to a self-signed one."""
    authority, key, sibling = p256(), p256(), p256()
    own, above = certificate(key, issuer=authority), certificate(authority)
    other = certificate(sibling, issuer=authority)  # same name, same authority
    name = "shard.example.org"
    ours = Identity(own + above if with_chain else own, pem(key), name)
    theirs = Identity(other + above if with_chain else other, pem(sibling), name)
    servers = [StreamServer("127.0.0.1", 0, identity=identity) for identity in (ours, theirs)]
    with StreamLink(servers[0].endpoint, servers[0].admit(double)) as link:
        exchange(link, activation())
    with pytest.raises(Unreachable, match="another certificate"):
        StreamLink(moved(servers[1].endpoint, ours.pin, name), servers[1].admit(double)).__enter__()
    for server in servers:
        server.stop()


@pytest.mark.parametrize("name", ["10.1.2.3", "fe80::1", "*.example.org"])
def test_the_name_need_not_be_the_address(name: str) -> None:
    server = StreamServer("127.0.0.1", 0, identity=make_identity(name))
    with StreamLink(server.endpoint, server.admit(double)) as link:
        exchange(link, activation())
    server.stop()


# Addresses


def test_the_endpoint_is_what_clients_connect_to() -> None:
    server = StreamServer("127.0.0.1", 0, identity=IDENTITY, public="shard.example.org", public_port=443)
    assert server.endpoint == Endpoint("shard.example.org:443", IDENTITY.pin, "shard")
    server.stop()
    server = StreamServer("127.0.0.1", 0, identity=None, public="fe80::1")
    assert server.endpoint.address.startswith("[fe80::1]:")
    assert (server.endpoint.certificate, server.endpoint.name) == ("", "")
    server.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        server = StreamServer("::1", 0, identity=IDENTITY)
    except StreamError:
        pytest.skip("no IPv6 loopback here")
    assert server.endpoint.address.startswith("[::1]:")
    with StreamLink(server.endpoint, server.admit(double)) as link:
        exchange(link, activation())
    server.stop()


def test_an_address_where_nobody_listens() -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 \(plain text\): .*refused.*; check that transport\.address"):
        StreamLink(Endpoint("127.0.0.1:1", "", ""), "").__enter__()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 \(TLS\): .*refused"):
        StreamLink(Endpoint("127.0.0.1:1", IDENTITY.pin, "shard"), "").__enter__()


def test_an_address_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_end, "CONNECT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = Endpoint(f"127.0.0.1:{silent.getsockname()[1]}", "", "")
        with pytest.raises(Unreachable, match=r"no answer within 0\.3 s, as when a firewall"):
            StreamLink(endpoint, "").__enter__()


def test_another_grpc_server_at_the_address() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(Unreachable, match="Method not found"):
        StreamLink(Endpoint(f"127.0.0.1:{port}", "", ""), "").__enter__()
    other.stop(None).wait()


def test_a_port_that_is_taken(plain: StreamServer) -> None:
    port = int(plain.endpoint.address.rpartition(":")[2])
    with pytest.raises(StreamError, match=rf"transport\.port={port}: the port cannot be opened"):
        StreamServer("127.0.0.1", port, identity=None)


# Failures on the way


def test_the_client_learns_why_the_server_failed(plain: StreamServer) -> None:
    def fail(frame: Frame) -> Frame:
        raise ValueError("labels are missing" + "!" * 10**6)

    with StreamLink(plain.endpoint, plain.admit(fail)) as link:
        for use in (lambda: exchange(link, activation()), link.receive, lambda: link.send(activation())):
            with pytest.raises(StreamError, match="the server shard failed: ValueError: labels are missing") as caught:
                use()
            assert len(str(caught.value)) < 5000


def test_an_answer_that_cannot_travel(plain: StreamServer) -> None:
    with (
        StreamLink(plain.endpoint, plain.admit(lambda _: Pong(torch.ones(1, dtype=torch.bool)))) as link,
        pytest.raises(StreamError, match="the server shard failed: FrameError: field 'payload' has dtype bool"),
    ):
        exchange(link, activation())


def test_a_bad_frame_is_reported_after_the_answers_before_it(plain: StreamServer) -> None:
    with StreamLink(plain.endpoint, plain.admit(double), in_flight=2) as link:
        link.send(activation())
        link._frames.put([b"no frame, but as long as a prefix"])
        assert isinstance(link.receive(), Gradient)
        with pytest.raises(StreamError, match="FrameError: the bytes are not a frame"):
            link.receive()


def test_a_refusal_reaches_a_client_that_is_still_sending(plain: StreamServer) -> None:
    with (
        StreamLink(plain.endpoint, plain.admit(double, max_frame_bytes=1000)) as link,
        pytest.raises(StreamError, match="at most 1000 are accepted here"),
    ):
        exchange(link, activation(2, 2**20))  # 24 MiB


def test_a_server_that_stops(plain: StreamServer) -> None:
    with StreamLink(plain.endpoint, plain.admit(double)) as link:
        exchange(link, activation())
        plain.stop()
        for use in (link.receive, lambda: link.send(activation())):
            with pytest.raises(StreamError, match="the server shard failed: the round is over"):
                use()


@pytest.mark.parametrize("waiting", ["client", "handler", "answer"])
def test_a_client_that_disappears_ends_its_stream(plain: StreamServer, waiting: str) -> None:
    started, free = threading.Event(), threading.Event()

    def answer(frame: Frame) -> Frame:
        started.set()
        if waiting == "handler":
            free.wait(SECONDS)
        return activation(2, 2**20) if waiting == "answer" else Finished()  # 24 MiB, more than fits on the way

    link = StreamLink(plain.endpoint, plain.admit(answer), in_flight=4).__enter__()
    for _ in range(4):
        link.send(activation())
    assert started.wait(SECONDS)
    link.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert until(lambda: plain.open_streams == 0)
    free.set()  # that its threads end, the fixture checks


def test_answers_that_nobody_took_do_not_hold_the_link(plain: StreamServer) -> None:
    with StreamLink(plain.endpoint, plain.admit(double), in_flight=2) as link:
        for _ in range(3):
            link.send(activation())
    with pytest.raises(StreamError, match="the stream is closed"):
        link.send(activation())


# What overlaps, and what is bounded


def test_clients_are_served_at_the_same_time(plain: StreamServer) -> None:
    meeting = threading.Barrier(3, timeout=SECONDS)  # passed only if three handlers run at once

    def meet(frame: Frame) -> Frame:
        meeting.wait()
        return Finished()

    def visit() -> None:
        with StreamLink(plain.endpoint, plain.admit(meet)) as link:
            exchange(link, Finish(0.0))

    threads = [threading.Thread(target=visit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=SECONDS)
    assert not meeting.broken
    assert not any(thread.is_alive() for thread in threads)


def test_answers_arrive_while_the_client_computes() -> None:
    """Four steps are sent, computed and answered, in order, before the first answer is taken."""
    server = StreamServer("127.0.0.1", 0, identity=IDENTITY, in_flight=3)
    served: list[int] = []

    def step(frame: Frame) -> Frame:
        assert isinstance(frame, Activation)
        served.append(len(frame.cut))
        return Loss(float(len(frame.cut)))

    with StreamLink(server.endpoint, server.admit(step), in_flight=3) as link:
        for rows in (1, 2, 3, 4):
            link.send(activation(rows))
        assert until(lambda: served == [1, 2, 3, 4])
        assert until(lambda: len(link._inbox._items) == 4)
        answers = [link.receive() for _ in range(4)]
    assert [answer.total for answer in answers if isinstance(answer, Loss)] == [1.0, 2.0, 3.0, 4.0]
    server.stop()


MANY, FRAME = 20, activation(1, 2**20)  # 12 MiB each
# With one in flight: 2 in the sender's outbox, 1 being cut, 1 being assembled, 1 in the receiver's inbox, 1 in use.
# Beside these gRPC's flow control and the sockets hold some MiB, however long the frames are: 4 frames here.
FEW = 6 + 4


def settled(count: Callable[[], int]) -> int:
    """The count after it has stopped growing."""
    before = -1
    while count() > before:
        before = count()
        time.sleep(0.4)
    return before


def test_a_slow_server_holds_few_frames(plain: StreamServer) -> None:
    free = threading.Event()
    sent: list[Frame] = []

    def slow(frame: Frame) -> Frame:
        free.wait(SECONDS)
        return Finished()

    def push() -> None:
        for _ in range(MANY):
            link.send(FRAME)
            sent.append(FRAME)

    with StreamLink(plain.endpoint, plain.admit(slow)) as link:
        pushing = threading.Thread(target=push)
        pushing.start()
        held = settled(lambda: len(sent))
        free.set()
        assert all(isinstance(link.receive(), Finished) for _ in range(MANY))
        pushing.join(SECONDS)
    assert held <= FEW


def test_a_slow_client_stops_the_server(plain: StreamServer) -> None:
    served: list[Frame] = []

    def large(frame: Frame) -> Frame:
        served.append(frame)
        return FRAME

    def push() -> None:
        for _ in range(MANY):
            link.send(Finish(0.0))

    with StreamLink(plain.endpoint, plain.admit(large)) as link:
        pushing = threading.Thread(target=push)
        pushing.start()
        held = settled(lambda: len(served))
        assert all(isinstance(link.receive(), Activation) for _ in range(MANY))
        pushing.join(SECONDS)
    assert held <= FEW


def test_a_frame_in_crumbs(plain: StreamServer, held_open: threading.Event) -> None:
    """Each message takes time, however short it is."""
    data = encode(activation(2, 2**20))
    with raw_channel(plain) as channel:
        call = raw_call(channel, plain.admit(double), never_ending(held_open, data[:100], data[100:200]))
        answer = decode(b"".join(call))
    assert isinstance(answer, Failure)
    assert answer.error == f"FrameError: a frame of {len(data)} bytes goes on with 100 after 0"


# Connections without a stream


def port_of(server: StreamServer) -> int:
    return int(server.endpoint.address.rpartition(":")[2])


def tls(server: StreamServer) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port_of(server))))


def http2(server: StreamServer) -> ssl.SSLSocket:
    """A connection in which HTTP/2 is agreed on, by the first bytes of RFC 9113, 3.4 and empty settings."""
    connection = tls(server)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    return connection


def half_a_call(server: StreamServer) -> ssl.SSLSocket:
    """The headers of a call (RFC 7541, literals without indexing), whose end never comes."""
    connection = http2(server)
    names = (":method", "POST"), (":scheme", "https"), (":path", "/hsplitlora.Shard/Train"), (":authority", "shard")
    block = b"".join(bytes([0, len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in names)
    connection.sendall(bytes([0, 0, len(block), 1, 0, 0, 0, 0, 1]) + block)
    return connection


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes a connection; whatever it says before is read."""
    connection.settimeout(SECONDS)
    with connection, suppress(ConnectionError):
        while connection.recv(2**16):
            pass
    return True


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[StreamServer]:
    """A server of little patience, with room for four connections."""
    patience = {"server_handshake_timeout_ms": 300, "http2.settings_timeout": 300, "max_connection_idle_ms": 300}
    options = {**dict(server_end._SERVER_OPTIONS), **{f"grpc.{name}": value for name, value in patience.items()}}
    monkeypatch.setattr(server_end, "_SERVER_OPTIONS", list(options.items()))
    monkeypatch.setattr(server_end, "_CONNECTIONS", 4)
    server = StreamServer("127.0.0.1", 0, identity=IDENTITY)
    yield server
    server.stop()


SILENT: dict[str, Callable[[StreamServer], socket.socket]] = {
    "tcp": lambda server: socket.create_connection(("127.0.0.1", port_of(server))),
    "tls": tls,
    "http2": http2,
    "half a call": half_a_call,
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_connection_without_a_token_is_closed(hasty: StreamServer, kind: str) -> None:
    with StreamLink(hasty.endpoint, hasty.admit(double)) as link:
        assert ends(SILENT[kind](hasty))
        exchange(link, activation())  # and an honest one goes on


def test_a_connection_that_asks_again_and_again_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**dict(server_end._SERVER_OPTIONS), "grpc.max_connection_age_ms": 500}
    monkeypatch.setattr(server_end, "_SERVER_OPTIONS", list(options.items()))
    server = StreamServer("127.0.0.1", 0, identity=IDENTITY)
    states: list[grpc.ChannelConnectivity] = []
    with StreamLink(server.endpoint, server.admit(double)) as link, raw_channel(server) as channel:
        channel.subscribe(states.append)
        end = time.monotonic() + SECONDS
        while grpc.ChannelConnectivity.IDLE not in states[1:] and time.monotonic() < end:
            with suppress(grpc.RpcError):  # no live token
                list(raw_call(channel, "guess", iter(())))
        assert grpc.ChannelConnectivity.IDLE in states[1:], states  # what the server closes behind the last call
        exchange(link, activation())  # the call that an honest one makes may last
    server.stop()


def test_connections_are_bounded_and_the_honest_wait_for_room(hasty: StreamServer) -> None:
    silent = [SILENT["tcp"](hasty) for _ in range(40)]
    with StreamLink(hasty.endpoint, hasty.admit(double)) as link:  # once those that were taken have been closed
        exchange(link, activation())
        assert all(ends(connection) for connection in silent)
        more = [SILENT["tcp"](hasty) for _ in range(40)]
        exchange(link, activation())
        assert all(ends(connection) for connection in more)


@pytest.mark.parametrize(
    ("soft", "hard", "room", "raised"),
    [
        (1024, 4096, 2048, 4096),
        (1024, 1024, 512, 1024),
        (256, 10**6, 4096, 8192),
        (10**6, 10**6, 4096, 10**6),
        (1024, resource.RLIM_INFINITY, 4096, 8192),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4096, resource.RLIM_INFINITY),
    ],
)
def test_half_of_the_descriptors_are_left_to_files(
    soft: int, hard: int, room: int, raised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {resource.RLIMIT_NOFILE: (soft, hard)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert server_end.make_room(4096) == room
    assert limits[resource.RLIMIT_NOFILE] == (raised, hard)


# Pings


def test_pings_measure_the_link_and_no_handler_sees_them(server: StreamServer) -> None:
    seen: list[Frame] = []

    def note(frame: Frame) -> Frame:
        seen.append(frame)
        return Finished()

    with StreamLink(server.endpoint, server.admit(note, max_frame_bytes=1000)) as link:
        pong = exchange(link, Ping(torch.ones(7, dtype=torch.uint8), 5))
        assert isinstance(pong, Pong)
        assert pong.payload.dtype == torch.uint8 and pong.payload.tolist() == [0] * 5
        for speed in link.measure():
            assert 1e5 < speed < 1e12
        assert link.bytes_up > 2**17 and link.bytes_down > 2**17
        assert not seen
        exchange(link, Finish(0.0))
        assert len(seen) == 1


def test_measuring_stops_at_a_tenth_of_a_second_or_8_mib() -> None:
    for rate in (1e5, 1e7, 1e12):
        sizes: list[int] = []

        def transfer(size: int, rate: float = rate, sizes: list[int] = sizes) -> float:
            sizes.append(size)
            return size / rate

        assert client_end._speed(transfer) == pytest.approx(rate)
        assert sizes == [2**power for power in range(16, 16 + len(sizes))]
        assert sizes[-1] == 2**23 or (sizes[-1] / rate > 0.1 and all(size / rate <= 0.1 for size in sizes[:-1]))


@pytest.mark.parametrize(("payload", "answer"), [(0, 2**23 + 1), (0, -1), (2**23 + 2**10, 0)])
def test_pings_are_bounded(plain: StreamServer, payload: int, answer: int) -> None:
    with (
        StreamLink(plain.endpoint, plain.admit(double, max_frame_bytes=1000)) as link,
        pytest.raises(StreamError, match=r"a ping asks for|Ping has .* bytes; at most"),
    ):
        exchange(link, Ping(torch.zeros(payload, dtype=torch.uint8), answer))


def test_a_stream_has_a_number_of_pings(plain: StreamServer) -> None:
    with StreamLink(plain.endpoint, plain.admit(double)) as link:
        for _ in range(served.PINGS):
            exchange(link, Ping(torch.zeros(0, dtype=torch.uint8), 0))
        with pytest.raises(StreamError, match=f"more than {served.PINGS} pings"):
            exchange(link, Ping(torch.zeros(0, dtype=torch.uint8), 0))
