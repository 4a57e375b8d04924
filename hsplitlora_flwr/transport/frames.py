"""Typed frames and their bytes.

    prefix | header (JSON) | tensors, each on an 8-byte boundary
    prefix: magic "HSPL" | version u8 | kind u8 | length of the header u32 | length of the frame u64; little-endian

The header names every tensor with its dtype and shape, so nothing is guessed and nothing is unpickled. The length of
the frame stands first, so a receiver knows it before memory is taken, and every length is checked before it is used.
Numbers in the header are finite, and whole ones fit into 64 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hsplitlora_flwr.copies import to_host

MAGIC = b"HSPL"
VERSION = 3
HEADER_BYTES = 2**16
"""Longest header: it holds names, shapes and a few numbers."""

ERROR_LENGTH = 4096
"""Longest text of a :class:`Failure` that comes of an exception."""

Buffer: TypeAlias = bytes | bytearray | memoryview

_PREFIX = struct.Struct("<4sBBIQ")
_DIMENSIONS, _VALUES = 8, 2**40
"""Most dimensions and values of a tensor; sizes beside a zero are bounded as well, since they become strides."""
_DTYPES: dict[str, type[np.generic]] = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": np.int16,  # numpy has none: its bits
    "float16": np.float16,
    "int64": np.int64,
    "int8": np.int8,
    "uint8": np.uint8,
}
"""What frames carry, and how numpy holds it: unlike those of torch, its small operations keep Python's lock, and so
do not wait for the other threads of a stream."""


class FrameError(ValueError):
    """Bytes that are not a frame of this version; the text says what is wrong with them."""


@dataclass(frozen=True, eq=False)
class Activation:
    """Client to server: one micro-batch at the cut.

    Parameters
    ----------
    step : int
        Global step, from 0, by which both sides follow the learning-rate schedule.
    cut, scale : Tensor
        The cut activation, ``(batch, seq, hidden)``, as :func:`hsplitlora_flwr.transport.codecs.pack` gives it.
    attention_mask : Tensor
        int64, ``(batch, seq)``.
    labels : Tensor
        int64, ``(batch, seq)``; empty, ``(0,)``, where they stay with the client.
    label_tokens : int
        Labelled tokens of the whole batch, by which its losses are divided.
    last : bool
        Whether this is the last micro-batch of the step.
    previous_grad_norm_sq : float
        Squared norm of the client's gradient in the step before, which the server needs to clip both sides as one.
    """

    step: int
    cut: Tensor
    scale: Tensor
    attention_mask: Tensor
    labels: Tensor
    label_tokens: int
    last: bool
    previous_grad_norm_sq: float


@dataclass(frozen=True, eq=False)
class Gradient:
    """Server to client: the answer to an :class:`Activation`, or to a :class:`HiddenGradient`.

    Parameters
    ----------
    gradient, scale : Tensor
        Gradient of the loss with respect to the cut activation, ``(batch, seq, hidden)``, packed as that is.
    loss : float
        This micro-batch's part of the batch's mean loss.
    grad_norm_sq : float
        After the last micro-batch of a step: squared norm of the server's gradient in it; else 0.
    """

    gradient: Tensor
    scale: Tensor
    loss: float
    grad_norm_sq: float


@dataclass(frozen=True, eq=False)
class Hidden:
    """Server to client, where labels stay: what the last block of the server puts out, ``(batch, seq, hidden)``."""

    hidden: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class HiddenGradient:
    """Client to server: the gradient of the loss with respect to a :class:`Hidden`, and the micro-batch's loss."""

    gradient: Tensor
    scale: Tensor
    loss: float


@dataclass(frozen=True, eq=False)
class Loss:
    """Server to client, if no gradient goes down. For a micro-batch that is evaluated: its summed negative
    log-likelihood in nats. For one of a client without adapters: its part of the batch's mean loss."""

    total: float


@dataclass(frozen=True, eq=False)
class Finish:
    """Client to server: no more steps; the squared gradient norm lets the server take its last one."""

    previous_grad_norm_sq: float


@dataclass(frozen=True, eq=False)
class Finished:
    """Server to client: the server took its last step; its adapters are final."""


@dataclass(frozen=True, eq=False)
class Enough:
    """Server to client, in place of what answers an :class:`Activation` of a new step: the time of the round is over.

    The step is not taken; the client goes on with :class:`Finish`.
    """


@dataclass(frozen=True, eq=False)
class Failure:
    """Server to client: the server cannot go on, and why."""

    error: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The frame that tells a client of an exception."""
        return cls(f"{type(error).__name__}: {error}"[:ERROR_LENGTH])


@dataclass(frozen=True, eq=False)
class Ping:
    """Client to server, to measure the link: ``payload`` (uint8) goes up, ``answer_bytes`` are to come down."""

    payload: Tensor
    answer_bytes: int


@dataclass(frozen=True, eq=False)
class Pong:
    """Server to client: the bytes that a :class:`Ping` asked for."""

    payload: Tensor


@dataclass(frozen=True, eq=False)
class Reply:
    """Client to server, while its Flower message lasts: what it would reply to that, packed as bytes (uint8)."""

    content: Tensor


@dataclass(frozen=True, eq=False)
class Request:
    """Server to client, in answer to a :class:`Reply`, whenever there is one: the client's next message.

    Parameters
    ----------
    kind : str
        The type of the message.
    content : Tensor
        What it holds, packed (uint8).
    """

    kind: str
    content: Tensor


@dataclass(frozen=True, eq=False)
class Released:
    """Server to client, in answer to a :class:`Reply`: nothing more comes over this stream."""


Frame: TypeAlias = (
    Activation
    | Gradient
    | Hidden
    | HiddenGradient
    | Loss
    | Finish
    | Finished
    | Failure
    | Ping
    | Pong
    | Reply
    | Request
    | Released
    | Enough
)

_KINDS: tuple[type[Any], ...] = (
    Activation,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
    Finish,
    Finished,
    Failure,
    Ping,
    Pong,
    Reply,
    Request,
    Released,
    Enough,
)
_PYTHON = {"int": int, "float": float, "bool": bool, "str": str}


class Prefix(NamedTuple):
    """The first bytes of a frame: its kind, and the lengths of its header and of the whole frame in bytes."""

    kind: type[Frame]
    header: int
    total: int


def buffers(frame: Frame) -> list[Buffer]:
    """The bytes of a frame as one buffer after another.

    Those of its tensors are views where these are contiguous and on the CPU: do not write to them before it is sent.

    Raises
    ------
    FrameError
        If a tensor has a dtype that frames do not carry, a number is not finite, or the header is longer than
        :data:`HEADER_BYTES`.
    """
    values: dict[str, Any] = {}
    bodies: list[Buffer] = []
    for spec in dataclasses.fields(frame):
        value = getattr(frame, spec.name)
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise FrameError(f"field '{spec.name}' has dtype {dtype}; frames carry {', '.join(_DTYPES)}")
            values[spec.name] = {"dtype": dtype, "shape": list(value.shape)}
            host = to_host(value)
            bits = host.view(torch.int16) if dtype == "bfloat16" else host
            body = np.ascontiguousarray(bits.numpy()).reshape(-1).view(np.uint8).data
            bodies += [body, bytes(-len(body) % 8)]
        else:
            values[spec.name] = _checked(spec.name, value)
    header = json.dumps(values).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % 8)
    if len(header) > HEADER_BYTES:
        raise FrameError(f"the header of this {type(frame).__name__} has {len(header)} bytes; at most {HEADER_BYTES}")
    start = _PREFIX.size + len(header)
    total = start + sum(map(len, bodies))
    return [_PREFIX.pack(MAGIC, VERSION, _KINDS.index(type(frame)), len(header), total), header, *bodies]


def encode(frame: Frame) -> bytes:
    """A frame as bytes; :func:`buffers` without the copy."""
    return b"".join(buffers(frame))


def read_prefix(data: Buffer) -> Prefix:
    """The prefix of the frame that ``data`` begins with.

    Raises
    ------
    FrameError
        If the bytes do not begin a frame of this version.
    """
    if len(data) < _PREFIX.size:
        raise FrameError(f"a frame of {len(data)} bytes is shorter than its prefix of {_PREFIX.size}")
    magic, version, kind, header, total = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("the bytes are not a frame; is something else talking to this port?")
    if version != VERSION:
        raise FrameError(
            f"frame version {version}, but this side speaks {VERSION}; install the same release on all sides"
        )
    if kind >= len(_KINDS):
        raise FrameError(f"frames have no kind {kind}")
    if header > HEADER_BYTES:
        raise FrameError(f"a header of {header} bytes; at most {HEADER_BYTES}")
    return Prefix(_KINDS[kind], header, total)


def check_total(prefix: Prefix, limit: int) -> None:
    """Raise :class:`FrameError` if the frame is longer than ``limit`` bytes."""
    if prefix.total > limit:
        raise FrameError(f"{prefix.kind.__name__} has {prefix.total} bytes; at most {limit} are accepted here")


def decode(data: Buffer, limit: int | None = None) -> Frame:
    """The frame in ``data``.

    Parameters
    ----------
    data : bytes, bytearray or memoryview
        One whole frame. The tensors share its memory where that is writable and aligned; else they are copies. They
        may be written to.
    limit : int, optional
        Longest frame in bytes that is accepted.

    Raises
    ------
    FrameError
        If the bytes are not a well-formed frame of this version, or more than ``limit``.
    """
    view = memoryview(data).cast("B")
    prefix = read_prefix(view)
    if limit is not None:
        check_total(prefix, limit)
    if prefix.total != len(view):
        raise FrameError(f"the frame should have {prefix.total} bytes, it has {len(view)}")
    start = _PREFIX.size + prefix.header
    try:
        header = json.loads(str(view[_PREFIX.size : start], "utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the frame's header is not JSON: {error}") from None
    fields = {spec.name: str(spec.type) for spec in dataclasses.fields(prefix.kind)}
    if not isinstance(header, dict) or header.keys() != fields.keys():
        raise FrameError(f"a frame of kind {prefix.kind.__name__} needs the fields {sorted(fields)}")
    values: dict[str, Any] = {}
    for name, wanted in fields.items():
        if wanted == "Tensor":
            values[name], start = _read_tensor(name, header[name], view, start)
        else:
            if type(header[name]) is not _PYTHON[wanted]:
                raise FrameError(f"field '{name}' of {prefix.kind.__name__} must be a {wanted}")
            values[name] = _checked(name, header[name])
    if start != len(view):
        raise FrameError(f"the frame has {len(view)} bytes, its header accounts for {start}")
    return prefix.kind(**values)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; of two values under one name it would be chance which one counts."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in it")
    return made


def _checked(name: str, value: float | str) -> float | str:
    """A number or text of the header."""
    if isinstance(value, float) and not math.isfinite(value):
        raise FrameError(f"field '{name}' is {value}; frames carry finite numbers. Training diverged; lower train.lr")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise FrameError(f"field '{name}' is {short(value)}; whole numbers have 64 bits")
    return value


def _read_tensor(name: str, spec: Any, view: memoryview, start: int) -> tuple[Tensor, int]:
    """The tensor that begins at ``start``, and where the next one does."""
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape"}:
        raise FrameError(f"field '{name}' must be described by dtype and shape")
    dtype, shape = spec["dtype"], spec["shape"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FrameError(f"field '{name}' has dtype {short(dtype)}; allowed are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise FrameError(f"field '{name}' has shape {short(shape)}; whole numbers are needed")
    if len(shape) > _DIMENSIONS or math.prod(max(size, 1) for size in shape) > _VALUES:
        raise FrameError(f"field '{name}' has shape {short(shape)}; at most {_DIMENSIONS} dimensions and 2**40 values")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if start + size > len(view):
        raise FrameError(f"field '{name}' needs {size} bytes, the frame has {len(view) - start} left")
    if size == 0:
        return torch.empty(shape, dtype=getattr(torch, dtype)), start
    array = np.ndarray(shape, _DTYPES[dtype], buffer=view, offset=start)
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor, start + size + (-size % 8)
