"""Frames survive the wire bit by bit, and bytes that are not frames are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.transport.frames import (
    HEADER_BYTES,
    Activation,
    Failure,
    Frame,
    FrameError,
    Gradient,
    Hidden,
    Loss,
    Ping,
    buffers,
    decode,
    encode,
)
from tests.transport.samples import every_frame

NONE = torch.empty(0)


def same(one: Frame, other: Frame) -> bool:
    if type(one) is not type(other):
        return False
    for spec in dataclasses.fields(one):
        mine, theirs = getattr(one, spec.name), getattr(other, spec.name)
        if isinstance(mine, torch.Tensor):
            if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
                return False
            if (
                mine.contiguous().reshape(-1).view(torch.uint8).tolist()
                != theirs.reshape(-1).view(torch.uint8).tolist()
            ):
                return False
        elif mine != theirs:
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 7),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
def test_round_trip(dtype: torch.dtype, rows: int, length: int, hidden: int, number: float, last: bool) -> None:
    cut = (100 * torch.randn(rows, length, hidden)).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    scale = torch.rand(rows, length) if dtype == torch.int8 else NONE
    for frame in every_frame(cut, scale, number, last):
        data = encode(frame)
        assert data == b"".join(buffers(frame))
        for form in (data, bytearray(data), memoryview(data), memoryview(bytearray(b"x" + data))[1:]):
            assert same(decode(form), frame)


def gradient(data: bytes | bytearray) -> torch.Tensor:
    frame = decode(data)
    assert isinstance(frame, Gradient)
    return frame.gradient


def test_decoded_tensors_may_be_written_to() -> None:
    data = encode(Gradient(torch.ones(1, 2, 3), NONE, 0.0, 0.0))
    gradient(data).add_(1)
    assert torch.equal(gradient(data), torch.ones(1, 2, 3))  # a copy: bytes never change
    writable = bytearray(data)
    gradient(writable).add_(1)
    assert torch.equal(gradient(writable), torch.full((1, 2, 3), 2.0))  # the frame's own memory


def test_tensors_are_not_copied_on_their_way_out() -> None:
    tensor = torch.ones(1, 2, 3)
    parts = buffers(Gradient(tensor, NONE, 0.0, 0.0))
    tensor.add_(1)
    assert torch.equal(gradient(b"".join(parts)), torch.full((1, 2, 3), 2.0))


def test_what_frames_do_not_carry() -> None:
    with pytest.raises(FrameError, match="'hidden' has dtype bool; frames carry float64"):
        encode(Hidden(torch.ones(2, dtype=torch.bool), NONE))
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(FrameError, match=f"field 'total' is {number}; frames carry finite numbers"):
            encode(Loss(number))
    with pytest.raises(FrameError, match="field 'step' is 9223372036854775808; whole numbers have 64 bits"):
        encode(Activation(2**63, NONE, NONE, NONE, NONE, 1, True, 0.0))
    with pytest.raises(FrameError, match=f"the header of this Failure has .* at most {HEADER_BYTES}"):
        encode(Failure("x" * HEADER_BYTES))


GOOD = encode(Gradient(torch.ones(1, 2, 3), torch.arange(5.0), 0.5, 0.25))
PREFIX = struct.Struct("<4sBBIQ")
HEADER = GOOD[PREFIX.size : PREFIX.size + PREFIX.unpack_from(GOOD)[3]]


def framed(header: bytes, *, total: int | None = None, said: int | None = None, version: int = 3) -> bytes:
    """A frame with another header and true lengths, unless others are given."""
    rest = header + GOOD[PREFIX.size + len(HEADER) :]
    total = PREFIX.size + len(rest) if total is None else total
    return PREFIX.pack(b"HSPL", version, 1, len(header) if said is None else said, total) + rest


def shaped(shape: bytes) -> bytes:
    return framed(HEADER.replace(b"[1, 2, 3]", shape))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "shorter than its prefix"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame"),
        (GOOD[:5] + b"\x63" + GOOD[6:], "frames have no kind 99"),
        (framed(HEADER, version=1), "frame version 1, but this side speaks 3"),
        (GOOD[:-8], f"should have {len(GOOD)} bytes, it has {len(GOOD) - 8}"),
        (GOOD + b"\0", f"should have {len(GOOD)} bytes, it has {len(GOOD) + 1}"),
        (framed(HEADER, total=2**63), f"should have {2**63} bytes"),
        (framed(HEADER, said=2**31), f"a header of {2**31} bytes; at most {HEADER_BYTES}"),
        (framed(b"{not json"), "not JSON"),
        (framed(b"[" * 60000), "not JSON"),
        (framed(b'{"a":' * 9000), "not JSON"),
        (framed(HEADER.replace(b"0.25", b"9" * 5000)), "not JSON"),
        (framed(HEADER.replace(b"0.25", b'"\xff"')), "not JSON"),
        (framed(HEADER.decode().encode("utf-16")), "not JSON"),
        (framed(HEADER.replace(b'"loss": 0.5', b'"loss": 0.5, "loss": 0.5')), "a name stands twice"),
        (framed(HEADER.replace(b'"shape"', b'"dtype": "int8", "shape"', 1)), "a name stands twice"),
        *(
            (framed(HEADER.replace(b"0.25", number)), "'grad_norm_sq' is -?(nan|inf); frames carry finite numbers")
            for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999")
        ),
        (framed(HEADER.replace(b"0.25", b"true")), "must be a float"),
        (framed(HEADER.replace(b"0.25", b"1")), "must be a float"),
        (framed(HEADER.replace(b'"float32"', b"[" * 90 + b"]" * 90)), r"dtype \[+\.\.\.\]+; allowed"),
        (shaped(b"[1, 2, " + b"[" * 90 + b"]" * 90 + b"]"), "whole numbers"),
        (shaped(b"[" + b"9" * 4000 + b"]"), "at most 8 dimensions"),
        (framed(b"{}"), "needs the fields"),
        (framed(HEADER.replace(b'"float32"', b'"object"')), "allowed are float64"),
        (framed(HEADER.replace(b'"dtype"', b'"type"')), "described by dtype and shape"),
        (shaped(b"[1, -2, 3]"), "whole numbers"),
        (shaped(b"[1, 2.0, 3]"), "whole numbers"),
        (shaped(b"[true, 2, 3]"), "whole numbers"),
        (shaped(b"[9999999, 9999, 3]"), "needs 1199879880012 bytes, the frame has 48 left"),
        (shaped(b"[9999999, 9999999, 0]"), r"at most 8 dimensions and 2\*\*40 values"),
        (shaped(b"[1, 1, 1, 1, 1, 1, 1, 2, 3]"), "at most 8 dimensions"),
        (shaped(b"[1, 2, 2]"), f"has {len(GOOD)} bytes, its header accounts for {len(GOOD) - 8}"),
        (framed(HEADER.replace(b"0.25", b'"a"')), "must be a float"),
    ],
)
def test_refuses_bytes_that_are_not_a_frame(data: bytes, says: str) -> None:
    decode(framed(HEADER))  # what the bad ones are made from is good
    with pytest.raises(FrameError, match=says):
        decode(data)


@pytest.mark.parametrize("number", [-(2**63) - 1, 2**63, 10**400])
def test_whole_numbers_have_64_bits(number: int) -> None:
    good = encode(Ping(torch.empty(0, dtype=torch.uint8), 12345))
    header = good[PREFIX.size :].rstrip().replace(b"12345", b"%d" % number)
    with pytest.raises(FrameError, match="whole numbers have 64 bits") as caught:
        decode(PREFIX.pack(b"HSPL", 3, 8, len(header), PREFIX.size + len(header)) + header)
    assert len(str(caught.value)) < 200


def test_a_limit_is_refused_before_anything_else_is_read() -> None:
    decode(GOOD, limit=len(GOOD))
    with pytest.raises(FrameError, match=f"Gradient has {len(GOOD)} bytes; at most {len(GOOD) - 1} are accepted"):
        decode(GOOD, limit=len(GOOD) - 1)


def check(data: bytes) -> None:
    """Decode, or raise FrameError; take no more memory than the bytes and their header justify."""
    for form in (data, bytearray(data)):
        tracemalloc.start()
        try:
            frame = decode(form, limit=2**20)
        except FrameError:
            pass
        else:
            tensors = [value for value in vars(frame).values() if isinstance(value, torch.Tensor)]
            assert sum(tensor.nbytes for tensor in tensors) <= len(data)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2**20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_damage_never_escapes_as_another_error(noise: bytes, at: int) -> None:
    for data in (noise, GOOD[:at] + noise, GOOD[:at] + noise + GOOD[at + len(noise) :]):
        check(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["float32", "int8"]),
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.fixed_dictionaries({"dtype": inner, "shape": inner})
        | st.fixed_dictionaries({"dtype": st.just("uint8"), "shape": st.lists(st.integers(0, 2**70), max_size=9)})
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON, JSON, JSON, JSON, st.binary(max_size=64))
def test_headers_of_any_content_are_refused_or_fit(
    one: object, two: object, three: object, four: object, body: bytes
) -> None:
    header = json.dumps({"gradient": one, "scale": two, "loss": three, "grad_norm_sq": four}).encode()
    check(PREFIX.pack(b"HSPL", 3, 1, len(header), PREFIX.size + len(header) + len(body)) + header + body)
