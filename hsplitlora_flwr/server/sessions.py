"""Flower messages that last: one takes a client through many tasks, each of which comes over its stream.

A message of Flower costs a node the start of a process. So a client that has done its task over the stream may keep
the message that brought it: what it would have replied goes over the stream, and so does what would have been its next
message::

    Flower's message   task, address, token ------------------------------------------------->  reply, and nothing in it
    its stream            activations, gradients ...  Reply -> Request  ...  Reply -> Request  ...  Reply -> Released

Who sends messages and takes replies does so through a grid, and does not know which way they go
(:class:`SessionGrid`). Flower's message stays the way in, and the way back in when a stream broke for good, and the
only way where none opens.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Event
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from hsplitlora_flwr.messages import (
    ReplyError,
    answering_here,
    pack_content,
    reading,
    token_of,
    unpack_content,
)
from hsplitlora_flwr.training.allowance import Refused
from hsplitlora_flwr.transport.frames import Frame, Released, Reply, Request
from hsplitlora_flwr.transport.link import Handler, LastingPort, Ticket
from hsplitlora_flwr.transport.workers import WAKE, is_death

log = logging.getLogger(__name__)

DESCRIPTION_BYTES = 8 << 20
"""Longest reply of a client that has no task: it says who it is."""
START_SECONDS = 120.0
"""Time in which a node that has a message opens its stream, while others wait; else it has no process to do so."""
LOST_SECONDS = 120.0
"""Time in which Flower says what became of a client that was given up; then its node is sent to whatever it says."""
LOOK_SECONDS = 3.0
"""From one look to the next whether Flower has lost a node whose message lasts."""
_SOON = 0.1
_FAILED = 8  # Flower's number of an error for a client that does not reply


class Session:
    """The server's side of one message of a client, from its first task to its end.

    The frames of a task are answered by whatever the task was given (:meth:`begin`), on the thread of the stream. A
    :class:`Reply` waits there for what comes next, which :meth:`send` and :meth:`release` say on another.

    Parameters
    ----------
    client : str
        Its name.
    first_round : int
        The round that it began in.
    bell : Callable[[], None]
        Called when something has come, or it is over.

    Attributes
    ----------
    begun : bool
        Its stream has been open.
    waiting : bool
        The client has done what it had to do, and waits.
    over : bool
        Nothing comes over the stream any more.
    lost : bool
        The client did not take its leave: its connection broke, and it did not come back.
    released : bool
        The client was let go, and so ends its message at once.
    ended_at : float
        When it was over otherwise, by ``time.monotonic``; infinite until then.
    """

    def __init__(self, client: str, first_round: int, bell: Callable[[], None]) -> None:
        self.client, self.first_round = client, first_round
        self.ticket: Ticket | None = None
        self.begun = self.waiting = self.over = self.lost = self.released = False
        self.ended_at = math.inf
        self._bell = bell
        self._handler: Handler | None = None
        self._leave: Callable[[], None] = lambda: None
        self._frame_bytes, self._reply_bytes = 0, DESCRIPTION_BYTES
        self._reply: RecordDict | None = None
        self._following: Request | Released | None = None
        self._changed = Condition()

    def begin(self, handler: Handler, frame_bytes: int, reply_bytes: int, leave: Callable[[], None]) -> None:
        """Another task.

        Parameters
        ----------
        handler : Handler
            Answers its frames.
        frame_bytes, reply_bytes : int
            Longest of them, and the longest reply.
        leave : Callable[[], None]
            Called when the client is gone.
        """
        self._handler, self._leave = handler, leave
        self._frame_bytes, self._reply_bytes = frame_bytes, max(reply_bytes, DESCRIPTION_BYTES)

    def rest(self) -> None:
        """There is no task any more: nothing but a description is to come."""
        self._handler, self._leave = None, lambda: None
        self._frame_bytes, self._reply_bytes = 0, DESCRIPTION_BYTES

    # ------------------------------------------------------------------ what the stream asks

    def limit(self, kind: type[Frame]) -> int:
        """Longest frame of a kind that may come now."""
        return self._reply_bytes if kind is Reply else self._frame_bytes

    def opened(self) -> None:
        """The client has come."""
        self.begun = True

    def __call__(self, frame: Frame) -> Frame:
        """The answer to a frame."""
        if isinstance(frame, Reply):
            return self._hand_in(frame)
        if self._handler is None:
            raise Refused(f"{type(frame).__name__} came where no task is under way")
        return self._handler(frame)

    def ended(self, lost: bool) -> None:
        """The stream is over; ``lost`` as the attribute."""
        with self._changed:
            if not self.over:
                self.lost, self.ended_at = lost, time.monotonic()
            self.over, self.waiting = True, False
            self._changed.notify_all()
        self._leave()
        self._bell()

    def _hand_in(self, frame: Reply) -> Request | Released:
        with reading("its reply"):
            reply = unpack_content(frame.content)
        with self._changed:
            if self.over:
                raise ReplyError("its reply came too late")
            self._reply, self.waiting = reply, True
        self._bell()
        with self._changed:
            self._changed.wait_for(lambda: self._following is not None or self.over)
            following, self._following = self._following, None
        if following is None:
            raise ReplyError("its stream is over")
        return following

    # ------------------------------------------------------------------ what the round does

    def take_reply(self) -> RecordDict | None:
        """The reply that has come, once."""
        with self._changed:
            reply, self._reply = self._reply, None
        return reply

    def send(self, message: Message) -> bool:
        """Give the client that waits its next message; False if it is gone meanwhile."""
        if not self.waiting:
            return False
        return self._follow(Request(message.metadata.message_type, pack_content(message.content)))

    def release(self) -> bool:
        """Let the client that waits end its message; False if none waits."""
        if self._follow(Released()):
            self.over = self.released = True
        return self.released

    def _follow(self, following: Request | Released) -> bool:
        with self._changed:
            if not self.waiting:
                return False
            self._following, self.waiting = following, False
            self._changed.notify_all()
            return True


class Sessions:
    """The sessions of a run.

    Parameters
    ----------
    rounds : int
        Rounds that one lasts; 0 = the whole run, 1 = none lasts longer than a task.
    say : Callable[[str], None]
        Is told when messages stop to last.
    """

    def __init__(self, rounds: int = 0, say: Callable[[str], None] = lambda text: None) -> None:
        self._rounds, self._say = rounds, say
        self._port: LastingPort | None = None
        self._held: dict[str, Session] = {}  # by token
        self.bell = Event()

    @property
    def last(self) -> bool:
        """Whether a client's message goes on after its task."""
        return self._rounds != 1 and self._port is not None

    def over(self, port: LastingPort) -> None:
        """Take this port."""
        self._port = port

    def admit(self, client: str, server_round: int) -> Session:
        """The session that a client's task belongs to: its own, if it waits for one, or a new one."""
        assert self._port is not None
        for session in self._of(client):
            if session.waiting and (not self._rounds or server_round < session.first_round + self._rounds):
                return session
            self._end(session)
        self._held = {token: session for token, session in self._held.items() if not session.over}
        session = Session(client, server_round, self.bell.set)
        session.ticket = self._port.keep(session, f"client {client}")
        self._held[session.ticket.token] = session
        return session

    def of(self, message: Message) -> Session | None:
        """The session that a message belongs to, by the token in it."""
        return self._held.get(token_of(message.content))

    def keep(self, clients: Collection[str]) -> None:
        """Let all others go: they have no part in the round."""
        for session in list(self._held.values()):
            if session.client not in clients:
                self._end(session)

    def rest(self) -> None:
        """The tasks so far are over: who waits goes on waiting, and the others are told."""
        for session in list(self._held.values()):
            session.rest()
            if not session.waiting:
                self._end(session)

    def expel(self, client: str) -> None:
        """A client failed: whatever comes next comes by a message of its own."""
        for session in self._of(client):
            self._end(session)

    def give_up(self, why: str) -> None:
        """No message lasts any longer than its task, from now on."""
        if self._rounds != 1:
            self._rounds = 1
            self._say(f"{why}, so every task is a message of its own from here on (train.rounds_per_message=1)")
        self.let_go()

    def let_go(self) -> None:
        """Let all go that wait, where none is to stay."""
        for session in list(self._held.values()):
            if session.waiting and not self.last:
                self._end(session)

    @property
    def any_waits(self) -> bool:
        """Whether there is a client that has nothing to do."""
        return any(session.waiting for session in self._held.values())

    def _of(self, client: str) -> list[Session]:
        return [session for session in self._held.values() if session.client == client]

    def _end(self, session: Session) -> None:
        assert self._port is not None and session.ticket is not None
        if not session.release():
            session.ended(lost=False)
        session.rest()
        self._port.dismiss(session.ticket)
        self._held.pop(session.ticket.token, None)


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
    """A Flower grid that reaches a client over the stream while its message lasts, and by Flower else.

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
        """The reply that a stream brought, or an error where it will bring none and Flower need not be asked."""
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
        """Replies that Flower brought; what it says of a message that lasts is said of what came over its stream."""
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
        """Where a node has no process for its message while others keep theirs and wait, none is kept any more."""
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
        """Around calls that may answer messages in this thread, as grids of tests do."""
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
