"""What parts are made of: cases, their figures, and the place where they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Where the benchmark runs.

    Parameters
    ----------
    device : torch.device
    small : bool
        Tiny models, and few turns.
    """

    device: torch.device
    small: bool

    @classmethod
    def here(cls, *, small: bool) -> Place:
        """The first GPU, or the CPU, where all is small."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda", 0), small)
        return cls(torch.device("cpu"), small=True)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is one that computes while the host goes on."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], object]) -> float:
        """What ``action`` takes on an idle device, to its end there."""
        self.wait()
        started = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - started

    def free_bytes(self) -> int | None:
        """Memory of the device that can be had; None where it is the host's."""
        return torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else None


@dataclass(frozen=True)
class Figure:
    """One figure: its name with its unit, its value, and the limits that are its goal."""

    name: str
    value: float | str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @classmethod
    def not_run(cls, why: str) -> Figure:
        """In place of figures that there are none of."""
        return cls("not run", "", note=" ".join(why.split()))

    @property
    def goal(self) -> str:
        """The limits, as text."""
        low = "" if self.at_least is None else f">= {self.at_least:g}"
        high = "" if self.at_most is None else f"<= {self.at_most:g}"
        return ", ".join(filter(None, (low, high)))

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if isinstance(self.value, str) or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True)
class Case:
    """Figures that come or fail together."""

    name: str
    run: Callable[[], Iterator[Figure]]
