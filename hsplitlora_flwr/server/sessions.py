"""Flower messages that last: one message takes a client through many tasks, which arrive over its stream.

Every message of Flower costs a node the start of a process. So a client that has finished its task over the stream may
keep the message open: its reply goes over the stream, and so does what would have been its next message::

    Flower's message   task, address, token ------------------------------------------------->  reply, and nothing in it
    its stream            activations, gradients ...  Reply -> Request  ...  Reply -> Request  ...  Reply -> Released

:class:`Sessions` is told of the rounds; messages are sent through :mod:`hsplitlora_flwr.server.session_grid`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from threading import Condition, Event

from flwr.app import Message, RecordDict

from hsplitlora_flwr.messages import ReplyError, pack_content, reading, token_of, unpack_content
from hsplitlora_flwr.training.allowance import Refused
from hsplitlora_flwr.transport.frames import Frame, Released, Reply, Request
from hsplitlora_flwr.transport.link import Handler, LastingPort, Ticket

log = logging.getLogger(__name__)

DESCRIPTION_BYTES = 8 << 20
"""Longest reply of a client that has no task: it says who it is."""


class Session:
    """The server's side of one message of a client, from its first task to its end.

    The frames of a task are answered by its handler (:meth:`begin`) on the thread of the stream. A :class:`Reply` waits
    on that thread for the client's next message, which :meth:`send` or :meth:`release` gives on another thread.

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
        Its stream has been opened.
    waiting : bool
        The client has finished its task and waits for the next message.
    over : bool
        Nothing comes over the stream any more.
    lost : bool
        The client did not leave by itself: its connection broke, and it did not come back.
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
        """There is no task: only a description may come."""
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
        """Give a waiting client its next message; False if it no longer waits."""
        if not self.waiting:
            return False
        return self._follow(Request(message.metadata.message_type, pack_content(message.content)))

    def release(self) -> bool:
        """Let a waiting client end its message; False if it does not wait."""
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
        Is told when messages no longer last.
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
        """Use this port from now on."""
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
        """Release all other clients: they have no part in the round."""
        for session in list(self._held.values()):
            if session.client not in clients:
                self._end(session)

    def rest(self) -> None:
        """All tasks are over: waiting clients go on waiting, the sessions of the others end."""
        for session in list(self._held.values()):
            session.rest()
            if not session.waiting:
                self._end(session)

    def expel(self, client: str) -> None:
        """A client failed: its session ends, and its next task comes in a Flower message of its own."""
        for session in self._of(client):
            self._end(session)

    def give_up(self, why: str) -> None:
        """No message lasts any longer than its task, from now on."""
        if self._rounds != 1:
            self._rounds = 1
            self._say(f"{why}, so every task is a message of its own from here on (train.rounds_per_message=1)")
        self.let_go()

    def let_go(self) -> None:
        """If no message is to last, release all waiting clients."""
        for session in list(self._held.values()):
            if session.waiting and not self.last:
                self._end(session)

    @property
    def any_waits(self) -> bool:
        """Whether any client waits."""
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
