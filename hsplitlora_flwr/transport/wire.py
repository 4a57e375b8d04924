"""Numbers on the wire: a tensor of the model as values and scales that travel, and back.

Four wires are a cast. ``int8`` is symmetric quantisation with one fp32 scale per token (the last dimension is the
hidden one), after a fixed rotation ``y`` of the token ``x``: ``scale = max|y| / 127``, ``values = round(y / scale)``;
and back ``values * scale``, rotated back. It sends a quarter of the bytes of ``float32``, and one large token does not
coarsen the others.

The rotation is there because a few channels of a language model's activations are 20 to 40 times as large as the rest,
and one such channel would leave a handful of steps to all others. A rotation spreads it over all of them, as in QuaRot
(arXiv 2404.00456). Ours is a two-dimensional cosine transform of the token laid out as a matrix, which exists for every
hidden size and takes two small products.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hsplitlora_flwr.config import WIRES

_DTYPES: dict[str, torch.dtype] = {wire: getattr(torch, wire) for wire in WIRES}
_FLOATS = {dtype for dtype in _DTYPES.values() if dtype.is_floating_point}
_STEPS = 127
_SMALLEST = _STEPS * torch.finfo(torch.float32).tiny


class WireError(ValueError):
    """A tensor cannot travel on this wire, or what arrived does not belong to one; the text says what to choose."""


def pack(tensor: Tensor, wire: str) -> tuple[Tensor, Tensor]:
    """The values and scales of ``tensor`` as they travel.

    Parameters
    ----------
    tensor : Tensor
        Floating point, ``(..., hidden)``, on any device.
    wire : str
        One of :data:`hsplitlora_flwr.config.WIRES`.

    Returns
    -------
    values : Tensor
        The wire's dtype, shaped as ``tensor``, on its device, without its graph. It shares the memory of ``tensor``
        where the dtype is the same.
    scale : Tensor
        float32. ``int8``: shaped ``tensor.shape[:-1]``; other wires: empty, ``(0,)``.

    Raises
    ------
    WireError
        If the wire is unknown, or a value is not finite or too large for it.

    Notes
    -----
    Error after :func:`unpack`, for a value ``x`` that is no subnormal number:

    - ``float64``, ``float32``, ``bfloat16``, ``float16``: at most ``|x| * 2**-53``, ``2**-24``, ``2**-8``, ``2**-11``;
    - ``int8``: the error of a token is at most ``sqrt(hidden) * max|y| / 254`` in Euclidean norm, up to fp32 rounding,
      and 0.7 % of the token's norm where ``y`` is spread like a normal distribution. A token whose ``max|y|`` is below
      1.5e-36 becomes zero.
    """
    if wire not in _DTYPES:
        raise WireError(f"wire {wire!r} is unknown; choose one of {', '.join(_DTYPES)}")
    tensor, dtype = tensor.detach(), _DTYPES[wire]
    if dtype == torch.int8:
        return _quantise(tensor)
    _check(_magnitude(tensor.reshape(-1)), dtype, wire)
    return tensor.to(dtype), torch.empty(0)


def unpack(values: Tensor, scale: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensor behind ``values`` and ``scale``, as :func:`pack` gave them.

    Parameters
    ----------
    values, scale : Tensor
        What arrived.
    dtype, device
        Of the result, which is shaped as ``values`` and shares their memory where nothing has to change.

    Raises
    ------
    WireError
        If dtypes and shapes are none that :func:`pack` gives, or a number is not finite in ``dtype``.
    """
    if values.dtype in _FLOATS and scale.numel() == 0:
        _check_arrived(_magnitude(values.reshape(-1)), dtype)
        return values.to(device, dtype)
    tokens = values.shape[:-1] if values.ndim else None
    if values.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != tokens:
        raise WireError(
            f"values {values.dtype} {tuple(values.shape)} with scale {scale.dtype} {tuple(scale.shape)} are no tensor "
            "of a wire; int8 needs one float32 scale per token, other wires none"
        )
    # No rotation makes a value longer than its token: at most 127 steps in each of its places.
    bound = _magnitude(scale.reshape(-1)).double() * (_STEPS * math.sqrt(max(values.shape[-1], 1)))
    _check_arrived(bound, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return _rotated(values.to(device, exact) * scale.to(device, exact).unsqueeze(-1), back=True).to(dtype)


def check_wire(values: Tensor, wire: str) -> None:
    """Raise :class:`WireError` unless ``values`` have the dtype in which numbers travel on ``wire``."""
    if values.dtype != _DTYPES[wire]:
        raise WireError(f"numbers came as {values.dtype} where the wire {wire} was agreed on")


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


def _check(magnitude: Tensor, dtype: torch.dtype, wire: str, unit: int = 1) -> None:
    """Refuse a largest magnitude, given in multiples of ``unit``, that is not finite in ``dtype``."""
    if magnitude.to(dtype).isfinite():
        return
    if not magnitude.isfinite():
        raise WireError("the activation or its gradient is not finite (inf or nan): training diverged; lower train.lr")
    largest, most = unit * magnitude.item(), unit * torch.finfo(dtype).max
    remedy = "bfloat16 or int8" if wire == "float16" else "float64"
    raise WireError(
        f"a value of magnitude {largest:.4g} does not fit the wire {wire}, which ends at {most:.4g}; "
        f"set transport.up and transport.down to {remedy}"
    )
