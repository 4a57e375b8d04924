"""A client's end of the stream: it opens a connection, and another one when that breaks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from threading import Event, Thread, Timer
from types import TracebackType

import grpc
import torch

from hsplitlora_flwr.transport.frames import Buffer, Failure, Frame, FrameError, Ping, Pong, buffers, decode
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream.backlog import Backlog, Closed
from hsplitlora_flwr.transport.stream.channel import TurnedAway, Unreachable, open_channel, proxy_in_use, reason_of
from hsplitlora_flwr.transport.stream.chunks import PING_BYTES, assemble, cut
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

CONNECT_SECONDS = 8.0
"""Time in which a stream must open."""
FAILED_SECONDS = 1.0
"""Time in which a client that failed tells the server that it leaves."""


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
        self._inbox: Backlog[tuple[Frame, int]] = Backlog(in_flight + 1, keep=False)
        self._answers = self._inbox.since(0)
        self._answered = 0
        self._ending = "the stream is closed"
        self._leaving = Event()
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> StreamLink:
        self._retry(self._connect, CONNECT_SECONDS, TurnedAway)
        self._reader = Thread(target=self._read, name="stream-read", daemon=True)
        self._reader.start()
        return self

    def _retry(self, attempt: Callable[[], None], seconds: float, error: type[StreamError]) -> None:
        """Call ``attempt`` until it no longer raises ``error``, with growing pauses, for at most ``seconds``."""
        end, pause = time.monotonic() + seconds, 0.25
        while True:
            try:
                return attempt()
            except error:
                if time.monotonic() + pause > end or self._leaving.wait(pause):
                    raise
            pause = min(2 * pause, 4.0)

    def _connect(self) -> None:
        """Open a connection, and continue where the one before ended."""
        self._channel = open_channel(self._endpoint, self._proxy)
        call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", request_serializer=None, response_deserializer=None)
        has: Future[int] = Future()  # frames that the server has, as it says when it lets the client in

        def messages() -> Iterator[bytes]:
            with suppress(CancelledError):
                for frame in self._frames.since(has.result()):
                    yield from cut(frame)
                yield LEAVE

        self._call = call(messages(), metadata=((TOKEN_KEY, self._token), (HAS_KEY, str(self._answered))))
        try:
            has.set_result(self._await_server())
        except BaseException:
            has.cancel()
            self._channel.close()
            raise

    def send(self, frame: Frame) -> None:
        """Queue a frame, as soon as there is room among the unanswered ones. Its tensors must not be written to until
        it is answered.

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
        item = next(self._answers, None)
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
            return int(said.get(HAS_KEY, 0))
        code, details = self._call.code(), self._call.details() or ""
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise StreamError(
                f"the server shard at {self._endpoint.address} refused the stream: {details}; "
                "the round that the token belongs to is over, or another stream used it"
            )
        if code is grpc.StatusCode.CANCELLED:
            details = f"no answer within {CONNECT_SECONDS:g} s, as when a firewall drops what is sent"
        protocol = "TLS" if self._endpoint.certificate else "plain text"
        protocol += f", through {proxy_in_use()}" if self._proxy else ""
        kind = TurnedAway if "Socket closed" in details or "reset by peer" in details else Unreachable
        raise kind(
            f"no stream to the server shard at {self._endpoint.address} ({protocol}): {reason_of(details)}; check that "
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
        """Take the answers of this connection until it ends; returns whether the stream ended with it."""
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
        """Open another connection within the grace; returns whether that worked."""
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
        """Seconds until ``up`` bytes were answered by ``down`` bytes."""
        start = time.perf_counter()
        self.send(Ping(torch.zeros(up, dtype=torch.uint8), down))
        if not isinstance(self.receive(), Pong):
            raise StreamError("a ping was answered by another frame's answer; measure while no frame is under way")
        return time.perf_counter() - start


def _speed(seconds: Callable[[int], float]) -> float:
    """Bytes/s of the first transfer that takes long enough to be timed, or of the largest one."""
    size = 2**16
    while (taken := seconds(size)) <= 0.1 and size < PING_BYTES:
        size *= 2
    return size / max(taken, 1e-6)
