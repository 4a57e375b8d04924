"""Whatever bytes come, the readers of the data plane say what is wrong with them, and nothing else happens.

``HSPLITLORA_FUZZ=10000000 pytest tests/transport/test_fuzz.py`` tries so many inputs; a few thousand by default.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch

from hsplitlora_flwr.config.names import WIRES
from hsplitlora_flwr.transport.codecs import WireError, pack, unpack
from hsplitlora_flwr.transport.frames import Activation, FrameError, decode, encode
from hsplitlora_flwr.transport.stream.chunks import assemble
from tests.fuzz import INPUTS, ODD, damage
from tests.transport.samples import every_frame

SHARES = 6
"""Independent parts of them, so that several processes can share the work."""

PREFIX = struct.Struct("<4sBBIQ")
LIMIT = 2**16 + 2**12

GOOD = [encode(frame) for wire in WIRES for frame in every_frame(*pack(torch.randn(2, 3, 4), wire))]


def damaged(random: Random) -> bytes:
    """A frame with some of its bytes changed, cut, doubled or swapped for another frame's; or its header's words."""
    data = bytearray(random.choice(GOOD))
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        if random.random() < 0.8 or len(data) < PREFIX.size:
            damage(random, data, GOOD)
        else:
            number = random.choice((0, 1, 17, 18, 19, 2**16, 2**31, 2**63, 2**64 - 1))
            place, size = random.choice(((6, 4), (10, 8)))
            data[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data)


def with_another_header(random: Random) -> bytes:
    """A frame whose header says something else, with lengths that are true of it."""
    data = random.choice(GOOD)
    _, version, kind, size, _ = PREFIX.unpack_from(data)
    header, body = data[PREFIX.size : PREFIX.size + size], data[PREFIX.size + size :]
    words = json.loads(header)
    for _ in range(random.choice((1, 1, 2))):
        names = list(words)
        match random.randrange(5):
            case 0 if names:
                del words[random.choice(names)]
            case 1:
                words[random.choice(("step", "more", "__class__", ""))] = 1
            case 2 if names:
                words[random.choice(names)] = words[random.choice(names)]
            case 3 if names:  # one and the same name again
                again = json.dumps({random.choice(names): 1}).encode()[1:-1]
                header = json.dumps(words).encode()[:-1] + b", " + again + b"}"
                break
            case _:
                marked = {name: "\x1a" if name == random.choice(names or [""]) else words[name] for name in names}
                header = json.dumps(marked).encode().replace(b'"\\u001a"', random.choice(ODD))
                break
        header = json.dumps(words).encode()
    if random.random() < 0.2:
        kind = random.randrange(12)
    return PREFIX.pack(b"HSPL", version, kind, len(header), PREFIX.size + len(header) + len(body)) + header + body


def pieces(random: Random, data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = random.choice((0, 1, 18, 40, len(data))) if random.random() < 0.1 else len(data)
        yield data[at : at + size]
        at += max(size, 1)


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("made", [damaged, with_another_header])
def test_any_bytes_are_a_frame_or_refused(made: Callable[[Random], bytes], share: int) -> None:
    random, count, good = Random(f"{made.__name__} {share}"), INPUTS // (2 * SHARES), 0
    for _ in range(count):
        data = made(random)
        try:
            frames = [decode(each, LIMIT) for each in assemble(pieces(random, data), LIMIT)]
            frames.append(decode(data, LIMIT))
        except FrameError as error:
            assert len(str(error)) < 500
            continue
        good += 1
        for frame in frames:
            sizes = [value.nbytes for value in vars(frame).values() if isinstance(value, torch.Tensor)]
            assert sum(sizes) <= len(data)
            assert type(decode(encode(frame))) is type(frame)  # what was understood can be said
            if isinstance(frame, Activation):
                arrives_or_is_refused(frame)
    assert 0 < good < count, "inputs of one kind alone show nothing"


def arrives_or_is_refused(frame: Activation) -> None:
    try:
        numbers = unpack(frame.cut, frame.scale, torch.float32, "cpu")
    except WireError:
        return
    assert numbers.isfinite().all() and numbers.shape == frame.cut.shape
