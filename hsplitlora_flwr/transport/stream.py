"""The stream: one bidirectional gRPC call per client and round, from the client to the server shard.

A Flower message costs seconds, a round trip on the stream milliseconds; hundreds of steps travel here and none there.
The train message carries an :class:`Endpoint`, whose certificate is pinned, and a random token; a stream without a
live token is refused.

    client   send -> outbox -> gRPC  =====>  gRPC -> inbox -> handler     server
             receive <- inbox <- gRPC  <===  gRPC <- outbox <-'

Every mailbox is bounded and has a thread of its own on its far side, so the wire is busy while either side computes,
and a side that is slow stops the other one instead of filling its memory. A frame travels as messages of at most
1 MiB, which are cut as they leave; the receiver takes memory for it once, after it has seen that it is not too long.

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock, Thread, Timer
from types import TracebackType
from typing import Any

import grpc
import torch

from hsplitlora_flwr.config import TransportConfig
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
PINGS = 64
"""Pings of a stream that are answered: a measurement takes fewer than 20."""
MAX_FRAME_BYTES = 2**34
"""Longest frame, where nothing less is asked for."""

_SERVICE, _METHOD = "hsplitlora.Shard", "Train"
_TOKEN_KEY = "hsplitlora-token"
_CONNECTIONS = 4096
_OPTIONS = [
    # A peer that is gone is noticed within 30 s + 20 s, however long a step takes without a byte on the wire.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
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
    ) -> None:
        self._in_flight = in_flight
        self._max_frame_bytes = max_frame_bytes
        self._lock = Lock()
        self._admitted: dict[str, _Stream] = {}
        self._open: set[_Stream] = set()
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
        """Streams that are open now."""
        return len(self._open)

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
            The token that its stream must show, once.
        """
        token = secrets.token_urlsafe(32)
        with self._lock:
            limit = max_frame_bytes or self._max_frame_bytes
            self._admitted[token] = _Stream(handler, self._in_flight, limit, ended, name)
        return token

    def serve(self, handler: Handler, max_frame_bytes: int, ended: Callable[[], None], name: str) -> Ticket:
        """Let one client in, as :class:`hsplitlora_flwr.transport.link.Port` says; see :meth:`admit`."""
        return Ticket(self.endpoint, self.admit(handler, max_frame_bytes, ended, name))

    def dismiss_all(self) -> None:
        """End the round: tokens that no stream has used die.

        Streams that are open end behind the frame that is being answered, and are cut off after :data:`END_SECONDS`.
        """
        with self._lock:
            self._admitted.clear()
            for stream in self._open:
                stream.dismiss()

    def stop(self) -> None:
        """Close the port and end every stream."""
        self._server.stop(grace=None).wait()
        self._threads.shutdown(wait=False)

    def _listen(self, address: str, identity: Identity | None) -> int:
        if identity is None:
            return self._server.add_insecure_port(address)
        pair = (identity.private_key, identity.certificate)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream = self._claim(context)
        if not context.add_callback(lambda: self._end(stream)):
            self._end(stream)  # the client is gone already
        context.send_initial_metadata(())  # tells the client that its token is good
        return stream.run(requests)

    def _claim(self, context: grpc.ServicerContext) -> _Stream:
        """Open the stream of a token, which no second call can use."""
        shown = str(dict(context.invocation_metadata()).get(_TOKEN_KEY, ""))
        with self._lock:
            token = next((t for t in self._admitted if hmac.compare_digest(t.encode(), shown.encode())), None)
            if token is not None:
                stream = self._admitted.pop(token)
                stream.open(context.cancel)
                self._open.add(stream)
                return stream
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no live token")
        raise AssertionError  # abort raises

    def _end(self, stream: _Stream) -> None:
        stream.close()
        with self._lock:
            self._open.discard(stream)


class _Stream:
    """The server's side of one client: a thread reads, a thread computes, and gRPC's own thread sends."""

    def __init__(
        self, handler: Handler, in_flight: int, max_frame_bytes: int, ended: Callable[[], None], name: str
    ) -> None:
        self._handler, self._ended = handler, ended
        self._max_frame_bytes, self._name = max_frame_bytes, name
        self._over, self._pings = False, 0
        self._inbox: Mailbox[Frame | FrameError] = Mailbox(in_flight)
        self._outbox: Mailbox[list[Buffer]] = Mailbox(in_flight)

    def open(self, cancel: Callable[[], Any]) -> None:
        """Belong to a call from now on, which ``cancel`` cuts off."""
        self._cut_off = Timer(END_SECONDS, cancel)
        self._cut_off.daemon = True

    def dismiss(self) -> None:
        """Tell the client that the round is over, and end, whatever it does."""
        if not self._over:
            self._over = True
            self._inbox.close()
            self._cut_off.start()

    def run(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer what arrives; yields the answers as messages."""
        Thread(target=self._read, args=(requests,), name="stream-read", daemon=True).start()
        Thread(target=self._compute, name="stream-compute", daemon=True).start()
        for answer in self._outbox:
            yield from cut(answer)

    def close(self) -> None:
        """End both threads as soon as they have done what they are at."""
        self._cut_off.cancel()
        self._inbox.close(discard=True)
        self._outbox.close(discard=True)

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for data in assemble(requests, self._max_frame_bytes, CHUNK_BYTES):
                self._inbox.put(decode(data))
        except FrameError as error:  # the client learns of it after the answers to what it sent before
            with suppress(Closed):
                self._inbox.put(error)
        except grpc.RpcError:
            log.warning("the stream of %s broke off", self._name)
        except Closed:
            pass
        finally:
            self._inbox.close()

    def _compute(self) -> None:
        last = False
        try:
            while not last and not self._over and (frame := next(self._inbox, None)) is not None:
                answer, last = self._answer(frame)
                self._outbox.put(answer)
            if self._over and not last:
                self._outbox.put(buffers(Failure("the round is over")))
        except Closed:
            pass
        finally:
            self._ended()
            self._inbox.close(discard=True)
            self._outbox.close()

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
        wait for :meth:`receive` before the server is stopped.
    proxy : bool
        Go through the proxy that ``grpc_proxy``, ``https_proxy`` or ``http_proxy`` names, save to hosts of
        ``no_proxy``. Without it none is used, whatever the environment says: it is made for the world outside, and a
        proxy there seldom reaches an address inside.

    Attributes
    ----------
    bytes_up, bytes_down : int
        Bytes of all frames sent and received, pings included.

    Raises
    ------
    Unreachable
        On entering, if no stream answers at the endpoint within :data:`CONNECT_SECONDS`.
    StreamError
        On entering, if the server refuses the token.
    """

    def __init__(self, endpoint: Endpoint, token: str, in_flight: int = 1, proxy: bool = False) -> None:
        self._endpoint = endpoint
        self._proxy = proxy
        self._token = token
        self._in_flight = in_flight
        self._outbox: Mailbox[list[Buffer]] = Mailbox(in_flight + 1)
        self._inbox: Mailbox[tuple[Frame, int]] = Mailbox(in_flight + 1)
        self._ending = "the stream is closed"
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> StreamLink:
        end, pause = time.monotonic() + CONNECT_SECONDS, 0.25
        while True:
            try:
                self._connect()
                break
            except _TurnedAway:
                if time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            pause *= 2
        self._reader = Thread(target=self._read, name="stream-read", daemon=True)
        self._reader.start()
        return self

    def _connect(self) -> None:
        self._outbox = Mailbox(self._in_flight + 1)
        self._channel = _channel(self._endpoint, self._proxy)
        call = self._channel.stream_stream(
            f"/{_SERVICE}/{_METHOD}", request_serializer=None, response_deserializer=None
        )
        messages = (message for frame in self._outbox for message in cut(frame))
        self._call = call(messages, metadata=((_TOKEN_KEY, self._token),))
        try:
            self._await_server()
        except BaseException:
            self._outbox.close(discard=True)
            self._channel.close()
            raise

    def send(self, frame: Frame) -> None:
        """Queue a frame to be sent; its tensors must not be written to until it is answered.

        Raises
        ------
        StreamError
            If the stream broke, or the server answered that it failed.
        FrameError
            If the frame cannot travel.
        """
        parts = buffers(frame)
        try:
            self._outbox.put(parts)
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
        self._inbox.close(discard=True)
        if kind is None:  # let the server end its side: a call that is just cancelled looks like a client that died
            self._outbox.close()
            self._reader.join(CONNECT_SECONDS)
        self._outbox.close(discard=True)
        self._channel.close()
        self._reader.join()

    def _await_server(self) -> None:
        """Wait until the server has accepted the token."""
        watch = Timer(CONNECT_SECONDS, self._call.cancel)
        watch.start()
        try:
            self._call.initial_metadata()  # arrives when the server accepts or the call fails
        finally:
            watch.cancel()
        if self._call.is_active() or self._call.code() is grpc.StatusCode.OK:
            return
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
        address = self._endpoint.address
        try:
            for data in assemble(iter(self._call), MAX_FRAME_BYTES):
                answer = decode(data)
                if isinstance(answer, Failure):
                    self._ending = f"the server shard failed: {answer.error}"
                    return
                self._inbox.put((answer, len(data)))
            self._ending = f"the server shard at {address} ended the stream"
        except grpc.RpcError as error:
            self._ending = f"the stream to {address} broke: {error.code().name}: {error.details()}"
        except FrameError as error:
            self._ending = f"the server shard at {address} sent a bad frame: {error}"
        except Closed:
            pass
        finally:
            self._inbox.close()
            self._outbox.close(discard=True)

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
    )


def _connect(ticket: Ticket, settings: TransportConfig) -> StreamLink:
    return StreamLink(ticket.endpoint, ticket.token, settings.in_flight, settings.proxy)


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
