"""Damage of every kind, for those who read what others wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from random import Random

INPUTS = int(os.environ.get("HSPLITLORA_FUZZ", "6000"))
"""How many frames are tried; what takes longer to read is tried less often."""

# What JSON, or Python's reading of it, can hold in the place of something else
ODD = [
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1e-999",
        b"1e308",
        b"-0.0",
        b"0.5",
        b"0",
        b"-1",
        b"1",
        b"4",
        b"18446744073709551616",
    ),
    *(
        b"9" * 400,
        b"9" * 5000,
        b"true",
        b"null",
        b'""',
        b"[]",
        b"{}",
        b"[" * 300,
        b"[" * 60000,
        b"[" * 3000 + b"]" * 3000,
    ),
    *(
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b'"\\ud800"',
        b'"\xff"',
        b"\xef\xbb\xbf",
        b"\x00",
        b'{"dtype": [[]], "shape": 0}',
    ),
    *(
        b'"float64"',
        b'"int64"',
        b'"uint8"',
        b'"bool"',
        b"[2, 3]",
        b"[0, 1099511627776]",
        b"[-1, -6]",
        b"[1e3]",
        b"[true, 6]",
    ),
    *(
        b'{"dtype": "uint8", "shape": [' + size + b"]}"
        for size in (b"", b"0", b"1", b"1, 1", b"9" * 4000, b"2, " * 40 + b"2")
    ),
]


def damage(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    """Change, cut or double some of ``data``, or take as much of another one."""
    at, to = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    match random.randrange(4):
        case 0:
            data[at:at] = random.randbytes(random.randrange(9))
        case 1:
            del data[at:to]
        case 2:
            data[at:to] = random.choice(others)[at:to]
        case 3 if data:
            data[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
