"""The stream against an echo."""

from __future__ import annotations

import pytest

from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.stream.chunks import CHUNK_BYTES
from simulations.benchmarks import wire as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.wire import EchoCall, echo_server, wire


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (("HIDDEN", (16,)), ("DTYPES", ("bfloat16", "int8")), ("TURN_BYTES", 2**17), ("TURNS", 1))
    for name, value in small:
        monkeypatch.setattr(module, name, value)
    rows = list(wire(Setup()))
    assert [(row["hidden"], row["wire"]) for row in rows] == [(16, "bfloat16"), (16, "int8")]
    for row, state in zip(rows, (2 * 16, 16 + 4), strict=True):  # bytes of a token; int8 has a scale
        header = 512 / (8 * 64)
        assert state + 8 + 8 < float(row["bytes_per_token up"]) < state + 8 + 8 + header  # with mask and label
        assert state < float(row["bytes_per_token down"]) < state + header
        for echo in ("echo", "eager echo"):
            speed = row[f"{echo.replace(' ', '_')}_mb_per_s"]
            assert row[f"stream / {echo}"] == pytest.approx(float(row["stream_mb_per_s"]) / float(speed))
        assert 0 < float(row["pack_ms"]) < 1000


@pytest.mark.parametrize("way", ["whole", "eager"])
@pytest.mark.parametrize(("up", "down"), [(700, 700), (2 * CHUNK_BYTES + 5, 2 * CHUNK_BYTES - 7), (900, 1)])
def test_the_echo_answers_as_many_bytes_as_the_stream_would(way: str, up: int, down: int) -> None:
    with echo_server(make_identity("127.0.0.1")) as echo:
        call = EchoCall(echo, way, up, down)
        assert call.exchange(3) == 3 * down
        assert call.exchange(1) == down  # nothing of the frames before was left over
        call.close()
