"""The stream: one bidirectional gRPC call per client and round, from the client to the server shard.

A Flower message costs seconds, a round trip on the stream milliseconds; hundreds of steps travel here and none there.
The train message carries an :class:`Endpoint`, whose certificate is pinned, and a random token; a stream without a
live token is refused.

    client   send -> frames -> gRPC  =====>  gRPC -> inbox -> handler     server
             receive <- inbox <- gRPC  <===  gRPC <- answers <-'

Every queue is bounded and has a thread of its own on its far side, so the wire is busy while either side computes,
and a side that is slow stops the other one instead of filling its memory. A frame travels as messages of at most
1 MiB, which are cut as they leave; the receiver takes memory for it once, after it has seen that it is not too long.

**A connection may break.** The handler of a client waits for it then, and the client comes back with its token: it says
how many answers it has, the server how many frames it has, and each sends again what the other lacks. So no frame is
lost, and none is answered twice. Frames stay with the client until they are answered. As it has at most ``in_flight``
and one under way, a frame that arrives tells which answers have arrived too. Who does not come back within the grace is
given up.

The port is open to whoever reaches it. A connection that shows no token within seconds is closed, no more of them are
taken than the process has room for, and a stream ends with its round, whether its client wants it or not.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock, Thread, Timer
from types import TracebackType

import grpc
import torch

from hsplitlora_flwr.config import TransportConfig
from hsplitlora_flwr.transport.backlog import Backlog
from hsplitlora_flwr.transport.certificates import Identity, make_identity, read_identity
from hsplitlora_flwr.transport.chunks import CHUNK_BYTES, PING_BYTES, assemble, cut
from hsplitlora_flwr.transport.frames import (
    Buffer,
    Failure,
    Frame,
    FrameError,
    Ping,
    Pong,
    buffers,
    decode,
)
from hsplitlora_flwr.transport.link import Endpoint, Handler, Ticket, Transport, register_transport
from hsplitlora_flwr.transport.mailbox import Closed, Mailbox

log = logging.getLogger(__name__)

CONNECT_SECONDS = 8.0
"""Time in which a stream must open."""
END_SECONDS = 5.0
"""Time that a client has to leave its stream when the round is over."""
STOP_SECONDS = 1.0
"""The same when the port is closed."""
FAILED_SECONDS = 1.0
"""Time that a client which failed takes to say that it leaves."""
PINGS = 64
"""Pings of a stream that are answered: a measurement takes fewer than 20."""
MAX_FRAME_BYTES = 2**34
"""Longest frame, where nothing less is asked for."""

_SERVICE, _METHOD = "hsplitlora.Shard", "Train"
_TOKEN_KEY = "hsplitlora-token"
_HAS_KEY = "hsplitlora-has"
"""Of the client, with its token: how many answers it has. Of the server, when it lets a client in: how many frames."""
_LEAVE = b""
"""A client's last message."""
_CONNECTIONS = 4096
_OPTIONS = [
    # A peer that is gone is noticed within 3 s + 7 s, however long a step takes without a byte on the wire. A ping
    # waits behind all that was sent before, up to 4 MB in the system's own buffers: 7 s at 5 Mbit/s.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 7_000),
    ("grpc.http2.ping_timeout_ms", 7_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.so_reuseport", 0),
    # Else a channel shares connections, and the back-off after a failure, with those before it.
    ("grpc.use_local_subchannel_pool", 1),
]

# Of a server, whose clients show their token as soon as they are connected, in the only call that they make.
_SERVER_OPTIONS = [
    ("grpc.server_handshake_timeout_ms", 5_000),  # TLS and the first frame of HTTP/2
    ("grpc.http2.settings_timeout", 5_000),
    ("grpc.max_connection_idle_ms", 5_000),  # without a call
    # Then it takes no more calls and is closed behind the last, which may last as long as it likes.
    ("grpc.max_connection_age_ms", 10_000),
    ("grpc.max_concurrent_streams", 1),
]


class StreamError(RuntimeError):
    """The stream cannot be opened, or it broke; the text says what was tried."""


class Unreachable(StreamError):
    """No stream of the server shard answers at its address."""


class _TurnedAway(Unreachable):
    """What answers closed the connection, as a server does that has no room for another one at the moment."""


class StreamServer:
    """Serves the handlers of a round's clients on one port.

    Parameters
    ----------
    bind : str
        Address to listen on.
    port : int
        Port to listen on; 0 takes any free one.
    identity : Identity or None
        Certificate and key of the server; None for plain text.
    public, public_port : str, int
        Host and port that clients connect to, where they are not those that the server listens on.
    in_flight : int
        Frames of a client that wait for its handler at most; as many of its answers may wait to be sent.
    max_frame_bytes : int
        Longest frame that is accepted.
    grace : float
        Seconds that a client has to come back when its connection broke; 0 = it is given up at once.

    Attributes
    ----------
    endpoint : Endpoint
        What clients need to connect.

    Raises
    ------
    StreamError
        If the port cannot be opened.
    """

    def __init__(
        self,
        bind: str,
        port: int,
        *,
        identity: Identity | None,
        public: str = "",
        public_port: int = 0,
        in_flight: int = 1,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        grace: float = 0.0,
    ) -> None:
        self._in_flight, self._max_frame_bytes, self._grace = in_flight, max_frame_bytes, grace
        self._lock = Lock()
        self._streams: dict[str, _Stream] = {}  # by the token that opens each
        # A stream holds its thread for a whole round; threads are made only as streams come.
        self._threads = ThreadPoolExecutor(max_workers=1024, thread_name_prefix="stream-send")
        limit = ("grpc.max_allowed_incoming_connections", make_room(_CONNECTIONS))
        self._server = grpc.server(self._threads, options=[*_OPTIONS, *_SERVER_OPTIONS, limit])
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
        try:
            bound = self._listen(_host_port(bind, port), identity)
        except RuntimeError as error:
            raise StreamError(
                f"{_host_port(bind, port)}, transport.port={port}: the port cannot be opened ({error}); choose another "
                "one, or 0 for any free one, and check that transport.bind is an address of this machine"
            ) from None
        self.endpoint = Endpoint(
            _host_port(public or bind, public_port or bound),
            identity.pin if identity else "",
            identity.name if identity else "",
        )
        self._server.start()

    @property
    def open_streams(self) -> int:
        """Streams with a connection."""
        with self._lock:
            return sum(stream.connected for stream in self._streams.values())

    def admit(
        self,
        handler: Handler,
        max_frame_bytes: int | None = None,
        ended: Callable[[], None] = lambda: None,
        name: str = "a client",
    ) -> str:
        """Let one client in.

        Parameters
        ----------
        handler : Handler
            Answers its frames, one after another, on one thread.
        max_frame_bytes : int, optional
            Longest of them, where it is less than the server's.
        ended : Callable[[], None], optional
            Called once, on that thread, after the last of them, however the stream ended.
        name : str
            How the log calls the client.

        Returns
        -------
        str
            The token that its stream must show.
        """
        token = secrets.token_urlsafe(32)
        limit = max_frame_bytes or self._max_frame_bytes
        with self._lock:
            self._streams = {each: stream for each, stream in self._streams.items() if not stream.over}
            self._streams[token] = _Stream(handler, self._in_flight, limit, ended, name, self._grace)
        return token

    def serve(self, handler: Handler, max_frame_bytes: int, ended: Callable[[], None], name: str) -> Ticket:
        """Let one client in, as :class:`hsplitlora_flwr.transport.link.Port` says; see :meth:`admit`."""
        return Ticket(self.endpoint, self.admit(handler, max_frame_bytes, ended, name))

    def dismiss_all(self) -> None:
        """End the round: its tokens die.

        Streams that are open end behind the frame that is being answered, and are cut off after :data:`END_SECONDS`.
        """
        with self._lock:
            over, self._streams = list(self._streams.values()), {}
        for stream in over:
            stream.dismiss()

    def stop(self) -> None:
        """Close the port and end every stream."""
        self.dismiss_all()
        self._server.stop(grace=STOP_SECONDS).wait()
        self._threads.shutdown(wait=False)

    def _listen(self, address: str, identity: Identity | None) -> int:
        if identity is None:
            return self._server.add_insecure_port(address)
        pair = (identity.private_key, identity.certificate)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        call = _Call(requests, context.cancel)
        try:
            stream = self._find(str(metadata.get(_TOKEN_KEY, "")))
            has, answers = stream.connect(call, int(metadata.get(_HAS_KEY, 0)))
        except (LookupError, ValueError) as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError from error  # abort raises
        if not context.add_callback(lambda: stream.disconnect(call)):
            stream.disconnect(call)  # the client is gone already
        context.send_initial_metadata(((_HAS_KEY, str(has)),))  # tells the client that its token is good
        return answers

    def _find(self, shown: str) -> _Stream:
        with self._lock:
            for token, stream in self._streams.items():
                if hmac.compare_digest(token.encode(), shown.encode()) and not stream.over:
                    return stream
        raise LookupError("no live token")


class _Call:
    """One connection of a client.

    Parameters
    ----------
    requests : Iterator[bytes]
        What arrives.
    cancel : Callable[[], object]
        Cuts it off.
    """

    def __init__(self, requests: Iterator[bytes], cancel: Callable[[], object]) -> None:
        self.requests, self.cancel = requests, cancel


class _Stream:
    """The server's side of one client: a thread reads, a thread computes, and gRPC's own thread sends.

    The thread that computes lasts as long as the stream, the others as long as one connection of it.
    """

    def __init__(
        self,
        handler: Handler,
        in_flight: int,
        max_frame_bytes: int,
        ended: Callable[[], None],
        name: str,
        grace: float,
    ) -> None:
        self._handler, self._ended = handler, ended
        self._max_frame_bytes, self._name, self._grace = max_frame_bytes, name, grace
        self._window = in_flight + 1  # frames that its client has under way at most
        self._inbox: Mailbox[Frame | FrameError] = Mailbox(in_flight)
        self._answers: Backlog[list[Buffer]] = Backlog(self._window + 1)  # and word that the round is over
        self._arrived, self._pings = 0, 0  # frames that are here, pings among them
        self._begun = self._left = False  # its client came; there is nothing more to do for it
        self._call: _Call | None = None
        self._timer: Timer | None = None  # what ends it, where it does not come to its own end
        self._lock = Lock()
        self._reading = Lock()  # frames of a connection come behind those of the one before
        self.over = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._call is not None

    def connect(self, call: _Call, has: int) -> tuple[int, Iterator[bytes]]:
        """Go on over another connection, whose client has so many answers: how many frames of it are here, and the
        answers from there on, as messages.

        Raises
        ------
        LookupError
            If those answers are not kept, or the stream is over.
        """
        with self._lock:
            if self.over or (self._begun and not self._grace):
                raise LookupError("no live token")
            answers = self._answers.since(has)
            before, self._call = self._call, call
            self._stop_timer()
            Thread(target=self._read, args=(call,), name="stream-read", daemon=True).start()
            if not self._begun:
                self._begun = True
                Thread(target=self._compute, name="stream-compute", daemon=True).start()
        if before:
            before.cancel()
        return self._arrived, (message for answer in answers for message in cut(answer))

    def disconnect(self, call: _Call) -> None:
        """A connection is gone; its client may come back."""
        with self._lock:
            if self._call is not call:
                return
            self._call = None
            self._stop_timer()
            self._answers.hang_up()
            waits = self._grace and not self.over and not self._left
            if waits:
                self._start_timer(self._grace, self._give_up)
            else:
                self._close()
        if waits:
            log.warning("the connection of %s broke off; it has %g s to come back", self._name, self._grace)

    def dismiss(self) -> None:
        """Tell the client that the round is over, and end, whatever it does."""
        with self._lock:
            self.over = True
            self._inbox.close()
            self._stop_timer()
            if self._call:
                self._start_timer(END_SECONDS, self._call.cancel)
            else:
                self._close()

    def _give_up(self) -> None:
        with self._lock:
            if self._call is None:
                log.warning("%s did not come back within %g s", self._name, self._grace)
                self._close()

    def _close(self) -> None:
        """End the thread that computes as soon as it has done what it is at."""
        self.over = True
        self._inbox.close(discard=True)
        self._answers.close(discard=True)

    def _start_timer(self, seconds: float, then: Callable[[], object]) -> None:
        self._timer = Timer(seconds, then)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _read(self, call: _Call) -> None:
        try:
            for data in assemble(self._messages(call), self._max_frame_bytes, CHUNK_BYTES):
                if not self._deliver(call, decode(data)):
                    return
            self._left = True
        except FrameError as error:  # the client learns of it after the answers to what it sent before
            with suppress(Closed):
                self._deliver(call, error)
        except ConnectionError:
            if self._grace:
                return
        except Closed:
            pass
        self._inbox.close()

    @staticmethod
    def _messages(call: _Call) -> Iterator[bytes]:
        """What arrives before its client takes its leave; a call that ends otherwise broke, whatever gRPC says."""
        with suppress(grpc.RpcError):
            for message in call.requests:
                if message == _LEAVE:
                    return
                yield message
        raise ConnectionError

    def _deliver(self, call: _Call, frame: Frame | FrameError) -> bool:
        """Put a frame into the inbox; False if its connection is not the stream's any more."""
        with self._reading:
            with self._lock:
                if self._call is not call:
                    return False
                self._arrived += 1
            self._answers.arrived(self._arrived - self._window)
            self._inbox.put(frame)
            return True

    def _compute(self) -> None:
        last = False
        try:
            while not last and not self.over and (frame := next(self._inbox, None)) is not None:
                answer, last = self._answer(frame)
                self._answers.put(answer)
            if self.over and not last:
                self._answers.put(buffers(Failure("the round is over")))
        except Closed:
            pass
        finally:
            self._left = True  # there is nothing to come back for
            self._ended()
            self._inbox.close(discard=True)
            self._answers.close()

    def _answer(self, frame: Frame | FrameError) -> tuple[list[Buffer], bool]:
        """The answer's bytes, and whether it ends the stream."""
        try:
            if isinstance(frame, FrameError):
                raise frame
            answer = self._pong(frame) if isinstance(frame, Ping) else self._handler(frame)
            return buffers(answer), isinstance(answer, Failure)
        except Exception as error:  # the client must learn why, whatever it is
            failure = Failure.of(error)
            log.warning("the stream of %s ends: %s", self._name, failure.error)
            return buffers(failure), True

    def _pong(self, ping: Ping) -> Pong:
        self._pings += 1
        if self._pings > PINGS:
            raise ValueError(f"more than {PINGS} pings on a stream")
        if not 0 <= ping.answer_bytes <= PING_BYTES:
            raise ValueError(f"a ping asks for {ping.answer_bytes} bytes; from 0 to {PING_BYTES} are allowed")
        return Pong(torch.zeros(ping.answer_bytes, dtype=torch.uint8))


class StreamLink:
    """A client's end of the stream; a context manager.

    Parameters
    ----------
    endpoint : Endpoint
        The server shard.
    token : str
        The token of this client and round.
    in_flight : int
        Frames that may be under way at once. One more may be sent before :meth:`send` blocks, and as many answers
        wait for :meth:`receive` before the server is stopped. The server's is the same.
    proxy : bool
        Go through the proxy that ``grpc_proxy``, ``https_proxy`` or ``http_proxy`` names, save to hosts of
        ``no_proxy``. Without it none is used, whatever the environment says: it is made for the world outside, and a
        proxy there seldom reaches an address inside.
    grace : float
        Seconds in which it comes back when its connection broke; 0 = it does not.

    Attributes
    ----------
    bytes_up, bytes_down : int
        Bytes of all frames sent and received, pings included; those that are sent again count once.

    Raises
    ------
    Unreachable
        On entering, if no stream answers at the endpoint within :data:`CONNECT_SECONDS`.
    StreamError
        On entering, if the server refuses the token.
    """

    def __init__(
        self, endpoint: Endpoint, token: str, in_flight: int = 1, proxy: bool = False, grace: float = 0.0
    ) -> None:
        self._endpoint, self._token, self._proxy, self._grace = endpoint, token, proxy, grace
        self._frames: Backlog[list[Buffer]] = Backlog(in_flight + 1)  # until they are answered
        self._inbox: Mailbox[tuple[Frame, int]] = Mailbox(in_flight + 1)
        self._answered = 0
        self._ending = "the stream is closed"
        self._leaving = Event()
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> StreamLink:
        self._retry(self._connect, CONNECT_SECONDS, _TurnedAway)
        self._reader = Thread(target=self._read, name="stream-read", daemon=True)
        self._reader.start()
        return self

    def _retry(self, attempt: Callable[[], None], seconds: float, error: type[StreamError]) -> None:
        """Attempt something until it does not fail with that error, at growing distances; or the time is over."""
        end, pause = time.monotonic() + seconds, 0.25
        while True:
            try:
                return attempt()
            except error:
                if time.monotonic() + pause > end or self._leaving.wait(pause):
                    raise
            pause = min(2 * pause, 4.0)

    def _connect(self) -> None:
        """Open a connection, and go on where the one before ended."""
        self._channel = _channel(self._endpoint, self._proxy)
        call = self._channel.stream_stream(
            f"/{_SERVICE}/{_METHOD}", request_serializer=None, response_deserializer=None
        )
        has: Future[int] = Future()  # frames that the server has, as it says when it lets the client in

        def messages() -> Iterator[bytes]:
            with suppress(CancelledError):
                for frame in self._frames.since(has.result()):
                    yield from cut(frame)
                yield _LEAVE

        self._call = call(messages(), metadata=((_TOKEN_KEY, self._token), (_HAS_KEY, str(self._answered))))
        try:
            has.set_result(self._await_server())
        except BaseException:
            has.cancel()
            self._channel.close()
            raise

    def send(self, frame: Frame) -> None:
        """Queue a frame to be sent, as soon as there is room among those that are not answered; its tensors must not be
        written to until it is.

        Raises
        ------
        StreamError
            If the stream broke for good, or the server answered that it failed.
        FrameError
            If the frame cannot travel.
        """
        parts = buffers(frame)
        try:
            self._frames.put(parts)
        except Closed:
            raise StreamError(self._ending) from None
        self.bytes_up += sum(map(len, parts))

    def receive(self) -> Frame:
        """Wait for the next answer; they come in the order of the frames sent.

        Raises
        ------
        StreamError
            If the stream broke, or the server answered that it failed.
        """
        item = next(self._inbox, None)
        if item is None:
            raise StreamError(self._ending)
        frame, size = item
        self.bytes_down += size
        return frame

    def measure(self) -> tuple[float, float]:
        """Speed of the link up and down, in bytes/s; call it while no frame is under way.

        Pings of doubling size are timed until one takes more than 0.1 s beyond an empty one, or has 8 MiB.
        """
        round_trip = min(self._ping(0, 0) for _ in range(3))
        up = _speed(lambda size: self._ping(size, 0) - round_trip)
        down = _speed(lambda size: self._ping(0, size) - round_trip)
        return up, down

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._inbox.close(discard=True)
        self._frames.close(discard=kind is not None)
        # Let the server end its side: whose call is just cancelled may come back, and is waited for.
        self._reader.join(CONNECT_SECONDS if kind is None else FAILED_SECONDS)
        self._frames.close(discard=True)
        self._channel.close()
        self._reader.join()

    def _await_server(self) -> int:
        """Wait until the server has accepted the token; returns how many frames it has."""
        watch = Timer(CONNECT_SECONDS, self._call.cancel)
        watch.start()
        try:
            said = dict(self._call.initial_metadata() or ())  # arrives when the server accepts or the call fails
        finally:
            watch.cancel()
        if self._call.is_active() or self._call.code() is grpc.StatusCode.OK:
            return int(said.get(_HAS_KEY, 0))
        code, details = self._call.code(), self._call.details() or ""
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise StreamError(
                f"the server shard at {self._endpoint.address} refused the stream: {details}; "
                "the round that the token belongs to is over, or another stream used it"
            )
        if code is grpc.StatusCode.CANCELLED:
            details = f"no answer within {CONNECT_SECONDS:g} s, as when a firewall drops what is sent"
        protocol = "TLS" if self._endpoint.certificate else "plain text"
        protocol += f", through {_proxy_in_use()}" if self._proxy else ""
        kind = _TurnedAway if "Socket closed" in details or "reset by peer" in details else Unreachable
        raise kind(
            f"no stream to the server shard at {self._endpoint.address} ({protocol}): {_reason(details)}; check that "
            "transport.address and the port lead from this machine to the server, and that no firewall stands between; "
            "transport.proxy says whether to go through a proxy"
        )

    def _read(self) -> None:
        try:
            while not self._take_answers() and self._come_back():
                pass
        except FrameError as error:
            self._ending = f"the server shard at {self._endpoint.address} sent a bad frame: {error}"
        except Closed:
            pass
        finally:
            self._inbox.close()
            self._frames.close(discard=True)

    def _take_answers(self) -> bool:
        """Take what comes over this connection; whether the stream has come to its end with it."""
        address = self._endpoint.address
        try:
            for data in assemble(iter(self._call), MAX_FRAME_BYTES):
                answer = decode(data)
                if isinstance(answer, Failure):
                    self._ending = f"the server shard failed: {answer.error}"
                    return True
                self._answered += 1
                self._frames.arrived(self._answered)
                self._inbox.put((answer, len(data)))
        except grpc.RpcError as error:
            self._ending = f"the stream to {address} broke: {error.code().name}: {error.details()}"
            return False
        self._ending = f"the server shard at {address} ended the stream"
        return True

    def _come_back(self) -> bool:
        """Open another connection, if that can be done within the grace."""
        if not self._grace or self._leaving.is_set():
            return False
        log.warning("%s; trying for %g s to come back", self._ending, self._grace)
        self._frames.hang_up()
        self._channel.close()
        try:
            self._retry(self._connect, self._grace, Unreachable)
        except StreamError as error:
            self._ending += f"; it did not come back: {error}"
            return False
        log.warning("the stream to %s goes on", self._endpoint.address)
        return True

    def _ping(self, up: int, down: int) -> float:
        """Seconds until ``up`` bytes were answered by ``down``."""
        start = time.perf_counter()
        self.send(Ping(torch.zeros(up, dtype=torch.uint8), down))
        if not isinstance(self.receive(), Pong):
            raise StreamError("a ping was answered by another frame's answer; measure while no frame is under way")
        return time.perf_counter() - start


def open_port(settings: TransportConfig) -> StreamServer:
    """The stream's port, open, under the certificate that the settings name or a new one."""
    address = settings.address or own_address()
    return StreamServer(
        settings.bind or address,
        settings.port,
        identity=_identity(settings, address) if settings.tls else None,
        public=address,
        public_port=settings.public_port,
        in_flight=settings.in_flight,
        grace=settings.grace,
    )


def _connect(ticket: Ticket, settings: TransportConfig) -> StreamLink:
    return StreamLink(ticket.endpoint, ticket.token, settings.in_flight, settings.proxy, settings.grace)


STREAM = register_transport("stream", Transport(open_port, _connect))
register_transport("auto", STREAM)


def _identity(settings: TransportConfig, address: str) -> Identity:
    if settings.certificate:
        return read_identity(settings.certificate, settings.private_key)
    return make_identity(address)


def own_address() -> str:
    """This machine's address in its network, as others reach it; the loopback address without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: chooses a route, sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _channel(endpoint: Endpoint, proxy: bool = False) -> grpc.Channel:
    options: list[tuple[str, str | int]] = [*_OPTIONS, ("grpc.enable_http_proxy", int(proxy))]
    if not endpoint.certificate:
        return grpc.insecure_channel(endpoint.address, options=options)
    credentials = grpc.ssl_channel_credentials(root_certificates=endpoint.certificate.encode())
    options.append(("grpc.ssl_target_name_override", endpoint.name))
    return grpc.secure_channel(endpoint.address, credentials, options=options)


def _proxy_in_use() -> str:
    """Where gRPC finds the proxy; not its address, which may hold a password."""
    name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
    return f"the proxy of {name}" if name else "no proxy, as grpc_proxy, https_proxy and http_proxy are not set"


def make_room(connections: int) -> int:
    """How many of ``connections`` this process has descriptors for, of which half are left to files.

    Where its limit is lower it is raised, as far as that is allowed.
    """
    try:
        import resource
    except ImportError:  # Windows, where there is no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return min(wanted, max(soft, allowed)) // 2


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _speed(seconds: Callable[[int], float]) -> float:
    """Bytes/s of the first transfer that takes long enough to be timed, or of the largest one."""
    size = 2**16
    while (taken := seconds(size)) <= 0.1 and size < PING_BYTES:
        size *= 2
    return size / max(taken, 1e-6)


_MEANINGS = {
    "certificate has expired": "the server's certificate has expired, by this machine's clock",
    "certificate is not yet valid": "the server's certificate is not valid yet, by this machine's clock",
    "CERTIFICATE_VERIFY_FAILED": "what answers there shows another certificate than the one of this run's server",
    "Hostname Verification": "what answers there shows a certificate that is made out to another name",
    "WRONG_VERSION_NUMBER": "what answers there does not speak TLS",
    "Socket closed": "what answers there closed the connection; is transport.tls the same on both sides?",
}


def _reason(details: str) -> str:
    """What gRPC says went wrong on the way to the server, and what that means where its words do not tell."""
    reason = details.rpartition("last error: ")[2]
    for words, meaning in _MEANINGS.items():
        if words in reason:
            return f"{meaning} ({reason})"
    return reason
