"""The benchmarks run on a tiny model, and their frame writes what they found."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.models.loading import read_config
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import IGNORED
from hsplitlora_flwr.planning import CostModel, Workload
from simulations import benchmark
from simulations.benchmark import (
    BENCHMARKS,
    Exchange,
    Row,
    main,
    memory,
    overlap,
    probe,
    spread_batches,
    wire_seconds,
)
from simulations.shaping import QUEUE_BYTES, SlowLink, shaped


def test_memory_measures_a_client_in_a_process_of_its_own(tiny_folder: Path) -> None:
    row = next(memory(str(tiny_folder)))
    assert row["split"] == 1
    assert row["update"] == "none"
    # Of a tiny model nothing is seen beside the process itself, so all three agree.
    assert row["predicted_mb"] == pytest.approx(row["process_mb"], abs=10)
    assert row["measured_mb"] == pytest.approx(row["predicted_mb"], rel=0.1)


def test_overlap_compares_a_step_with_its_two_parts(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LINKS", ((SlowLink(100, 20), "float32"), (SlowLink(100, 20), "bfloat16")))
    monkeypatch.setattr(benchmark, "MICRO_BATCHES", ((1, 1), (4, 2)))
    monkeypatch.setattr(benchmark, "TURNS", 2)
    rows = list(overlap(str(tiny_folder)))
    assert [(row["wire"], row["micro-batches"], row["in flight"]) for row in rows] == [
        (wire, *micro_batches) for wire in ("float32", "bfloat16") for micro_batches in ((1, 1), (4, 2))
    ]
    config = read_config(str(tiny_folder))
    cost = CostModel(config, find_family(config), Workload(*benchmark.SHAPES[0]))
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


def test_probe_compares_both_sides(tiny_folder: Path) -> None:
    client, server = probe(str(tiny_folder))
    assert (client["side"], client["blocks"], server["side"], server["blocks"]) == ("client", 1, "server", 3)
    for row in (client, server):
        assert float(row["probe_s"]) / float(row["training_s"]) - 1 == pytest.approx(row["extra time"])
        assert float(row["probe_peak_mb"]) > 0


def test_batches_reach_every_part_of_the_vocabulary_and_are_padded() -> None:
    batches = list(islice(spread_batches(2, 16, 1000), benchmark.STEPS))
    used = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
    assert int(used.diff().max()) <= -(-1000 // (2 * 16 * benchmark.STEPS)) + 1
    assert all(batch.attention_mask.sum() == 2 * 16 - 1 and batch.labels[-1, -1] == IGNORED for batch in batches)


def test_figures_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fast(path: str) -> Iterator[Row]:
        yield {"model": path, "seconds": 0.123456, "blocks": 3}

    monkeypatch.setitem(BENCHMARKS, "fast", fast)
    out = tmp_path / "new" / "figures.json"
    assert main(["fast", "--model", "here", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["benchmarks"] == {"fast": [{"model": "here", "seconds": 0.123456, "blocks": 3}]}
    assert written["environment"]["torch"] == version("torch")
    assert {"date", "cpu", "cores", "memory_gb", "python", "transformers"} <= written["environment"].keys()
    assert "0.1235" in capsys.readouterr().out


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["memry"])
    assert stopped.value.code == 2
    assert "memory" in capsys.readouterr().err
