"""Numbers on the wire: a tensor of the model as values and scales that travel, and back.

What turns one into the other is a :class:`Codec`, known by the same name on both sides. Four of ours are a cast.
``int8`` is symmetric quantisation with one fp32 scale per token (the last dimension is the hidden one), after a fixed
rotation ``y`` of the token ``x``: ``scale = max|y| / 127``, ``values = round(y / scale)``; and back ``values * scale``,
rotated back. It sends a quarter of the bytes of ``float32``, and one large token does not coarsen the others.

The rotation is there because a few channels of a language model's activations are 20 to 40 times as large as the rest,
and one such channel would leave a handful of steps to all others. A rotation spreads it over all of them, as in QuaRot
(arXiv 2404.00456). Ours is a two-dimensional cosine transform of the token laid out as a matrix, which exists for every
hidden size and takes two small products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hsplitlora_flwr.config.names import KNOWN_CODECS
from hsplitlora_flwr.copies import to_device
from hsplitlora_flwr.registry import Registry

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STEPS = 127
_SMALLEST = _STEPS * torch.finfo(torch.float32).tiny


class WireError(ValueError):
    """A tensor cannot travel by this codec, or what arrived does not belong to one; the text says what to choose."""


class Part(NamedTuple):
    """A tensor that travels: a dtype that :mod:`hsplitlora_flwr.transport.frames` carries, and a shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """How the numbers of a tensor travel: as two tensors, values and scales.

    What comes back need not be what was sent, but both sides' gradients are those of what came back. There is no state:
    an encoded tensor says all that its decoder needs.
    """

    def layout(self, shape: Sequence[int]) -> tuple[Part, Part]:
        """Values and scales of a tensor of this shape, the last dimension being the hidden one.

        Plans count its bytes, and what arrives in any other dtype or shape is refused before it is decoded.
        """

    def encode(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales of a floating point tensor without a graph, on any device; they may stay there.

        Raises
        ------
        WireError
            If a number does not fit.
        """

    def decode(
        self, values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """The tensor of this shape, dtype and device behind values and scales of its layout.

        They come from another machine: whatever numbers they hold, nothing may be read or made beside the tensor. One
        that is not finite is refused after.
        """


CODECS: Registry[Codec] = KNOWN_CODECS
"""Codecs by name."""


def register_codec(name: str, codec: Codec) -> Codec:
    """Make a codec known as ``transport.up=<name>`` and ``transport.down=<name>``; returns it.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return CODECS.register(name, codec)


def packed_bytes(shape: Sequence[int], codec: str) -> int:
    """Bytes of a tensor of this shape on the wire."""
    return sum(part.nbytes for part in CODECS[codec].layout(shape))


def packed_shape(shape: Sequence[int], codec: str | None) -> tuple[int, ...]:
    """The shape of the values of a tensor of this shape; its own where the codec is not known."""
    return tuple(shape) if codec is None else CODECS[codec].layout(shape)[0].shape


def pack(tensor: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """The values and scales of ``tensor`` as they travel.

    Parameters
    ----------
    tensor : Tensor
        Floating point, ``(..., hidden)``, on any device.
    codec : str
        A name in :data:`CODECS`.

    Returns
    -------
    values, scale : Tensor
        By the codec's layout, without a graph. Of ours, values are shaped as ``tensor`` and on its device, and share
        its memory where the dtype is the same. Scales are float32; ``int8``: ``tensor.shape[:-1]``; else ``(0,)``.

    Raises
    ------
    WireError
        If the codec is unknown, a value is not finite or too large for it, or it breaks its own layout.

    Notes
    -----
    Error after :func:`unpack`, for a value ``x`` that is no subnormal number:

    - ``float64``, ``float32``, ``bfloat16``, ``float16``: at most ``|x| * 2**-53``, ``2**-24``, ``2**-8``, ``2**-11``;
    - ``int8``: the error of a token is at most ``sqrt(hidden) * max|y| / 254`` in Euclidean norm, up to fp32 rounding,
      and 0.7 % of the token's norm where ``y`` is spread like a normal distribution. A token whose ``max|y|`` is below
      1.5e-36 becomes zero.
    """
    if codec not in CODECS:
        raise WireError(f"codec {codec!r} is unknown; choose one of {', '.join(CODECS)}")
    with torch.no_grad():
        values, scale = CODECS[codec].encode(tensor.detach())
    _check_layout(values, scale, tensor.shape, codec)
    return values, scale


def unpack(
    values: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
    codec: str | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The tensor behind ``values`` and ``scale``, as :func:`pack` gave them.

    Parameters
    ----------
    values, scale : Tensor
        What arrived.
    dtype, device
        Of the result, which of our codecs shares the memory of ``values`` where nothing has to change.
    codec : str, optional
        The name of the codec that was agreed on; one of ours, told by the dtypes, when None.
    shape : Sequence[int], optional
        Of the result; that of ``values`` when None.

    Raises
    ------
    WireError
        If dtypes and shapes are none that :func:`pack` gives, or a number is not finite in ``dtype``.
    """
    if codec is None:
        return _decode(values, scale, dtype, device)
    shape = tuple(values.shape if shape is None else shape)
    _check_layout(values, scale, shape, codec)
    tensor = CODECS[codec].decode(values, scale, shape, dtype, device)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise WireError(f"codec {codec} made {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} was asked for")
    # ours refuse such numbers where they arrive; of the tensor itself its device has to be asked
    if codec not in _OURS and not bool(tensor.isfinite().all()):
        raise WireError(f"what arrived as {codec} is not finite in {dtype}; lower train.lr or set train.clip")
    return tensor


class _Cast:
    """A dtype, without scales."""

    def __init__(self, codec: str) -> None:
        self._name, self._dtype = codec, getattr(torch, codec)

    def layout(self, shape: Sequence[int]) -> tuple[Part, Part]:
        return Part(self._dtype, tuple(shape)), Part(torch.float32, (0,))

    def encode(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        _check(_magnitude(tensor.reshape(-1)), self._dtype, self._name)
        return tensor.to(self._dtype), torch.empty(0, dtype=torch.float32)  # whatever the default is meanwhile

    def decode(
        self, values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        return _decode(values, scale, dtype, device)


class _Int8:
    """Int8 with one scale per token, after the rotation."""

    def layout(self, shape: Sequence[int]) -> tuple[Part, Part]:
        return Part(torch.int8, tuple(shape)), Part(torch.float32, tuple(shape[:-1]))

    def encode(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return _quantise(tensor)

    def decode(
        self, values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        return _decode(values, scale, dtype, device)


for _name in ("float32", "bfloat16", "float16", "float64"):
    register_codec(_name, _Cast(_name))
register_codec("int8", _Int8())
_OURS = frozenset(CODECS)


def _check_layout(values: Tensor, scale: Tensor, shape: Sequence[int], codec: str) -> None:
    """Raise :class:`WireError` unless these are values and scales of a tensor of this shape."""
    found = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in (values, scale))
    wanted = CODECS[codec].layout(shape)
    if found != tuple(map(tuple, wanted)):
        told = [" and ".join(f"{dtype} {size}" for dtype, size in parts) for parts in (found, wanted)]
        raise WireError(f"a tensor {tuple(shape)} as {codec} is {told[1]}, and this is {told[0]}")


def _decode(values: Tensor, scale: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """What one of our codecs encoded."""
    if values.dtype in _FLOATS and scale.numel() == 0:
        _check_arrived(_magnitude(values.reshape(-1)), dtype)
        return to_device(values, device, dtype)
    tokens = values.shape[:-1] if values.ndim else None
    if values.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != tokens:
        raise WireError(
            f"values {values.dtype} {tuple(values.shape)} with scale {scale.dtype} {tuple(scale.shape)} are no tensor "
            "of a codec; int8 needs one float32 scale per token, the others none"
        )
    # No rotation makes a value longer than its token: at most 127 steps in each of its places.
    bound = _magnitude(scale.reshape(-1)).double() * (_STEPS * math.sqrt(max(values.shape[-1], 1)))
    _check_arrived(bound, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return _rotated(to_device(values, device, exact) * to_device(scale, device, exact).unsqueeze(-1), back=True).to(
        dtype
    )


def check_codec(values: Tensor, codec: str) -> None:
    """Raise :class:`WireError` unless ``values`` have the dtype in which numbers travel as ``codec``."""
    if values.dtype != CODECS[codec].layout(values.shape)[0].dtype:
        raise WireError(f"numbers came as {values.dtype} where the codec {codec} was agreed on")


def _quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    tensor = _rotated(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
    magnitude = _magnitude(tensor)  # (...), one per token
    _check(_magnitude(magnitude.reshape(-1)) / _STEPS, torch.float32, "int8", _STEPS)
    scale = torch.where(magnitude < _SMALLEST, 0, magnitude / _STEPS).float()
    divisor = torch.where(scale == 0, torch.inf, scale)
    return (tensor / divisor.unsqueeze(-1)).round().to(torch.int8), scale


def _rotated(tensor: Tensor, *, back: bool = False) -> Tensor:
    """Rotate every token, ``(..., hidden)``, or rotate it back."""
    hidden = tensor.shape[-1]
    if tensor.numel() == 0:
        return tensor
    rows = max(size for size in range(1, math.isqrt(hidden) + 1) if hidden % size == 0)
    left, right = (_cosines(size).to(tensor) for size in (rows, hidden // rows))
    if back:
        left, right = left.T, right.T
    return (left @ tensor.reshape(*tensor.shape[:-1], rows, -1) @ right.T).flatten(-2)


@lru_cache
def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), ``(size, size)``, float64."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _magnitude(tensor: Tensor) -> Tensor:
    """``max|x|`` over the last dimension, NaN where one is; 0 where it is empty."""
    if tensor.shape[-1] == 0:
        return tensor.new_zeros(tensor.shape[:-1])
    low, high = torch.aminmax(tensor, dim=-1)
    return torch.maximum(-low, high)


def _check_arrived(magnitude: Tensor, dtype: torch.dtype) -> None:
    """Refuse numbers whose largest magnitude is not finite in ``dtype``."""
    if not magnitude.to(dtype).isfinite():
        raise WireError(
            f"what arrived has a magnitude of {magnitude.item():.4g}, which is not finite in {dtype}: the other side's "
            "training diverged; lower train.lr or set train.clip"
        )


def _check(magnitude: Tensor, dtype: torch.dtype, codec: str, unit: int = 1) -> None:
    """Refuse a largest magnitude, given in multiples of ``unit``, that is not finite in ``dtype``."""
    if magnitude.to(dtype).isfinite():
        return
    if not magnitude.isfinite():
        raise WireError("the activation or its gradient is not finite (inf or nan): training diverged; lower train.lr")
    largest, most = unit * magnitude.item(), unit * torch.finfo(dtype).max
    remedy = "bfloat16 or int8" if codec == "float16" else "float64"
    raise WireError(
        f"a value of magnitude {largest:.4g} does not fit the codec {codec}, which ends at {most:.4g}; "
        f"set transport.up and transport.down to {remedy}"
    )
