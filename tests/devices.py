"""Several devices on a machine that has one: tensors that compute on the CPU and say that they are elsewhere.

Inside ``with SeveralDevices():`` the devices ``meta:0``, ``meta:1`` and so on hold tensors with real values. An
operation on tensors of two of them fails, as it would on two GPUs; only ``.to`` takes a tensor from one to another.
Where a GPU would be waited for is noted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class SeveralDevices(TorchDispatchMode):
    """Pretends while the block lasts.

    Attributes
    ----------
    waits : list of str
        Each time that a host would have waited for a GPU: the line of this project, or of a library, that made it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self._generator = torch.Generator

    def __enter__(self) -> SeveralDevices:
        torch.Generator = lambda device="cpu": self._generator(_real(torch.device(device)))  # type: ignore[misc, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.Generator = self._generator  # type: ignore[misc]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args, kwargs or {}):
            self.waits.append(_caller())
        return _compute(func, args, kwargs or {})


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host needs a value or a size that only the device knows, or its own memory until a copy is made."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    aten = torch.ops.aten
    if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default):
        return bool(there)
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return any(tensor.dtype == torch.bool for tensor in there[1:])
    if func is aten._to_copy.default:
        goes, moves = _pretended(kwargs.get("device")), kwargs.get("device") is not None
        return moves and bool(there) != goes and not (goes and kwargs.get("non_blocking"))
    if func is aten.copy_.default:
        return len(there) == 1 and len(tensors) == 2 and not (there[0] is args[0] and kwargs.get("non_blocking"))
    return False


def _caller() -> str:
    """The innermost line outside torch and this file, as ``module:line``."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}"


def _pretended(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == "meta" and device.index is not None


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if _pretended(device) else device


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors}
    wanted = kwargs.get("device")
    pretended = _pretended(wanted)
    if not pretended and not any(isinstance(tensor, Elsewhere) for tensor in tensors):
        return func(*args, **kwargs)
    moves = func is torch.ops.aten._to_copy.default or func is torch.ops.aten.copy_.default
    if len(devices) > 1 and not moves:
        raise AssertionError(f"{func} on tensors of {sorted(map(str, devices))}")
    target = wanted if wanted is not None else tensors[0].device
    if wanted is not None:
        kwargs = kwargs | {"device": _real(wanted)}
    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if func._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda leaf: _outside(leaf, target), result)


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


def _outside(leaf: Any, device: torch.device) -> Any:
    return Elsewhere(leaf, device) if isinstance(leaf, torch.Tensor) and _pretended(device) else leaf
