"""Several devices on a machine that has one: tensors that compute on the CPU and say that they are elsewhere.

Inside ``with SeveralDevices():`` the devices ``meta:0``, ``meta:1`` and so on hold tensors with real values. An
operation on tensors of two of them fails, as it would on two GPUs; only ``.to`` takes a tensor from one to another.
"""

from __future__ import annotations

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
    """Pretends while the block lasts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors}
    wanted = kwargs.get("device")
    pretended = isinstance(wanted, torch.device) and wanted.type == "meta" and wanted.index is not None
    if not pretended and not any(isinstance(tensor, Elsewhere) for tensor in tensors):
        return func(*args, **kwargs)
    moves = func is torch.ops.aten._to_copy.default or func is torch.ops.aten.copy_.default
    if len(devices) > 1 and not moves:
        raise AssertionError(f"{func} on tensors of {sorted(map(str, devices))}")
    target = wanted if wanted is not None else tensors[0].device
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if pretended else wanted}
    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if func._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda leaf: _outside(leaf, target), result)


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


def _outside(leaf: Any, device: torch.device) -> Any:
    pretended = device.type == "meta" and device.index is not None
    return Elsewhere(leaf, device) if isinstance(leaf, torch.Tensor) and pretended else leaf
