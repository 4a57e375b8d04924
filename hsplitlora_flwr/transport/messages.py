"""Frames over Flower messages, where the server can open no port; and how a round's messages are exchanged.

One message carries the frames of one step both ways: the gradients of a step go down, the activations of the next come
up. A client that trains over the stream sends a single reply; both kinds may take part in the same round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from hsplitlora_flwr.transport.frames import Frame, FrameError, decode, encode
from hsplitlora_flwr.transport.workers import WAKE, DeadWorkers, is_death

_FRAMES = "frames"
_SOONEST, _LATEST, _PATIENCE = 0.1, 2.0, 0.05
"""Seconds between two looks for replies, and the share of the time since the last one that they may come late by."""
_CALLS = 5
"""Times in an exchange that a living worker is looked for."""


def add_frames(records: RecordDict, frames: Sequence[Frame]) -> RecordDict:
    """Put frames into a message's content."""
    records[_FRAMES] = ConfigRecord({_FRAMES: [encode(frame) for frame in frames]})
    return records


def has_frames(records: RecordDict) -> bool:
    """Whether a message's content holds frames."""
    return _FRAMES in records


def read_frames(records: RecordDict, most: int | None = None, limit: int | None = None) -> list[Frame]:
    """The frames of a message's content; none if it holds none.

    Parameters
    ----------
    most : int, optional
        How many there may be.
    limit : int, optional
        Longest of them in bytes.

    Raises
    ------
    FrameError
        If they are damaged, or more or longer than allowed; that is seen before any is read.
    """
    parts = _parts(records)
    if most is not None and len(parts) > most:
        raise FrameError(f"a message with {len(parts):,} frames; at most {most:,} are accepted here")
    if limit is not None and (longest := max(map(len, parts), default=0)) > limit:
        raise FrameError(f"a message with a frame of {longest:,} bytes; at most {limit:,} are accepted here")
    return [decode(part) for part in parts]


def frame_bytes(records: RecordDict) -> int:
    """Bytes of the frames in a message's content."""
    return sum(map(len, _parts(records)))


def _parts(records: RecordDict) -> list[bytes]:
    if not has_frames(records):
        return []
    record = records[_FRAMES]
    parts = record.get(_FRAMES) if isinstance(record, ConfigRecord) else None
    if not isinstance(parts, list):
        raise FrameError("a message that says it holds frames holds none")
    if not all(isinstance(part, bytes) for part in parts):
        raise FrameError("the frames of a message are not bytes")
    return [part for part in parts if isinstance(part, bytes)]


def converse(
    grid: Grid,
    messages: Iterable[Message],
    answer: Callable[[Message], Message | None],
    timeout: float,
    dead: DeadWorkers | None = None,
    may_answer: Callable[[Message], bool] = lambda reply: True,
) -> Iterator[tuple[int, Message]]:
    """Send a message to each of several nodes, and answer their replies until every node has sent its last.

    Flower's own ``send_and_receive`` looks for replies every three seconds and waits for all of them; a step over
    messages would take as long. Here it is a tenth of a second at first, and longer while no reply comes: looking takes
    time of the processes that train. A grid that knows when a reply has come may have a ``wait`` of its own, which
    takes the place of ``time.sleep``. Replies say which message they belong to; those of a grid of threads do not, and
    are told by node and type, of which one message is under way at most. Of a node that is gone the SuperLink says so
    in a reply of its own.

    Parameters
    ----------
    grid : Grid
        The connection to the nodes.
    messages : Iterable[Message]
        One for each node.
    answer : Callable[[Message], Message or None]
        The next message to the node of a reply; None if the reply was its last.
    timeout : float
        Seconds after which nodes that have not sent their last reply are given up.
    dead : DeadWorkers, optional
        Those that died before; a message that one of them takes is sent again.
    may_answer : Callable[[Message], bool], optional
        Whether a reply's turn has come; one whose turn has not is kept, and asked about again.

    Yields
    ------
    tuple[int, Message]
        The node and its last reply, as they come; it may be an error.
    """
    dead = dead or DeadWorkers()
    pause: Callable[[float], None] = getattr(grid, "wait", None) or time.sleep
    waiting: dict[str, Message] = {}  # by message id
    taken: deque[tuple[Message, Message]] = deque()  # what dead workers took, and what they said
    kept: list[tuple[Message, Message]] = []  # replies whose turn has not come
    calls, last = 0, time.monotonic()

    def push(message: Message) -> None:
        [message_id] = grid.push_messages([message])
        if message_id is not None:
            waiting[message_id] = message

    def asked(reply: Message) -> Message | None:
        """The message that a reply belongs to, which does not wait for it any more."""
        which = reply.metadata.reply_to_message_id
        if which not in waiting:
            which = next((each for each, message in waiting.items() if _of(message) == _from(reply)), which)
        return waiting.pop(which, None)

    for message in messages:
        push(message)
    deadline = time.monotonic() + timeout
    while (waiting or taken or kept) and time.monotonic() < deadline:
        # in the order of their making, so that a death is told first by the message in whose work the worker died
        pulled = grid.pull_messages(list(waiting))
        replies = sorted(pulled, key=lambda reply: reply.metadata.created_at)
        came = [(found, reply) for reply in replies if (found := asked(reply))]
        due, kept = [*kept, *came], []
        for message, reply in due:
            called = message.metadata.message_type == WAKE
            if not (called or reply.has_error() or may_answer(reply)):
                kept.append((message, reply))
                continue
            last = time.monotonic()
            if dead.took(reply) and not called:
                taken.append((message, reply))
                continue
            following = None if reply.has_error() or called else answer(reply)
            if following is not None:
                push(following)
            elif not called:
                yield message.metadata.dst_node_id, reply
            if taken and not is_death(reply):
                push(_again(taken.popleft()[0]))
        if taken and not waiting:
            if calls == _CALLS:
                break
            calls += 1
            for node in grid.get_node_ids():
                push(Message(RecordDict(), node, WAKE))
        if waiting or taken or kept:
            pause(min(max(_PATIENCE * (time.monotonic() - last), _SOONEST), _LATEST))
    for message, reply in taken:
        yield message.metadata.dst_node_id, reply


def _of(message: Message) -> tuple[int, str]:
    return message.metadata.dst_node_id, message.metadata.message_type


def _from(reply: Message) -> tuple[int, str]:
    return reply.metadata.src_node_id, reply.metadata.message_type


def _again(message: Message) -> Message:
    return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)
