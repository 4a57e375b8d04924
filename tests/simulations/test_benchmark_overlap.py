"""Steps over slow links against their two parts, and the relay that makes a link slow."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning import CostModel, Workload
from simulations.benchmarks import overlap as module
from simulations.benchmarks.common import SHAPES, Setup
from simulations.benchmarks.overlap import Exchange, overlap, wire_seconds
from simulations.shaping import QUEUE_BYTES, SlowLink, shaped


def test_overlap_compares_a_step_with_its_two_parts(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINKS", ((SlowLink(100, 20), "float32"), (SlowLink(100, 20), "bfloat16")))
    monkeypatch.setattr(module, "MICRO_BATCHES", ((1, 1), (4, 2)))
    rows = list(overlap(Setup(str(tiny_folder))))
    assert [(row["wire"], row["micro-batches"], row["in flight"]) for row in rows] == [
        (wire, *micro_batches) for wire in ("float32", "bfloat16") for micro_batches in ((1, 1), (4, 2))
    ]
    config = read_config(str(tiny_folder))
    cost = CostModel(config, find_family(config), Workload(*SHAPES[0]))
    for row in rows:
        assert row["link"] == "100 Mbit/s, 20 ms (TCP relay)"
        tensors = cost.wire_bytes(str(row["wire"]), str(row["wire"]))
        headers = 500 * float(row["micro-batches"])
        for sent, tensor_bytes in zip((row["up_mb"], row["down_mb"]), tensors, strict=True):
            assert tensor_bytes < float(sent) * 1e6 < tensor_bytes + headers
        compute, wire, step = (float(row[key]) for key in ("compute_s", "wire_s", "step_s"))
        assert step > wire  # the link is not faster than it says
        assert row["step / max(compute, wire)"] == pytest.approx(step / max(compute, wire))
        assert row["step / (compute + wire)"] == pytest.approx(step / (compute + wire))


@pytest.mark.parametrize(
    ("micro_batches", "in_flight", "seconds"),
    [
        (1, 1, 1.0 + 0.5 + 0.2),
        (4, 1, 1.0 + 0.5 + 4 * 0.2),  # nothing overlaps
        (4, 2, 1.4),  # micro-batches are on their way from 0, 0.25, 0.575 and 0.825; answers back 0.575 later
        (4, 4, 1.0 + 0.5 / 4 + 0.2),  # the last answer follows the last micro-batch
        (4, 9, 1.0 + 0.5 / 4 + 0.2),
    ],
)
def test_wire_alone(micro_batches: int, in_flight: int, seconds: float) -> None:
    megabyte_a_second = SlowLink(8, 200)
    exchange = Exchange(megabyte_a_second, "float32", micro_batches, in_flight)
    assert wire_seconds(1_000_000, 500_000, exchange) == pytest.approx(seconds)


@contextmanager
def connected(link: SlowLink) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over a shaped link."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        with shaped("127.0.0.1:{1}".format(*listener.getsockname()), link) as near:
            host, port = near.split(":")
            with socket.create_connection((host, int(port)), 30) as client, listener.accept()[0] as server:
                server.settimeout(30)
                yield client, server


def arrivals(end: socket.socket) -> list[tuple[float, bytes]]:
    """What arrives until the sender ends, each with the time by which it was there."""
    received = []
    while data := end.recv(2**16):
        received.append((time.perf_counter(), data))
    return received


def send(end: socket.socket, data: bytes) -> None:
    """Send everything, and end."""
    end.sendall(data)
    end.shutdown(socket.SHUT_WR)


def test_shaped_link_carries_both_directions_at_its_rate_and_not_faster() -> None:
    link = SlowLink(40, 20)
    up, down = random.Random(0).randbytes(300_000), random.Random(1).randbytes(200_000)
    with connected(link) as (client, server), ThreadPoolExecutor(4) as threads:
        started = time.perf_counter()
        incoming = [threads.submit(arrivals, end) for end in (server, client)]
        for end, data in ((client, up), (server, down)):
            threads.submit(send, end, data)
        for future, sent in zip(incoming, (up, down), strict=True):
            received = future.result()
            assert b"".join(data for _, data in received) == sent
            count = 0
            for moment, data in received:
                count += len(data)
                assert moment - started >= link.seconds(count) + link.delay


def test_shaped_link_stops_a_sender_whose_receiver_does_not_read() -> None:
    buffers = 2**21  # of the kernel, and of both sockets
    with connected(SlowLink(1000, 2)) as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        client.settimeout(0.3)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 2**26:
                sent += client.send(bytes(2**14))
        client.shutdown(socket.SHUT_WR)
        assert QUEUE_BYTES < sent < QUEUE_BYTES + buffers
        assert sum(len(data) for _, data in arrivals(server)) == sent


def test_shaped_link_to_nowhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:{1}".format(*listener.getsockname())
    with shaped(address, SlowLink(100, 20)) as near:
        host, port = near.split(":")
        with socket.create_connection((host, int(port)), 30) as client:
            assert client.recv(1) == b""
    with pytest.raises(RuntimeError, match="nowhere"), shaped("nowhere", SlowLink(100, 20)):
        pass


@pytest.mark.parametrize(
    ("mbit", "round_trip_ms"), [(0, 20), (-1, 20), (float("nan"), 20), (100, -1), (100, float("inf"))]
)
def test_a_link_that_cannot_be(mbit: float, round_trip_ms: float) -> None:
    with pytest.raises(ValueError, match=r"mbit=|round_trip_ms="):
        SlowLink(mbit, round_trip_ms)
