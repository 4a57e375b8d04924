"""The stream: one bidirectional gRPC call per client and round, from the client to the server shard.

A Flower message costs seconds, a round trip on the stream milliseconds; hundreds of steps travel here and none there.
The train message carries an :class:`Endpoint`, whose certificate is pinned, and a random token; a stream without a
live token is refused.

    client   send -> frames -> gRPC  =====>  gRPC -> inbox -> handler     server
             receive <- inbox <- gRPC  <===  gRPC <- answers <-'

Every queue is bounded and has a thread of its own on its far side, so the wire is busy while either side computes,
and a side that is slow stops the other one instead of filling its memory. A frame travels as messages of at most
1 MiB, which are cut as they leave; the receiver takes memory for it once, after it has seen that it is not too long.

**A connection may break.** The handler of a client waits for it then, and the client comes back with its token: it says
how many answers it has, the server how many frames it has, and each sends again what the other lacks. So no frame is
lost, and none is answered twice. Frames stay with the client until they are answered. As it has at most ``in_flight``
and one under way, a frame that arrives tells which answers have arrived too. Who does not come back within the grace is
given up.

The port is open to whoever reaches it. A connection that shows no token within seconds is closed, no more of them are
taken than the process has room for, and a stream ends with its round, whether its client wants it or not.
"""

from __future__ import annotations

import socket

from hsplitlora_flwr.config import TransportConfig
from hsplitlora_flwr.transport.certificates import Identity, make_identity, read_identity
from hsplitlora_flwr.transport.link import Ticket, Transport, register_transport
from hsplitlora_flwr.transport.stream.channel import Unreachable
from hsplitlora_flwr.transport.stream.client import StreamLink
from hsplitlora_flwr.transport.stream.protocol import StreamError
from hsplitlora_flwr.transport.stream.server import StreamServer

__all__ = ["STREAM", "StreamError", "StreamLink", "StreamServer", "Unreachable", "open_port", "own_address"]


def open_port(settings: TransportConfig) -> StreamServer:
    """The stream's port, open, under the certificate that the settings name or a new one."""
    address = settings.address or own_address()
    return StreamServer(
        settings.bind or address,
        settings.port,
        identity=_identity(settings, address) if settings.tls else None,
        public=address,
        public_port=settings.public_port,
        in_flight=settings.in_flight,
        grace=settings.grace,
    )


def _connect(ticket: Ticket, settings: TransportConfig) -> StreamLink:
    return StreamLink(ticket.endpoint, ticket.token, settings.in_flight, settings.proxy, settings.grace)


STREAM = register_transport("stream", Transport(open_port, _connect))
register_transport("auto", STREAM)


def _identity(settings: TransportConfig, address: str) -> Identity:
    if settings.certificate:
        return read_identity(settings.certificate, settings.private_key)
    return make_identity(address)


def own_address() -> str:
    """This machine's address in its network, as others reach it; the loopback address without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: chooses a route, sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
