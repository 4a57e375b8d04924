"""Typed frames and their bytes.

    magic "HSPL" | version u8 | kind u8 | header length u32 | header (JSON) | tensors, each on an 8-byte boundary

The header names every tensor with its dtype and shape, so nothing is guessed and nothing is unpickled. A frame is
checked in full before memory is taken for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

MAGIC = b"HSPL"
VERSION = 1
_PREFIX = struct.Struct("<4sBBI")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


class FrameError(ValueError):
    """Bytes that are not a frame of this version; the text says what is wrong with them."""


@dataclass(frozen=True, eq=False)
class Activation:
    """Client to server: one micro-batch at the cut.

    Parameters
    ----------
    step : int
        Global step, from 0, by which both sides follow the learning-rate schedule.
    cut : Tensor
        The cut activation, ``(batch, seq, hidden)``, in the wire's dtype.
    attention_mask, labels : Tensor
        int64, ``(batch, seq)``.
    label_tokens : int
        Labelled tokens of the whole batch, by which its losses are divided.
    last : bool
        Whether this is the last micro-batch of the step.
    previous_square : float
        Squared norm of the client's gradient in the step before, which the server needs to clip both sides as one.
    """

    step: int
    cut: Tensor
    attention_mask: Tensor
    labels: Tensor
    label_tokens: int
    last: bool
    previous_square: float


@dataclass(frozen=True, eq=False)
class Gradient:
    """Server to client: the answer to an :class:`Activation`.

    Parameters
    ----------
    gradient : Tensor
        Gradient of the loss with respect to the cut activation, ``(batch, seq, hidden)``, in the wire's dtype.
    loss : float
        This micro-batch's part of the batch's mean loss.
    square : float
        After the last micro-batch of a step: squared norm of the server's gradient in it; else 0.
    """

    gradient: Tensor
    loss: float
    square: float


@dataclass(frozen=True, eq=False)
class Finish:
    """Client to server: no more steps; the squared gradient norm lets the server take its last one."""

    previous_square: float


@dataclass(frozen=True, eq=False)
class Finished:
    """Server to client: the server took its last step; its adapters are final."""


@dataclass(frozen=True, eq=False)
class Failure:
    """Server to client: the server cannot go on, and why."""

    error: str


Frame: TypeAlias = Activation | Gradient | Finish | Finished | Failure

_KINDS: tuple[type[Any], ...] = (Activation, Gradient, Finish, Finished, Failure)
_PYTHON = {"int": int, "float": float, "bool": bool, "str": str}


def encode(frame: Frame) -> bytes:
    """A frame as bytes."""
    values: dict[str, Any] = {}
    tensors: list[Tensor] = []
    for spec in dataclasses.fields(frame):
        value = getattr(frame, spec.name)
        if isinstance(value, Tensor):
            tensor = value.detach().contiguous().cpu()
            values[spec.name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            tensors.append(tensor)
        else:
            values[spec.name] = value
    header = json.dumps(values).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % 8)
    parts: list[bytes | memoryview] = [
        _PREFIX.pack(MAGIC, VERSION, _KINDS.index(type(frame)), len(header)),
        header,
    ]
    for tensor in tensors:
        body = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        parts += [body, b"\0" * (-len(body) % 8)]
    return b"".join(parts)


def decode(data: bytes) -> Frame:
    """The frame in ``data``; its tensors are copies that may be written to.

    Raises
    ------
    FrameError
        If the bytes are not a well-formed frame of this version.
    """
    if len(data) < _PREFIX.size:
        raise FrameError(f"a frame of {len(data)} bytes is shorter than its prefix")
    magic, version, kind, header_length = _PREFIX.unpack_from(data)
    if magic != MAGIC or kind >= len(_KINDS):
        raise FrameError("the bytes are not a frame; is something else talking to this port?")
    if version != VERSION:
        raise FrameError(
            f"frame version {version}, but this side speaks {VERSION}; install the same release on all sides"
        )
    start = _PREFIX.size + header_length
    try:
        header = json.loads(data[_PREFIX.size : start])
    except ValueError as error:
        raise FrameError(f"the frame's header is not JSON: {error}") from None
    frame_type = _KINDS[kind]
    fields = {spec.name: str(spec.type) for spec in dataclasses.fields(frame_type)}
    if not isinstance(header, dict) or header.keys() != fields.keys():
        raise FrameError(f"a frame of kind {frame_type.__name__} needs the fields {sorted(fields)}")
    values: dict[str, Any] = {}
    for name, wanted in fields.items():
        if wanted == "Tensor":
            values[name], start = _read_tensor(name, header[name], data, start)
        else:
            if type(header[name]) is not _PYTHON[wanted]:
                raise FrameError(f"field '{name}' of {frame_type.__name__} must be a {wanted}")
            values[name] = header[name]
    if start != len(data):
        raise FrameError(f"the frame has {len(data)} bytes, its header accounts for {start}")
    frame: Frame = frame_type(**values)
    return frame


def _read_tensor(name: str, spec: Any, data: bytes, start: int) -> tuple[Tensor, int]:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape"}:
        raise FrameError(f"field '{name}' must be described by dtype and shape")
    dtype, shape = _DTYPES.get(str(spec["dtype"])), spec["shape"]
    if dtype is None:
        raise FrameError(f"field '{name}' has dtype {spec['dtype']!r}; allowed are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise FrameError(f"field '{name}' has shape {shape!r}; whole numbers are needed")
    count = math.prod(shape)
    size = count * dtype.itemsize
    if start + size > len(data):
        raise FrameError(f"field '{name}' needs {size} bytes, the frame has {len(data) - start} left")
    if count == 0:
        return torch.empty(shape, dtype=dtype), start
    tensor = torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype).reshape(shape)
    return tensor, start + size + (-size % 8)
