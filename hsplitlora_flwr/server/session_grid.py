"""A Flower grid that reaches a client over its stream where it can, and by Flower's messages otherwise.

The strategy sends messages and takes replies through the grid and does not know which way they go. A Flower message is
needed to reach a client first, to reach it again after its stream broke for good, and always where no stream opens.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from hsplitlora_flwr.messages import answering_here
from hsplitlora_flwr.server.sessions import Session, Sessions
from hsplitlora_flwr.transport.workers import WAKE, is_death

START_SECONDS = 120.0
"""Time in which a node that has a message opens its stream, while others wait; else it has no process to do so."""
LOST_SECONDS = 120.0
"""Time in which Flower says what became of a client that was given up; then its node is sent to whatever it says."""
LOOK_SECONDS = 3.0
"""From one look to the next whether Flower has lost a node whose message lasts."""
_SOON = 0.1
_FAILED = 8  # Flower's number of an error for a client that does not reply


@dataclass
class _Sent:
    """A message that is under way.

    Parameters
    ----------
    message : Message
    session : Session, optional
        Whose stream may bring the reply.
    over_stream : bool
        Whether the message took it too.
    at : float
        When it was sent.
    """

    message: Message
    session: Session | None
    over_stream: bool
    at: float


class SessionGrid(Grid):
    """A Flower grid that reaches a client over its stream while its message lasts, and by Flower otherwise.

    Parameters
    ----------
    grid : Grid
        Flower's.
    sessions : Sessions
    """

    def __init__(self, grid: Grid, sessions: Sessions) -> None:
        self._grid, self._sessions = grid, sessions
        self._sent: dict[str, _Sent] = {}  # by message id
        self._flower: dict[str, tuple[int, str]] = {}  # node and type, by Flower's id
        self._lasting: dict[int, tuple[str, Session]] = {}  # Flower's id of its message, by node
        self._numbers = itertools.count()
        self._looked = 0.0

    # ------------------------------------------------------------------ out

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node, asks = message.metadata.dst_node_id, message.metadata.message_type != WAKE
        named = self._sessions.of(message) if asks else None
        session = named or (self._lasting[node][1] if asks and node in self._lasting else None)
        if session and (session.send(message) or (named and session.begun)):
            message_id = f"session-{next(self._numbers)}"
            self._sent[message_id] = _Sent(message, session, True, time.monotonic())
            return message_id
        with self._on_grid():
            [message_id] = self._grid.push_messages([message])
        if message_id is not None:
            self._sent[message_id] = _Sent(message, named, False, time.monotonic())
            self._flower[message_id] = node, message.metadata.message_type
            if named:
                self._flower.pop(self._lasting.get(node, ("", None))[0], None)
                self._lasting[node] = message_id, named
        return message_id

    # ------------------------------------------------------------------ in

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [message_id for message_id in message_ids if message_id in self._sent]
        replies = [reply for message_id in wanted if (reply := self._over_stream(message_id))]
        by_flower = [each for each in wanted if each in self._sent and not self._sent[each].over_stream]
        replies += self._by_flower(by_flower)
        self._see_who_does_not_start()
        self._sessions.let_go()
        return replies

    def _over_stream(self, message_id: str) -> Message | None:
        """The reply that a stream brought, or an error if it will bring none and Flower need not be asked."""
        sent = self._sent[message_id]
        if sent.session is None:
            return None
        if (content := sent.session.take_reply()) is not None:
            del self._sent[message_id]
            return Message(content, reply_to=sent.message)
        if sent.session.lost:
            return self._failed(message_id, "its connection broke off, and it did not come back (transport.grace)")
        if sent.over_stream and sent.session.over and sent.message.metadata.dst_node_id not in self._lasting:
            return self._failed(message_id, "its stream ended")
        return None

    def _failed(self, message_id: str, reason: str) -> Message:
        return Message(Error(_FAILED, reason), reply_to=self._sent.pop(message_id).message)

    def _by_flower(self, wanted: list[str]) -> list[Message]:
        """Replies that Flower brought. The end of a lasting message answers what was sent over its stream."""
        lasting = {message_id: node for node, (message_id, _) in self._lasting.items()}
        ending = any(session.over for _, session in self._lasting.values())
        if ending or time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            wanted = [*wanted, *(message_id for message_id in lasting if message_id not in wanted)]
        if not wanted:
            return []
        with self._on_grid():
            pulled = list(self._grid.pull_messages(wanted))
        replies: list[Message] = []
        for reply in pulled:
            if is_death(reply):
                self._sessions.give_up("a worker process of the simulation died")
            message_id = self._replied_to(reply)
            self._flower.pop(message_id, None)
            node = lasting.get(message_id)
            if node is not None:
                replies += self._message_ended(node, reply)
            elif self._sent.pop(message_id, None):
                replies.append(reply)
        return replies

    def _replied_to(self, reply: Message) -> str:
        """The id of the message that a reply belongs to; grids that write none have one of a type under way."""
        what = reply.metadata.src_node_id, reply.metadata.message_type
        return reply.metadata.reply_to_message_id or next(
            (each for each, (node, kind) in self._flower.items() if (node, kind) == what), ""
        )

    def _message_ended(self, node: int, reply: Message) -> Iterator[Message]:
        message_id, session = self._lasting.pop(node)
        if reply.has_error():
            self._sessions.expel(session.client)
        if self._sent.pop(message_id, None):  # its own task was not replied to over the stream
            yield reply
        for other in [other for other, sent in self._sent.items() if sent.session is session]:
            error = reply.error if reply.has_error() else Error(_FAILED, "its message ended")
            yield Message(error, reply_to=self._sent.pop(other).message)

    def _see_who_does_not_start(self) -> None:
        """If a node has no process for its message while others keep theirs and wait, no message lasts any longer."""
        latest = time.monotonic() - START_SECONDS
        stuck = any(
            sent.at < latest and not sent.over_stream and not sent.session.begun
            for sent in self._sent.values()
            if sent.session
        )
        if stuck and self._sessions.any_waits:
            self._sessions.give_up("clients do not start while others keep their processes")

    def wait(self, seconds: float) -> None:
        """Return when a client has replied, or after so many seconds."""
        wait: Callable[[float], None] = getattr(self._grid, "wait", None) or time.sleep
        if not self._sessions.last:
            wait(seconds)
            return
        if any(not sent.over_stream and sent.session is None for sent in self._sent.values()):
            seconds = min(seconds, _SOON)  # Flower rings no bell
        self._sessions.bell.wait(seconds)
        self._sessions.bell.clear()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that can be sent to: not those whose client was given up, until Flower says what became of it."""
        with self._on_grid():
            nodes = list(self._grid.get_node_ids())
        since = time.monotonic() - LOST_SECONDS
        busy = {node for node, (_, session) in self._lasting.items() if since < session.ended_at < math.inf}
        return [node for node in nodes if node not in busy]

    @contextmanager
    def _on_grid(self) -> Iterator[None]:
        """Mark calls that may answer messages in this thread, as grids of tests do."""
        before = answering_here.set(True)
        try:
            yield
        finally:
            answering_here.reset(before)

    # ------------------------------------------------------------------ the rest of a grid

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)
