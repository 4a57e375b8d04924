"""``wire``: the stream against a bare gRPC echo."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue

import grpc
import torch

from hsplitlora_flwr.config.names import WIRES
from hsplitlora_flwr.transport.certificates import Identity, make_identity
from hsplitlora_flwr.transport.codecs import pack, unpack
from hsplitlora_flwr.transport.frames import Activation, Gradient, buffers, decode, encode
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from hsplitlora_flwr.transport.stream.chunks import CHUNK_BYTES
from simulations.benchmarks.common import Apart, Row, Setup, take_turns, timed

SHAPE = (8, 64)
"""(batch size, sequence length)."""
HIDDEN = (576, 4096)
"""Hidden sizes: of SmolLM2-135M, and of LLaMA-2-7B."""
DTYPES = tuple(name for name in WIRES if name != "float64")
TURN_BYTES = 2**26
"""Of a turn, up and down together, about."""
TURNS = 7

_METHOD = "/benchmark.Echo/{}"


def wire(setup: Setup) -> Iterator[Row]:
    """MB/s of the stream, and bytes per token, against a bare gRPC echo of the same bytes; TLS, over the loopback.

    A client in a process of its own sends the activations of a batch of 8 x 64 tokens, one after another, and each is
    answered by its gradient from this process before the next one leaves, as in training. What is not measured is what
    the model computes, and the casts of :func:`hsplitlora_flwr.transport.codecs.pack` and ``unpack``: these have their
    own figure, ``pack_ms``, for one tensor there and back.

    - ``echo``: a bidirectional gRPC call that carries bytes of the same lengths in messages of the same size. As the
      stream's server does, it answers a frame once it has all of it. Goal: the stream has at least 0.8 of its speed.
    - ``eager echo``: the same, but every message is answered at once, while the next ones still come. No server that
      has to see a frame before it answers can do that; it shows what both directions together could carry.

    - ``frames_ms``: of an exchange, what making the bytes of both frames and reading them again takes, on both sides.
    - ``rest_ms``: what else an exchange over the stream takes longer than over the echo. A frame passes from thread to
      thread: on the client from the caller to gRPC's sender, on the server from the reader to the one that computes to
      gRPC's sender, and on the client from the reader to the caller.

    Bytes count up and down. Speeds are medians over turns, and ``spread`` is the distance between the quartiles of
    ``stream / echo``.
    """
    identity = make_identity("127.0.0.1")
    with ExitStack() as stack:
        server = StreamServer("127.0.0.1", 0, identity=identity)
        stack.callback(server.stop)
        echo = stack.enter_context(echo_server(identity))
        client = stack.enter_context(Apart(Sender))
        for hidden in HIDDEN:
            for dtype in DTYPES:
                activation, gradient = make_frames(hidden, dtype)
                token = server.admit(lambda _, answer=gradient: answer)  # type: ignore[misc]
                up, down = len(encode(activation)), len(encode(gradient))
                frames = max(TURN_BYTES // (up + down), 1)
                client.call("open", server.endpoint, token, echo, hidden, dtype)
                ways = [partial(client.call, way, frames) for way in ("stream", "whole", "eager")]
                seconds = take_turns(ways, TURNS)
                client.call("close")
                [packing] = take_turns([partial(timed, partial(_pack, _state(hidden), dtype))], TURNS)
                [codec] = take_turns([partial(timed, partial(_code, activation, gradient))], TURNS)
                megabytes = frames * (up + down) / 1e6
                stream, whole, eager = seconds
                ratio = whole / stream
                yield {
                    "hidden": hidden,
                    "wire": dtype,
                    "bytes_per_token up": up / (SHAPE[0] * SHAPE[1]),
                    "bytes_per_token down": down / (SHAPE[0] * SHAPE[1]),
                    "stream_mb_per_s": megabytes / stream.median,
                    "echo_mb_per_s": megabytes / whole.median,
                    "eager_echo_mb_per_s": megabytes / eager.median,
                    "stream / echo": ratio.median,
                    "spread": ratio.spread,
                    "stream / eager echo": (eager / stream).median,
                    "pack_ms": 1e3 * packing.median,
                    "frames_ms": 1e3 * codec.median,
                    "rest_ms": 1e3 * ((stream.median - whole.median) / frames - codec.median),
                }


def make_frames(hidden: int, dtype: str) -> tuple[Activation, Gradient]:
    """A batch's activation, and its answer."""
    state = _state(hidden)
    values, scale = pack(state, dtype)
    ids = torch.ones(SHAPE, dtype=torch.int64)
    label_tokens = SHAPE[0] * (SHAPE[1] - 1)
    return Activation(0, values, scale, ids, ids, label_tokens, True, 0.0), Gradient(values, scale, 1.0, 1.0)


def _state(hidden: int) -> torch.Tensor:
    return torch.randn(*SHAPE, hidden, generator=torch.Generator().manual_seed(0))


def _pack(state: torch.Tensor, dtype: str) -> None:
    unpack(*pack(state, dtype), torch.float32, "cpu")


def _code(*frames: Activation | Gradient) -> None:
    for frame in frames:
        decode(bytearray().join(buffers(frame)))


class Sender:
    """The client process."""

    def open(self, endpoint: Endpoint, token: str, echo: Endpoint, hidden: int, dtype: str) -> None:
        """Connect to the stream and to the echo, to exchange frames of this hidden size and dtype."""
        self._frame, answer = make_frames(hidden, dtype)
        sizes = len(encode(self._frame)), len(encode(answer))
        self._link = StreamLink(endpoint, token).__enter__()
        self._calls = {way: EchoCall(echo, way, *sizes) for way in ("whole", "eager")}

    def stream(self, frames: int) -> float:
        """Seconds that so many frames and their answers take over the stream."""
        return timed(partial(self._exchange, frames))

    def whole(self, frames: int) -> float:
        """The same over the echo that answers whole frames."""
        return timed(partial(self._calls["whole"].exchange, frames))

    def eager(self, frames: int) -> float:
        """The same over the echo that answers messages."""
        return timed(partial(self._calls["eager"].exchange, frames))

    def close(self) -> None:
        """End all calls."""
        self._link.__exit__(None, None, None)
        for call in self._calls.values():
            call.close()

    def _exchange(self, frames: int) -> None:
        for _ in range(frames):
            self._link.send(self._frame)
            self._link.receive()


class EchoCall:
    """One call of the echo.

    Parameters
    ----------
    endpoint : Endpoint
        The echo.
    way : {"whole", "eager"}
        When it answers.
    up, down : int
        Bytes of a frame and of its answer, at most as many.
    """

    def __init__(self, endpoint: Endpoint, way: str, up: int, down: int) -> None:
        self._messages = [bytes(min(CHUNK_BYTES, up - at)) for at in range(0, up, CHUNK_BYTES)]
        self._down = down
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        credentials = grpc.ssl_channel_credentials(root_certificates=endpoint.certificate.encode())
        self._channel = grpc.secure_channel(endpoint.address, credentials)
        sizes = (("up", str(up)), ("down", str(down)))
        call = self._channel.stream_stream(_METHOD.format(way), request_serializer=None, response_deserializer=None)
        self._answers: Iterator[bytes] = iter(call(iter(self._outbox.get, None), metadata=sizes))

    def exchange(self, frames: int) -> int:
        """Send so many frames, each after the answer to the one before; returns the bytes of all answers."""
        received = 0
        for frame in range(1, frames + 1):
            for message in self._messages:
                self._outbox.put(message)
            while received < frame * self._down:
                received += len(next(self._answers))
        return received

    def close(self) -> None:
        """End the call."""
        self._outbox.put(None)
        self._channel.close()


@contextmanager
def echo_server(identity: Identity) -> Iterator[Endpoint]:
    """An echo that answers in both ways, under this certificate; it ends with the context."""
    server = grpc.server(ThreadPoolExecutor(4))
    methods = {way: grpc.stream_stream_rpc_method_handler(partial(_echo, way)) for way in ("whole", "eager")}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", methods),))
    credentials = grpc.ssl_server_credentials([(identity.private_key, identity.certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield Endpoint(f"127.0.0.1:{port}", identity.pin, identity.name)
    finally:
        server.stop(grace=None).wait()


def _echo(way: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    sizes = dict(context.invocation_metadata())
    up, down = int(sizes["up"]), int(sizes["down"])
    held: list[bytes] = []
    received = sent = 0
    for message in requests:
        received += len(message)
        held.append(message)
        if way == "eager" or received == up:
            for each in held:
                if answer := each[: down - sent]:
                    sent += len(answer)
                    yield answer
            held.clear()
        if received == up:
            received = sent = 0
