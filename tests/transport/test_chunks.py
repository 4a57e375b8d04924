"""Frames as messages: cut and put together again, and what is refused before memory is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.transport.frames import FrameError, Pong, decode, encode
from hsplitlora_flwr.transport.stream.chunks import CHUNK_BYTES, assemble, cut


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_cut_gives_full_messages_and_a_last_one(parts: list[bytes], size: int) -> None:
    messages = list(cut(parts, size))
    assert b"".join(messages) == b"".join(parts)
    assert all(len(message) == size for message in messages[:-1])
    assert all(0 < len(message) <= size for message in messages[-1:])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(18, 64))
def test_assemble_undoes_cut(sizes: list[int], size: int) -> None:
    whole = [encode(Pong(torch.arange(n, dtype=torch.uint8))) for n in sizes]
    messages = (message for data in whole for message in cut([data], size))
    assert [bytes(data) for data in assemble(messages, 10_000)] == whole


DATA = encode(Pong(torch.zeros(100, dtype=torch.uint8)))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n"], "not a frame"),
        ([DATA[:4]], "shorter than its prefix"),
        ([DATA[:50]], f"a frame of {len(DATA)} bytes ended after 50"),
        ([DATA[:50], b""], "goes on with 0 after 50"),
        ([DATA[:50], DATA], f"a frame of {len(DATA)} bytes goes on with {len(DATA)} after 50"),
        ([DATA[:10] + (2**50).to_bytes(8, "little")], f"Pong has {2**50} bytes; at most 10000 are accepted"),
    ],
)
def test_messages_that_make_no_frame(messages: list[bytes], says: str) -> None:
    with pytest.raises(FrameError, match=says):
        list(assemble(iter(messages), 10_000))


def test_no_message_is_longer_than_a_chunk() -> None:
    assert max(map(len, cut([bytes(5 * CHUNK_BYTES), b"x"]))) == CHUNK_BYTES == 2**20


def test_a_decoded_frame_of_the_stream_shares_the_memory_that_it_arrived_in() -> None:
    (data,) = assemble(cut([encode(Pong(torch.zeros(64, dtype=torch.uint8)))]), 1000)
    frame = decode(data)
    assert isinstance(frame, Pong)
    frame.payload.fill_(9)
    assert bytes(data).endswith(b"\x09" * 64)
