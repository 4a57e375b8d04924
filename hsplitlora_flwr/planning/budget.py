"""What a machine may use in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass


class PlanError(ValueError):
    """No plan is possible; the text says for whom, and by how many bytes."""


@dataclass(frozen=True)
class Budget:
    """What one machine has.

    Parameters
    ----------
    memory_bytes : int
        Memory that its process may take at its peak.
    process_bytes : int
        What that process takes before it loads anything (measured).
    flops : float, optional
        Speed in FLOP/s; the mean of the stated ones when None.
    up, down : float, optional
        Link to and from the server in bytes/s; not limiting when None.
    adapter_bytes : int, optional
        Of a client: bytes of adapters that it may send in a round; unbounded when None.

    Raises
    ------
    PlanError
        If a speed is not a finite number above 0, or ``adapter_bytes`` is below 0.
    """

    memory_bytes: int
    process_bytes: int = 0
    flops: float | None = None
    up: float | None = None
    down: float | None = None
    adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "up", "down"):
            speed = getattr(self, name)
            if speed is not None and not 0 < speed < math.inf:
                raise PlanError(
                    f"Budget.{name}={speed!r} must be a finite number above 0, or None when it is not known"
                )
        if self.adapter_bytes is not None and self.adapter_bytes < 0:
            raise PlanError(f"Budget.adapter_bytes={self.adapter_bytes!r} must be 0 or more, or None for no bound")
