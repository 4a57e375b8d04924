"""The stream and the proxy that the environment names: passed by unless asked for, over a real CONNECT proxy."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest

from hsplitlora_flwr.cli.superlink import _environment
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.frames import Finish, Finished, Frame
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer, Unreachable, own_address

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


class ConnectProxy:
    """Does CONNECT and nothing else; ``asked`` are the hosts and ports that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += client.recv(1)
                self.asked.append(head.split()[1].decode())
                host, _, port = self.asked[-1].rpartition(":")
                server = socket.create_connection((host.strip("[]"), int(port)))
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._ends += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    proxy = ConnectProxy()
    yield proxy
    proxy.close()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def server(request: pytest.FixtureRequest) -> Iterator[StreamServer]:
    """At this machine's address in its network, as in every simulation."""
    address = own_address()
    server = StreamServer(address, 0, identity=make_identity(address) if request.param else None)
    yield server
    server.stop()


def answer(frame: Frame) -> Frame:
    return Finished()


def exchange(server: StreamServer, *, proxy: bool) -> None:
    with StreamLink(server.endpoint, server.admit(answer), proxy=proxy) as link:
        link.send(Finish(0.0))
        assert isinstance(link.receive(), Finished)


@pytest.mark.parametrize("variable", VARIABLES)
def test_no_proxy_is_used_unless_asked_for(
    variable: str, server: StreamServer, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    exchange(server, proxy=False)
    assert proxy.asked == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_proxy_that_is_asked_for_carries_the_stream(
    variable: str, server: StreamServer, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    exchange(server, proxy=True)
    assert proxy.asked == [server.endpoint.address]
    monkeypatch.setenv("no_proxy", own_address())
    exchange(server, proxy=True)
    assert len(proxy.asked) == 1, "no_proxy names hosts that need none"


def test_what_failed_names_the_proxy(
    server: StreamServer, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.close()
    monkeypatch.setenv("https_proxy", f"http://user:secret@{proxy.url.removeprefix('http://')}")
    with pytest.raises(Unreachable, match=r"through the proxy of https_proxy\).*transport\.proxy says") as caught:
        exchange(server, proxy=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("exceptions", [{}, {"no_proxy": "here.example"}, {"no_grpc_proxy": "here.example"}], ids=str)
def test_flower_on_this_machine_is_reached_without_a_proxy(
    exceptions: dict[str, str], proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, proxy.url)
    for name, hosts in exceptions.items():
        monkeypatch.setenv(name, hosts)
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    flower = grpc.server(ThreadPoolExecutor(1))
    port = flower.add_insecure_port("127.0.0.1:0")
    flower.start()
    for host in ("127.0.0.1", "localhost"):
        with grpc.insecure_channel(f"{host}:{port}") as channel:  # as Flower makes one
            grpc.channel_ready_future(channel).result(timeout=300)
    flower.stop(None).wait()
    assert proxy.asked == []
