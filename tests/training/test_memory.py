"""The peak of one client is not hidden by a larger one before it."""

from __future__ import annotations

import pytest
import torch

from hsplitlora_flwr.training import memory
from hsplitlora_flwr.training.memory import PeakMemory, resting_bytes

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
    assert 290 * MIB < peak_of(300) < 400 * MIB
    assert 90 * MIB < peak_of(100) < 200 * MIB
