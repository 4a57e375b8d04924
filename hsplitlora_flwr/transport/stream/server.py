"""The server's end of the stream: one port, and behind it a stream for each client of the round.

What becomes of one client's stream is :mod:`hsplitlora_flwr.transport.stream.served`.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import grpc

from hsplitlora_flwr.transport.certificates import Identity
from hsplitlora_flwr.transport.frames import Frame
from hsplitlora_flwr.transport.link import Endpoint, Guest, Handler, Ticket
from hsplitlora_flwr.transport.stream import protocol
from hsplitlora_flwr.transport.stream.protocol import HAS_KEY, MAX_FRAME_BYTES, METHOD, SERVICE, TOKEN_KEY, StreamError
from hsplitlora_flwr.transport.stream.served import Call, ServedStream

log = logging.getLogger(__name__)

STOP_SECONDS = 1.0
"""Time that clients have to leave their streams when the port is closed."""

_CONNECTIONS = 4096

# Of a server, whose clients show their token as soon as they are connected, in the only call that they make.
_SERVER_OPTIONS = [
    ("grpc.server_handshake_timeout_ms", 5_000),  # TLS and the first frame of HTTP/2
    ("grpc.http2.settings_timeout", 5_000),
    ("grpc.max_connection_idle_ms", 5_000),  # without a call
    # Then it takes no more calls and is closed behind the last, which may last as long as it likes.
    ("grpc.max_connection_age_ms", 10_000),
    ("grpc.max_concurrent_streams", 1),
]


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
        self._streams: dict[str, ServedStream] = {}  # by the token that opens each
        # A stream holds its thread for a whole round; threads are made only as streams come.
        self._threads = ThreadPoolExecutor(max_workers=1024, thread_name_prefix="stream-send")
        limit = ("grpc.max_allowed_incoming_connections", make_room(_CONNECTIONS))
        self._server = grpc.server(self._threads, options=[*protocol.OPTIONS, *_SERVER_OPTIONS, limit])
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: method}),))
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
            Called once, when none comes any more, however the stream ended; also while one is answered.
        name : str
            How the log calls the client.

        Returns
        -------
        str
            The token that its stream must show.
        """
        return self._let_in(_OneTask(handler, max_frame_bytes or self._max_frame_bytes, ended), name)

    def serve(self, handler: Handler, max_frame_bytes: int, ended: Callable[[], None], name: str) -> Ticket:
        """Let one client in, as :class:`hsplitlora_flwr.transport.link.Port` says; see :meth:`admit`."""
        return Ticket(self.endpoint, self.admit(handler, max_frame_bytes, ended, name))

    def keep(self, guest: Guest, name: str) -> Ticket:
        """Let one client in, as :class:`hsplitlora_flwr.transport.link.LastingPort` says."""
        return Ticket(self.endpoint, self._let_in(guest, name))

    def dismiss(self, ticket: Ticket) -> None:
        """End one client's stream, as :meth:`dismiss_all` ends all."""
        with self._lock:
            stream = self._streams.pop(ticket.token, None)
        if stream:
            stream.dismiss()

    def dismiss_all(self) -> None:
        """End the round: its tokens become invalid.

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

    def _let_in(self, guest: Guest, name: str) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._streams = {each: stream for each, stream in self._streams.items() if not stream.over}
            self._streams[token] = ServedStream(guest, self._in_flight, name, self._grace)
        return token

    def _listen(self, address: str, identity: Identity | None) -> int:
        if identity is None:
            return self._server.add_insecure_port(address)
        pair = (identity.private_key, identity.certificate)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        call = Call(requests, context.cancel)
        try:
            stream = self._find(str(metadata.get(TOKEN_KEY, "")))
            has, answers = stream.connect(call, int(metadata.get(HAS_KEY, 0)))
        except (LookupError, ValueError) as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError from error  # abort raises
        if not context.add_callback(lambda: stream.disconnect(call)):
            stream.disconnect(call)  # the client is gone already
        context.send_initial_metadata(((HAS_KEY, str(has)),))  # tells the client that its token is good
        return answers

    def _find(self, shown: str) -> ServedStream:
        with self._lock:
            for token, stream in self._streams.items():
                if hmac.compare_digest(token.encode(), shown.encode()) and not stream.over:
                    return stream
        raise LookupError("no live token")


class _OneTask:
    """A guest for one task.

    Parameters
    ----------
    handler, max_frame_bytes, ended
        As for :meth:`StreamServer.admit`.
    """

    def __init__(self, handler: Handler, max_frame_bytes: int, ended: Callable[[], None]) -> None:
        self._handler, self._max_frame_bytes, self._ended = handler, max_frame_bytes, ended

    def __call__(self, frame: Frame) -> Frame:
        return self._handler(frame)

    def limit(self, kind: type[Frame]) -> int:
        return self._max_frame_bytes

    def opened(self) -> None:
        """Nothing to do."""

    def ended(self, lost: bool) -> None:
        self._ended()


def make_room(connections: int) -> int:
    """How many of ``connections`` this process has file descriptors for, half of which are left to files.

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
