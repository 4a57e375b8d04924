"""What carries frames, whatever carries them: a port on the server, and on each client a link to it.

::

    server   port.serve(handler) -> ticket   ==(in the task's message)==>   connect(ticket) -> link   client
             handler(frame) -> answer        <=======================       link.send, link.receive

A ticket travels inside Flower's message and lets one client in, once. Frames become bytes by
:func:`hsplitlora_flwr.transport.frames.encode` and come back by ``decode``, which checks all that arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from hsplitlora_flwr.config import TransportConfig
from hsplitlora_flwr.config.names import KNOWN_TRANSPORTS
from hsplitlora_flwr.registry import Registry
from hsplitlora_flwr.transport.frames import Frame

Handler = Callable[[Frame], Frame]
"""Answers each frame of one client with one frame."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server shard is, and how to know it.

    Parameters
    ----------
    address : str
        What clients connect to: of the stream ``host:port``.
    certificate : str
        The server's own certificate, PEM, the only one that clients trust; empty for plain text.
    name : str
        Host that the certificate is made out to, whatever the address; empty for plain text.
    """

    address: str
    certificate: str = ""
    name: str = ""


class Ticket(NamedTuple):
    """What one client needs to connect: where the server is, and a secret that no other client has."""

    endpoint: Endpoint
    token: str


class Port(Protocol):
    """The server's end, for all clients of a run."""

    def serve(self, handler: Handler, max_frame_bytes: int, ended: Callable[[], None], name: str) -> Ticket:
        """Let one client in, without waiting for it.

        Parameters
        ----------
        handler : Handler
            Answers its frames, one after another, on one thread. What it raises the client is told in a
            :class:`~hsplitlora_flwr.transport.frames.Failure`, and is let out.
        max_frame_bytes : int
            A frame that is longer is refused before there is memory for it.
        ended : Callable[[], None]
            To be called once, when no frame comes any more, however the connection ended.
        name : str
            How the log calls the client.
        """

    def dismiss_all(self) -> None:
        """End the round: let nobody in any more with the tickets so far, and end what is open."""

    def stop(self) -> None:
        """Close the port."""


class Guest(Protocol):
    """What answers a client for as long as its stream lasts, over any number of tasks."""

    def __call__(self, frame: Frame) -> Frame:
        """The answer to a frame, as of a :data:`Handler`; it may take as long as it likes."""

    def limit(self, kind: type[Frame]) -> int:
        """Longest frame of a kind, in bytes, that may come now."""

    def opened(self) -> None:
        """The client has connected."""

    def ended(self, lost: bool) -> None:
        """The client is gone; ``lost`` if it did not leave by itself. Called once, possibly while it is answered."""


@runtime_checkable
class LastingPort(Port, Protocol):
    """A port whose streams may last from one task to the next."""

    def keep(self, guest: Guest, name: str) -> Ticket:
        """Let one client in, without waiting for it; ``name`` as for :meth:`serve`."""

    def dismiss(self, ticket: Ticket) -> None:
        """Let a client in no more, and end what is open once it has the answer that is being made."""


class Link(Protocol):
    """What carries frames to the server and its answers back, in order."""

    def send(self, frame: Frame) -> None:
        """Send a frame."""

    def receive(self) -> Frame:
        """The next answer."""


class MeasuredLink(Link, Protocol):
    """A link that counts the bytes it carried."""

    bytes_up: int
    bytes_down: int

    def measure(self) -> tuple[float, float]:
        """Speed up and down in bytes/s, while no frame is under way; 0 where it is not known."""


@dataclass(frozen=True)
class Transport:
    """How frames travel: the server's port, and a client's connection to it.

    Parameters
    ----------
    open : Callable[[TransportConfig], Port]
        Opens the server's port.
    connect : Callable[[Ticket, TransportConfig], AbstractContextManager[MeasuredLink]]
        A client's way in; the link is open within the context. ``in_flight`` frames may be sent before the first answer
        is received.
    """

    open: Callable[[TransportConfig], Port]
    connect: Callable[[Ticket, TransportConfig], AbstractContextManager[MeasuredLink]]


TRANSPORTS: Registry[Transport] = KNOWN_TRANSPORTS
"""Transports by name. ``messages`` is none of them: those frames travel in Flower's own messages, without a port."""


def register_transport(name: str, transport: Transport) -> Transport:
    """Make a transport known as ``transport.kind=<name>``; returns it.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return TRANSPORTS.register(name, transport)
