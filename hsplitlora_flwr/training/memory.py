"""Peak memory of this process, from one point in time on: of the machine, and of the GPUs that its model lies on.

A worker process of a simulation serves several clients in turn, so its lifetime peak would show the largest of them for
all. The kernel's high-water mark is therefore reset before each client.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil
import torch
from transformers import PretrainedConfig

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import AdapterSpec, inject
from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.families import Architecture, tiny_config
from hsplitlora_flwr.models.placement import gpus_of
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import client_part
from hsplitlora_flwr.planning.budget import Budget
from hsplitlora_flwr.training.schedule import AdapterOptimizer

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
FRAGMENTED = 2
"""A process that keeps freed memory takes up to so many times what it uses."""


def may_fragment(budget: Budget, planned: int) -> bool:
    """Whether a budget holds a plan of so many bytes, the process's own among them, even where it fragments."""
    return budget.process_bytes + FRAGMENTED * (planned - budget.process_bytes) <= budget.memory_bytes


def return_freed_memory() -> None:
    """Make the C library give freed activations back to the system at once, from now on.

    By default glibc keeps freed blocks of up to 32 MB in a heap that fragments: a training process then takes nearly
    twice what it uses, and no plan can tell how much. Blocks from 128 KiB on get mappings of their own instead. That
    costs page faults, up to half the time of a step, and makes the peak what the cost model says. Where the C library
    is another one nothing changes.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 128 << 10)
    _glibc("mallopt", _M_TRIM_THRESHOLD, 128 << 10)


def keep_freed_memory(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread that keeps freed activations for the next ones, as glibc does by default.

    Steps are faster, and the peak is up to :data:`FRAGMENTED` times as high. The thread has a heap of its own, which
    leaves with what lies in it: whatever this process does next finds its own heap as it was.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 32 << 20)
    _glibc("mallopt", _M_TRIM_THRESHOLD, 64 << 20)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(work).result()
    finally:
        return_freed_memory()
        trim_heap()


def trim_heap() -> None:
    """Give back what smaller tensors left free in the heap, which larger ones cannot use."""
    _glibc("malloc_trim", 0)


class RoomForPeaks:
    """Gives back what smaller batches left free before one that is about to set a new peak."""

    def __init__(self) -> None:
        self._largest = 0

    def make_for(self, batch: Batch) -> None:
        """Before a batch is computed."""
        if batch.input_ids.numel() > self._largest:
            self._largest = batch.input_ids.numel()
            trim_heap()


def resting_bytes() -> int:
    """Resident memory of this process, in bytes, after giving back what is free; without memory shared with others."""
    gc.collect()
    trim_heap()
    return _resident()


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


class _HeapInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _free_in_heap() -> int:
    """Bytes that the C library holds in its heap without using them; 0 where it does not say."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
            mallinfo2.restype = _HeapInfo
            return int(mallinfo2().fordblks)
    return 0


def process_bytes(config: PretrainedConfig) -> int:
    """What this process takes for itself while it trains, in bytes: the constant of the cost model.

    The first training step brings code into memory: kernels, autograd, the optimizer, the model's own module. So a tiny
    model of the same architecture takes a step before the first measurement. What is free in the heap counts as well,
    because small tensors fill it again and it is not given back between them.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model that is to be trained.
    """
    _bring_code_in(Architecture.of(config))
    return resting_bytes() + _free_in_heap()


@cache
def _bring_code_in(architecture: Architecture) -> None:
    """Take a training step with a tiny model."""
    config = architecture.config
    with torch.random.fork_rng(devices=[]):
        model = client_part(build_causal_lm(tiny_config(config, 2)), find_family(config), 1)
    names = [name for name, _ in model.linears()]
    optimizer = AdapterOptimizer(inject(model, {name: AdapterSpec(2, 4.0) for name in names}, ""), TrainConfig())
    ids = torch.ones(2, 16, dtype=torch.long)
    model.train()(ids, ids).sum().backward()
    optimizer.step(0, optimizer.grad_norm())


class Gpus:
    """What torch says of the memory of GPUs, in bytes."""

    def free(self, name: str) -> int:
        """Memory that this process has or may have there: what its allocator holds is not free for others."""
        return int(torch.cuda.mem_get_info(name)[0] + torch.cuda.memory_reserved(name))

    def begin_peak(self, name: str) -> None:
        """From now on :meth:`peak` counts anew."""
        torch.cuda.reset_peak_memory_stats(name)

    def peak(self, name: str) -> int:
        """The most that this process's tensors took there. CUDA itself takes some 0.5 GB beside them."""
        return int(torch.cuda.max_memory_allocated(name))


class PeakMemory:
    """Context manager that measures peaks inside the block.

    Parameters
    ----------
    devices : Sequence[str]
        Where the model lies, by torch's names.
    gpus : Gpus
        Who says what is taken there.

    Attributes
    ----------
    host_bytes : int
        Peak of the resident memory of this process.
    bytes : int
        Peak where the model lies: of tensors on its GPUs, or ``host_bytes``.
    """

    def __init__(self, devices: Sequence[str] = ("cpu",), gpus: Gpus | None = None) -> None:
        self.bytes = self.host_bytes = 0
        self._names, self._gpus = gpus_of(devices), gpus or Gpus()
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None  # where the kernel does not keep the peak

    def __enter__(self) -> PeakMemory:
        self.host_bytes = resting_bytes()
        if not _reset_high_water():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        for name in self._names:
            self._gpus.begin_peak(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is None:
            self.host_bytes = _status("VmHWM") - _status("RssShmem")
        else:
            self._done.set()
            self._sampler.join()
        self.bytes = sum(map(self._gpus.peak, self._names)) if self._names else self.host_bytes

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.host_bytes = max(self.host_bytes, _resident())


def _reset_high_water() -> bool:
    """Reset the kernel's high-water mark of this process; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _resident() -> int:
    """Resident bytes, without shared memory: that is the object store of a simulation, which belongs to no client."""
    return int(psutil.Process().memory_info().rss) - (_status("RssShmem") if sys.platform == "linux" else 0)


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes; 0 where the kernel does not say it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def free_bytes(devices: Sequence[str] = ("cpu",), gpus: Gpus | None = None) -> int:
    """Memory that this process has or may have, in bytes: on the GPUs among these devices, or in the machine."""
    if names := gpus_of(devices):
        return sum(map((gpus or Gpus()).free, names))
    return int(psutil.virtual_memory().available) + resting_bytes()
