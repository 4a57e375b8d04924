"""The peak of one client is not hidden by a larger one before it, and the process's own bytes are all that it keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
import torch

from hsplitlora_flwr.planning import Budget
from hsplitlora_flwr.training import memory
from hsplitlora_flwr.training.memory import (
    Gpus,
    PeakMemory,
    free_bytes,
    keep_freed_memory,
    may_fragment,
    process_bytes,
    resting_bytes,
    return_freed_memory,
)
from tests.tiny import CONFIGS

MIB = 1 << 20


def peak_of(mebibytes: int) -> int:
    rest = resting_bytes()
    with PeakMemory() as peak:
        torch.ones(mebibytes * MIB // 4).sum()
    return peak.bytes - rest


@pytest.mark.parametrize("kernel", [True, False])
def test_a_small_client_after_a_large_one(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
        torch.ones(1)
    assert 280 * MIB < peak_of(300) < 400 * MIB
    assert 80 * MIB < peak_of(100) < 200 * MIB


class PretendedGpus(Gpus):
    """Tensors on ``cuda:1`` once took 5 MiB more than those on ``cuda:0``, before the block."""

    def __init__(self) -> None:
        self.peaks = {"cuda:0": 70 * MIB, "cuda:1": 75 * MIB}

    def free(self, name: str) -> int:
        return 100 * MIB if name == "cuda:0" else 30 * MIB

    def begin_peak(self, name: str) -> None:
        self.peaks[name] = 0

    def peak(self, name: str) -> int:
        return self.peaks[name]


def test_memory_of_the_machine_and_of_gpus_are_two_numbers() -> None:
    gpus, rest = PretendedGpus(), resting_bytes()
    with PeakMemory(["cuda:0", "cuda:1"], gpus) as peak:
        gpus.peaks = {"cuda:0": 7 * MIB, "cuda:1": 2 * MIB}
        torch.ones(300 * MIB // 4).sum()
    assert peak.bytes == 9 * MIB
    assert 280 * MIB < peak.host_bytes - rest < 400 * MIB
    with PeakMemory(["cpu"], gpus) as peak:
        pass
    assert peak.bytes == peak.host_bytes > 0
    assert free_bytes(["cuda:0", "cuda:1"], gpus) == 130 * MIB
    assert free_bytes(["cpu"], gpus) > rest


def test_the_process_keeps_no_less_than_it_rests_at_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    first = process_bytes(CONFIGS["llama"])
    assert torch.equal(torch.get_rng_state(), state)
    assert first >= resting_bytes()
    assert abs(process_bytes(CONFIGS["llama"]) - first) < 8 * MIB, "the second time there is nothing left to bring in"


@pytest.fixture(scope="module")
def clean_process() -> Iterator[Executor]:
    """A process in which no other test has run: their threads allocate and free as they like."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc about its heap")
def test_the_heap_that_small_tensors_leave_counts_as_they_did(clean_process: Executor) -> None:
    clean_process.submit(_leave_small_tensors).result()


def _leave_small_tensors() -> None:
    small = [torch.ones(64 << 8) for _ in range(800)]  # 64 KiB each, too small for a mapping of its own
    pin = torch.ones(64 << 8)  # what lies above them, so that the heap cannot shrink
    with_them, resting_with_them = process_bytes(CONFIGS["llama"]), resting_bytes()
    del small
    assert resting_bytes() < resting_with_them - 30 * MIB, "their pages went back to the system"
    assert process_bytes(CONFIGS["llama"]) > with_them - 10 * MIB, "but their places wait for the next ones"
    del pin


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc about its heap")
def test_a_thread_keeps_freed_memory_and_the_process_does_not_after_it(clean_process: Executor) -> None:
    clean_process.submit(_train_with_and_without_a_thread).result()


def _train_with_and_without_a_thread() -> None:
    return_freed_memory()
    before, rest = _left_over(), resting_bytes()
    assert keep_freed_memory(_left_over) > 40 * MIB
    assert resting_bytes() < rest + 10 * MIB
    assert _left_over() < before + 10 * MIB


def _left_over() -> int:
    """Bytes that freed blocks still take."""
    rest = resting_bytes()
    blocks = [torch.ones(MIB) for _ in range(50)]  # 4 MiB each
    del blocks
    return int(psutil.Process().memory_info().rss) - rest


def test_a_budget_has_room_for_a_fragmented_heap() -> None:
    budget = Budget(100, 40)
    assert may_fragment(budget, 70) and not may_fragment(budget, 71)


def test_what_goes_wrong_in_the_thread_is_said() -> None:
    with pytest.raises(ZeroDivisionError):
        keep_freed_memory(lambda: 1 // 0)
