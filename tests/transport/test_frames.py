"""Frames survive the wire bit by bit, and bytes that are not frames are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.transport.frames import (
    Activation,
    Failure,
    Finish,
    Finished,
    Frame,
    FrameError,
    Gradient,
    decode,
    encode,
)


def same(one: Frame, other: Frame) -> bool:
    if type(one) is not type(other):
        return False
    for spec in dataclasses.fields(one):
        mine, theirs = getattr(one, spec.name), getattr(other, spec.name)
        if isinstance(mine, torch.Tensor):
            if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
                return False
            if not torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
                return False
        elif mine != theirs:
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 7),
    st.floats(allow_nan=False),
    st.booleans(),
)
def test_round_trip(dtype: torch.dtype, rows: int, length: int, hidden: int, number: float, last: bool) -> None:
    ids = torch.arange(rows * length).reshape(rows, length)
    cut = torch.randn(rows, length, hidden).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    frames: list[Frame] = [
        Activation(3, cut, ids % 2, ids - 100, rows, last, number),
        Gradient(cut, number, -number),
        Finish(number),
        Finished(),
        Failure("ValueError: ü"),
    ]
    for frame in frames:
        assert same(decode(encode(frame)), frame)


def test_decoded_tensors_may_be_written_to() -> None:
    decoded = decode(encode(Gradient(torch.ones(1, 2, 3), 0.0, 0.0)))
    assert isinstance(decoded, Gradient)
    decoded.gradient.add_(1)
    assert torch.equal(decoded.gradient, torch.full((1, 2, 3), 2.0))


GOOD = encode(Gradient(torch.ones(1, 2, 3), 0.5, 0.25))
HEADER = GOOD[10 : 10 + struct.unpack_from("<I", GOOD, 6)[0]]


def with_header(header: bytes) -> bytes:
    return GOOD[:6] + struct.pack("<I", len(header)) + header + GOOD[10 + len(HEADER) :]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "shorter than its prefix"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame"),
        (GOOD[:5] + b"\x63" + GOOD[6:], "not a frame"),
        (GOOD[:4] + b"\x09" + GOOD[5:], "frame version 9, but this side speaks 1"),
        (GOOD[:-8], "needs 24 bytes, the frame has 16 left"),
        (GOOD + b"\0", "header accounts for"),
        (with_header(b"{not json"), "not JSON"),
        (with_header(b"{}"), "needs the fields"),
        (with_header(HEADER.replace(b'"float32"', b'"object"')), "allowed are float64"),
        (with_header(HEADER.replace(b"[1, 2, 3]", b"[1, -2, 3]")), "whole numbers"),
        (with_header(HEADER.replace(b"[1, 2, 3]", b"[9999999, 9999999, 3]")), "the frame has 24 left"),
        (with_header(HEADER.replace(b"0.25", b'"a"')), "must be a float"),
    ],
)
def test_refuses_bytes_that_are_not_a_frame(data: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        decode(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_damage_never_escapes_as_another_error(noise: bytes, at: int) -> None:
    for data in (noise, GOOD[:at] + noise, GOOD[:at] + noise + GOOD[at + len(noise) :]):
        with contextlib.suppress(FrameError):
            decode(data)
