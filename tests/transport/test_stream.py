"""The stream over real sockets: who gets in, what overlaps, what is bounded, and how each way of failing reads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from hsplitlora_flwr.transport import stream
from hsplitlora_flwr.transport.certificates import Identity, make_identity
from hsplitlora_flwr.transport.frames import (
    Activation,
    Finish,
    Finished,
    Frame,
    Gradient,
    Loss,
    Ping,
    Pong,
    encode,
)
from hsplitlora_flwr.transport.stream import (
    Endpoint,
    StreamError,
    StreamLink,
    StreamServer,
    Unreachable,
)
from tests.transport.pki import certificate, p256, pem

IDENTITY = make_identity("shard")
NONE = torch.empty(0)
SECONDS = 20.0  # after which a wait has failed


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


def test_plain_text_and_tls_do_not_meet() -> None:
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
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 0.3)
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
        link._outbox.put([b"no frame, but as long as a prefix"])
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
        with pytest.raises(StreamError, match=f"the stream to {plain.endpoint.address} broke: "):
            link.receive()
        with pytest.raises(StreamError, match="broke: "):
            link.send(activation())


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
        assert until(lambda: link._inbox._items.qsize() == 4)
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

        assert stream._speed(transfer) == pytest.approx(rate)
        assert sizes == [2**power for power in range(16, 16 + len(sizes))]
        assert sizes[-1] == 2**23 or (sizes[-1] / rate > 0.1 and all(size / rate <= 0.1 for size in sizes[:-1]))


@pytest.mark.parametrize(("payload", "answer"), [(0, 2**23 + 1), (0, -1), (2**23 + 2**10, 0)])
def test_pings_are_bounded(plain: StreamServer, payload: int, answer: int) -> None:
    with (
        StreamLink(plain.endpoint, plain.admit(double, max_frame_bytes=1000)) as link,
        pytest.raises(StreamError, match=r"a ping asks for|Ping has .* bytes; at most"),
    ):
        exchange(link, Ping(torch.zeros(payload, dtype=torch.uint8), answer))
