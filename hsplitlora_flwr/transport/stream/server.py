"""The server's end of the stream: one port, and behind it a stream for each client of the round."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock, Thread, Timer

import grpc
import torch

from hsplitlora_flwr.transport.certificates import Identity
from hsplitlora_flwr.transport.frames import Buffer, Failure, Frame, FrameError, Ping, Pong, buffers, decode
from hsplitlora_flwr.transport.link import Endpoint, Guest, Handler, Ticket
from hsplitlora_flwr.transport.stream import protocol
from hsplitlora_flwr.transport.stream.backlog import Backlog, Closed
from hsplitlora_flwr.transport.stream.chunks import CHUNK_BYTES, PING_BYTES, assemble, cut
from hsplitlora_flwr.transport.stream.protocol import (
    HAS_KEY,
    LEAVE,
    MAX_FRAME_BYTES,
    METHOD,
    SERVICE,
    TOKEN_KEY,
    StreamError,
)

log = logging.getLogger(__name__)

END_SECONDS = 5.0
"""Time that a client has to leave its stream when the round is over."""
STOP_SECONDS = 1.0
"""The same when the port is closed."""
PINGS = 64
"""Pings of a stream that are answered: a measurement takes fewer than 20."""

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
        self._streams: dict[str, _Stream] = {}  # by the token that opens each
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

    def _let_in(self, guest: Guest, name: str) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._streams = {each: stream for each, stream in self._streams.items() if not stream.over}
            self._streams[token] = _Stream(guest, self._in_flight, name, self._grace)
        return token

    def _listen(self, address: str, identity: Identity | None) -> int:
        if identity is None:
            return self._server.add_insecure_port(address)
        pair = (identity.private_key, identity.certificate)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        call = _Call(requests, context.cancel)
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

    def _find(self, shown: str) -> _Stream:
        with self._lock:
            for token, stream in self._streams.items():
                if hmac.compare_digest(token.encode(), shown.encode()) and not stream.over:
                    return stream
        raise LookupError("no live token")


class _OneTask:
    """A guest that stays for one task.

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
        """Nobody asks."""

    def ended(self, lost: bool) -> None:
        self._ended()


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

    def __init__(self, guest: Guest, in_flight: int, name: str, grace: float) -> None:
        self._guest, self._name, self._grace = guest, name, grace
        self._window = in_flight + 1  # frames that its client has under way at most
        self._inbox: Backlog[Frame | FrameError] = Backlog(in_flight, keep=False)
        self._answers: Backlog[list[Buffer]] = Backlog(self._window + 1)  # and word that the round is over
        self._arrived, self._pings = 0, 0  # frames that are here, pings among them
        self._begun = self._left = False  # its client came; there is nothing more to do for it
        self._dismissed = False  # by the server
        self._told = False  # the guest, that it is over
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
                self._guest.opened()
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
        else:
            self._tell(lost=not (self._left or self._dismissed))

    def dismiss(self) -> None:
        """Tell the client that the round is over, and end, whatever it does."""
        with self._lock:
            self.over = self._dismissed = True
            self._inbox.close()
            self._stop_timer()
            if self._call:
                self._start_timer(END_SECONDS, self._call.cancel)
            else:
                self._close()

    def _give_up(self) -> None:
        with self._lock:
            if self._call is not None:
                return
            self._close()
        log.warning("%s did not come back within %g s", self._name, self._grace)
        self._tell(lost=True)

    def _tell(self, *, lost: bool) -> None:
        """Tell the guest that it is over, once."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._guest.ended(lost)

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
            for data in assemble(self._messages(call), self._guest.limit, CHUNK_BYTES):
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
                if message == LEAVE:
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
        frames, last = self._inbox.since(0), False
        try:
            while not last and not self.over and (frame := next(frames, None)) is not None:
                answer, last = self._answer(frame)
                self._answers.put(answer)
            if self.over and not last:
                self._answers.put(buffers(Failure("the round is over")))
        except Closed:
            pass
        finally:
            self._left = True  # there is nothing to come back for
            self._tell(lost=False)
            self._inbox.close(discard=True)
            self._answers.close()

    def _answer(self, frame: Frame | FrameError) -> tuple[list[Buffer], bool]:
        """The answer's bytes, and whether it ends the stream."""
        try:
            if isinstance(frame, FrameError):
                raise frame
            answer = self._pong(frame) if isinstance(frame, Ping) else self._guest(frame)
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
