"""The way from a client to the server: a channel that trusts one certificate, and what is wrong where none opens."""

from __future__ import annotations

import os

import grpc

from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import protocol
from hsplitlora_flwr.transport.stream.protocol import StreamError


class Unreachable(StreamError):
    """No stream of the server shard answers at its address."""


class TurnedAway(Unreachable):
    """The other end closed the connection, as a server does that has no room for another one at the moment."""


def open_channel(endpoint: Endpoint, proxy: bool = False) -> grpc.Channel:
    """A connection to the endpoint that trusts its certificate alone; it opens with the first call."""
    options: list[tuple[str, str | int]] = [*protocol.OPTIONS, ("grpc.enable_http_proxy", int(proxy))]
    if not endpoint.certificate:
        return grpc.insecure_channel(endpoint.address, options=options)
    credentials = grpc.ssl_channel_credentials(root_certificates=endpoint.certificate.encode())
    options.append(("grpc.ssl_target_name_override", endpoint.name))
    return grpc.secure_channel(endpoint.address, credentials, options=options)


def proxy_in_use() -> str:
    """Where gRPC finds the proxy; not its address, which may hold a password."""
    name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
    return f"the proxy of {name}" if name else "no proxy, as grpc_proxy, https_proxy and http_proxy are not set"


_MEANINGS = {
    "certificate has expired": "the server's certificate has expired, by this machine's clock",
    "certificate is not yet valid": "the server's certificate is not valid yet, by this machine's clock",
    "CERTIFICATE_VERIFY_FAILED": "what answers there shows another certificate than the one of this run's server",
    "Hostname Verification": "what answers there shows a certificate that is made out to another name",
    "WRONG_VERSION_NUMBER": "what answers there does not speak TLS",
    "Socket closed": "what answers there closed the connection; is transport.tls the same on both sides?",
}


def reason_of(details: str) -> str:
    """gRPC's reason why the server was not reached, with its meaning where the words do not tell it."""
    reason = details.rpartition("last error: ")[2]
    for words, meaning in _MEANINGS.items():
        if words in reason:
            return f"{meaning} ({reason})"
    return reason
