"""Frames as messages of a stream: cut before they leave, put together in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from hsplitlora_flwr.transport.frames import Buffer, Frame, FrameError, Ping, check_total, read_prefix

CHUNK_BYTES = 2**20
"""Longest message; gRPC takes 4 MiB unless it is told otherwise."""
PING_BYTES = 2**23
"""Longest payload of a ping or pong."""

_PING_FRAME_BYTES = PING_BYTES + 2**10


def cut(parts: Iterable[Buffer], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of ``parts`` one after another, in messages of ``size`` bytes and a shorter last one."""
    pieces: list[memoryview] = []
    room = size
    for part in parts:
        rest = memoryview(part)
        while rest:
            piece, rest = rest[:room], rest[room:]
            pieces.append(piece)
            room -= len(piece)
            if not room:
                yield b"".join(pieces)
                pieces, room = [], size
    if pieces:
        yield b"".join(pieces)


def assemble(
    messages: Iterator[bytes], max_frame_bytes: int | Callable[[type[Frame]], int], least: int = 1
) -> Iterator[memoryview]:
    """The frames that :func:`cut` made ``messages`` of, each in memory of its own that may be written to.

    Parameters
    ----------
    messages : Iterator[bytes]
        What arrives.
    max_frame_bytes : int or Callable[[type[Frame]], int]
        Longest frame that is accepted, or of a kind at that moment.
    least : int
        Fewest bytes of a message that does not end its frame: each takes time, however short it is.

    Raises
    ------
    FrameError
        If a message does not begin a frame where one must, or the frame is longer than ``max_frame_bytes`` (before
        memory is taken for it) or than it says, or ends early.
    """
    for message in messages:
        prefix = read_prefix(message)
        most = max_frame_bytes(prefix.kind) if callable(max_frame_bytes) else max_frame_bytes
        check_total(prefix, max(most, _PING_FRAME_BYTES) if prefix.kind is Ping else most)
        try:
            data = np.empty(prefix.total, np.uint8).data  # not filled with zeros first
        except MemoryError as error:
            raise FrameError(f"there is no memory for a frame of {prefix.total} bytes: {error}") from None
        filled = 0
        while True:
            end = filled + len(message)
            if not message or end > prefix.total or (end < prefix.total and len(message) < least):
                raise FrameError(f"a frame of {prefix.total} bytes goes on with {len(message)} after {filled}")
            data[filled:end] = message
            filled = end
            if filled == prefix.total:
                break
            following = next(messages, None)
            if following is None:
                raise FrameError(f"a frame of {prefix.total} bytes ended after {filled}")
            message = following
        yield data
