"""Copies between the host and a device that wait for nothing they need not wait for.

A GPU computes what it was given while the host continues. Reading a number waits until the device has done all of it,
and then the device waits for its next work. So a step reads once, and copies to a device are not waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` there, for whatever that device does next; it may be written to or let go at once."""
    # Out of memory that is not pinned, CUDA returns when it has taken a copy.
    return tensor.to(device, dtype or tensor.dtype, non_blocking=tensor.device.type == "cpu")


def to_host(tensor: Tensor) -> Tensor:
    """``tensor``, without a graph, in the host's memory: from a GPU in pinned memory, which is far faster."""
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.to("cpu")
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def to_numbers(*scalars: Tensor) -> list[float]:
    """Scalars as numbers: who asks for them together waits for their device once."""
    if not scalars:
        return []
    together = torch.stack([scalar.detach().to(scalars[0].device, torch.float64) for scalar in scalars])
    numbers: list[float] = together.to("cpu").tolist()
    return numbers
