"""The stream: one bidirectional gRPC call per client and round, from the client to the server shard.

A Flower message costs seconds, a round trip on the stream milliseconds; hundreds of steps travel here and none there.
The train message carries the address and a random token, and a stream without a live token is refused.
"""

from __future__ import annotations

import hmac
import logging
import queue
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from types import TracebackType

import grpc

from hsplitlora_flwr.transport.frames import Failure, Frame, FrameError, decode, encode

log = logging.getLogger(__name__)

Handler = Callable[[Frame], Frame]
"""Answers each frame of one client with one frame."""

_SERVICE, _METHOD = "hsplitlora.Shard", "Train"
_TOKEN_KEY = "hsplitlora-token"
_CONNECT_SECONDS = 20.0
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.so_reuseport", 0),
]


class StreamError(RuntimeError):
    """The stream cannot be opened, or it broke; the text says what was tried."""


class StreamServer:
    """Serves the handlers of a round's clients on one port.

    Parameters
    ----------
    address : str
        Address to listen on.
    port : int
        Port; 0 takes any free one.

    Attributes
    ----------
    address : str
        ``host:port`` that clients connect to.
    open_streams : int
        Streams that are open now.

    Raises
    ------
    StreamError
        If the port cannot be opened.
    """

    def __init__(self, address: str, port: int) -> None:
        self._handlers: dict[str, Handler] = {}
        self._lock = Lock()
        self.open_streams = 0
        # A stream holds its thread for a whole round; threads are made only as streams come.
        self._server = grpc.server(ThreadPoolExecutor(max_workers=1024), options=_OPTIONS)
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
        try:
            bound = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as error:
            raise StreamError(
                f"transport.address={address}, transport.port={port}: the port cannot be opened ({error}); "
                "choose another one, or 0 for any free one"
            ) from None
        self.address = f"{address}:{bound}"
        self._server.start()

    def admit(self, handler: Handler) -> str:
        """Let one client in; returns the token that its stream must show."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._handlers[token] = handler
        return token

    def dismiss_all(self) -> None:
        """End the life of every token that no stream has used."""
        with self._lock:
            self._handlers.clear()

    def stop(self) -> None:
        """Close the port and end every stream."""
        self._server.stop(grace=None).wait()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        handler = self._claim(context)
        with self._lock:
            self.open_streams += 1
        try:
            for data in requests:
                try:
                    answer = handler(decode(data))
                except Exception as error:  # the client must learn why, whatever it is
                    log.exception("a stream failed")
                    yield encode(Failure(f"{type(error).__name__}: {error}"))
                    return
                yield encode(answer)
        except grpc.RpcError:
            log.warning("a client's stream broke off")
        finally:
            with self._lock:
                self.open_streams -= 1

    def _claim(self, context: grpc.ServicerContext) -> Handler:
        """The handler of a stream's token, which no second stream can use."""
        shown = str(dict(context.invocation_metadata()).get(_TOKEN_KEY, ""))
        with self._lock:
            token = next((t for t in self._handlers if hmac.compare_digest(t.encode(), shown.encode())), None)
            handler = self._handlers.pop(token) if token else None
        if handler is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no live token")
            raise AssertionError  # abort raises
        return handler


class StreamLink:
    """A client's end of the stream; a context manager.

    Parameters
    ----------
    address : str
        ``host:port`` of the server shard.
    token : str
        The token of this client and round.
    """

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> StreamLink:
        self._channel = grpc.insecure_channel(self._address, options=_OPTIONS)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=_CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise StreamError(
                f"no connection to the server shard at {self._address} within {_CONNECT_SECONDS:.0f} s; "
                "check transport.address, transport.port and the firewall between"
            ) from None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = self._channel.stream_stream(
            f"/{_SERVICE}/{_METHOD}", request_serializer=None, response_deserializer=None
        )
        self._answers = iter(call(iter(self._outbox.get, None), metadata=((_TOKEN_KEY, self._token),)))
        return self

    def exchange(self, frame: Frame) -> Frame:
        """Send a frame and wait for its answer.

        Raises
        ------
        StreamError
            If the stream breaks, or the server answers that it failed.
        """
        data = encode(frame)
        self.bytes_up += len(data)
        self._outbox.put(data)
        try:
            received = next(self._answers)
            self.bytes_down += len(received)
            answer = decode(received)
        except StopIteration:
            raise StreamError(f"the server shard at {self._address} ended the stream") from None
        except grpc.RpcError as error:
            raise StreamError(f"the stream to {self._address} broke: {error.code().name}: {error.details()}") from None
        except FrameError as error:
            raise StreamError(f"the server shard at {self._address} sent a bad frame: {error}") from error
        if isinstance(answer, Failure):
            raise StreamError(f"the server shard failed: {answer.error}")
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.put(None)
        if kind is None:  # let the server end its side: a channel that just closes looks like a client that died
            with suppress(grpc.RpcError):
                for _ in self._answers:
                    pass
        self._channel.close()
