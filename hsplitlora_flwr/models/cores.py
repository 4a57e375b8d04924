"""The cores that this process may use: in a container often fewer than the machine has."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_limit = 0
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container on Linux: its CPU time in a period, and the period, in us


def limit_cores(cores: int) -> None:
    """Let this process use so many cores at most, where it shares the machine with others; 0 = all."""
    global _limit
    _limit = cores


def all_cores() -> int:
    """Threads of a pass that has this machine to itself: by the machine, the process's affinity and its quota."""
    # Windows and macOS know no affinity of this kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota() or cores, _limit or cores)


def _quota() -> int:
    """Cores that the container's time is worth, rounded up; 0 where it is not limited."""
    with suppress(OSError, ValueError):  # no container, or "max"
        quota, period = map(int, _QUOTA.read_text().split())
        return math.ceil(quota / period)
    return 0
