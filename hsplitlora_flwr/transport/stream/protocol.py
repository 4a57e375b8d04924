"""What both ends of a stream agree on: the call, the metadata, the last message, and gRPC's options."""

from __future__ import annotations

MAX_FRAME_BYTES = 2**34
"""Longest frame, where nothing less is asked for."""

SERVICE, METHOD = "hsplitlora.Shard", "Train"
TOKEN_KEY = "hsplitlora-token"
HAS_KEY = "hsplitlora-has"
"""Of the client, with its token: how many answers it has. Of the server, when it lets a client in: how many frames."""
LEAVE = b""
"""A client's last message."""

OPTIONS = [
    # A peer that is gone is noticed within 3 s + 7 s, however long a step takes without a byte on the wire. A ping
    # waits behind all that was sent before, up to 4 MB in the system's own buffers: 7 s at 5 Mbit/s.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 7_000),
    ("grpc.http2.ping_timeout_ms", 7_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.so_reuseport", 0),
    # Else a channel shares connections, and the back-off after a failure, with those before it.
    ("grpc.use_local_subchannel_pool", 1),
]


class StreamError(RuntimeError):
    """The stream cannot be opened, or it broke; the text says what was tried."""
