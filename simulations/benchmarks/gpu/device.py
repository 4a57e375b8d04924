"""What a device can do, what memory is taken on it, and where the host waits for it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hsplitlora_flwr.planning.trace import LiveBytes
from simulations.benchmarks.gpu.cases import Case, Figure, Place

SHEETS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}
"""Tflop/s in bf16, dense, by the makers' data sheets; the first name that is part of a device's counts."""

_peaks: dict[torch.device, float] = {}


def card(place: Place) -> Iterator[Case]:
    """The device itself."""
    yield Case(_name(place), lambda: _reach(place))


def _reach(place: Place) -> Iterator[Figure]:
    if sheet := sheet_tflops(place):
        yield Figure("bf16_tflops_of_data_sheet", sheet)
    size = _size(place)
    yield Figure("bf16_tflops_measured", measured_tflops(place), note=f"products of {size} x {size}")
    numbers = 2**16 if place.small else 2**25
    there = torch.empty(numbers, device=place.device)
    for kind, here in (("pageable", torch.empty(numbers)), ("pinned", _pinned(numbers, place))):
        if here is None:
            yield Figure.not_run("copies of pinned memory, which needs a GPU")
            continue
        for way, to, source in (("up", there, here), ("down", here, there)):
            to.copy_(source)
            rate = there.nbytes / place.seconds(lambda to=to, source=source: to.copy_(source)) / 1e9  # type: ignore[misc]
            yield Figure(f"copy_{way}_gb_per_s", rate, note=f"{there.nbytes / 1e6:.3g} MB, {kind} memory")


def _name(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.is_gpu else "CPU"


def _pinned(numbers: int, place: Place) -> Tensor | None:
    return torch.empty(numbers, pin_memory=True) if place.is_gpu else None


def _size(place: Place) -> int:
    return 256 if place.small else 8192


def sheet_tflops(place: Place) -> float:
    """Of :data:`SHEETS`; 0 for a device that it does not know."""
    name = _name(place)
    return next((peak for known, peak in SHEETS.items() if known in name), 0.0)


def measured_tflops(place: Place) -> float:
    """Tflop/s of large products in bf16, measured once; the best of a few turns."""
    if place.device not in _peaks:
        size, times = _size(place), 2 if place.small else 10
        a, b = (torch.randn(size, size, device=place.device).bfloat16() for _ in range(2))

        def products() -> None:
            for _ in range(times):
                a @ b

        products()
        seconds = min(place.seconds(products) for _ in range(3))
        _peaks[place.device] = times * 2 * size**3 / seconds / 1e12
    return _peaks[place.device]


def shares(place: Place, flops: float, seconds: float) -> Iterator[Figure]:
    """What of its peaks a device reached that did so many operations, as the cost model counts them."""
    reached = flops / seconds / 1e12
    yield Figure("tflops", reached)
    if sheet := sheet_tflops(place):
        yield Figure("share_of_data_sheet", reached / sheet)
    yield Figure("share_of_measured_peak", reached / measured_tflops(place))


class PeakBytes:
    """Context manager; ``bytes`` holds the most memory of tensors on the device inside the block.

    On a GPU it is the allocator's peak, all that is there included; on a CPU that of tensors made in the block, and of
    those that are said to be ``held``.
    """

    def __init__(self, place: Place, held: Iterable[Tensor]) -> None:
        self._place, self.bytes = place, 0
        tensors = list(held)
        self._live: Any = LiveBytes(tensors)
        self._held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def __enter__(self) -> PeakBytes:
        if self._place.is_gpu:
            self._place.wait()
            torch.cuda.reset_peak_memory_stats(self._place.device)
        else:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._place.is_gpu:
            self._place.wait()
            self.bytes = torch.cuda.max_memory_allocated(self._place.device)
        else:
            self._live.__exit__(kind, error, trace)
            self.bytes = self._held + self._live.peak


def waits(place: Place, action: Callable[[], object]) -> Iterator[Figure]:
    """How often the host waits for the device in ``action``, and in which lines."""
    if not place.is_gpu:
        yield Figure.not_run("host_waits: they are counted on a GPU alone")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    yield Figure("host_waits", float(lines.total()), note=", ".join(f"{n} x {line}" for line, n in lines.most_common()))
