"""Whether a side of a run has a process of its own, as with Flower's engines, or shares one with all others.

The memory of a process and the settings of its C library belong to one side only if the process does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import TypeVar

from transformers import PretrainedConfig

from hsplitlora_flwr.training.memory import (
    PeakMemory,
    keep_freed_memory,
    process_bytes,
    return_freed_memory,
    trim_heap,
)

T = TypeVar("T")


class OwnProcess:
    """A process that nobody else works in."""

    def resting_bytes(self, config: PretrainedConfig) -> int:
        """What it takes for itself; see :func:`~hsplitlora_flwr.training.memory.process_bytes`."""
        return process_bytes(config)

    def settle(self) -> None:
        """Take what stays out of garbage collection, which is done before each task: imported code takes it most of a
        second."""
        gc.collect()
        gc.freeze()

    def return_freed_memory(self) -> None:
        """Keep to what a plan predicts, from now on."""
        return_freed_memory()

    def keep_freed_memory(self, work: Callable[[], T]) -> T:
        """Do ``work`` fast, with memory to spare."""
        return keep_freed_memory(work)

    def loading(self) -> AbstractContextManager[object]:
        """Around whatever makes a model."""
        return nullcontext()

    def peak_memory(self, devices: Sequence[str]) -> PeakMemory:
        """A context manager that measures the peaks inside of it, with a model on these devices."""
        return PeakMemory(devices)


class SharedProcess(OwnProcess):
    """A process in which the server and several clients work at the same time, each in threads of its own.

    What one of them takes cannot be told, so no peak is measured; what a process would take for itself is measured
    once, before anybody has loaded anything.
    """

    def __init__(self) -> None:
        self._resting = 0
        self._loading = Lock()

    def resting_bytes(self, config: PretrainedConfig) -> int:
        self._resting = self._resting or process_bytes(config)
        return self._resting

    def settle(self) -> None:
        """Nothing: what one of them is at does not stay."""

    def return_freed_memory(self) -> None:
        """Nothing: no plan speaks of all of them together, and steps are faster."""

    def keep_freed_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            trim_heap()

    def loading(self) -> AbstractContextManager[object]:
        """One at a time: a model is made without memory by changing torch for all threads."""
        return self._loading

    def peak_memory(self, devices: Sequence[str]) -> PeakMemory:
        return Unmeasured()


class Unmeasured(PeakMemory):
    """Measures nothing; the bytes stay 0."""

    def __enter__(self) -> Unmeasured:
        return self

    def __exit__(self, *_: object) -> None: ...
