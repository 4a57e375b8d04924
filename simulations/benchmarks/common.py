"""What benchmarks share: rows of figures, sides that take turns, processes apart, batches and adapters."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.models.parts import IGNORED

Row = Mapping[str, float | str]
"""One line of figures, units in their names."""

SHAPES = ((8, 64), (4, 128))
"""(batch size, sequence length)."""
RANK = 8
STEPS = 4
LABELLED = 8  # last tokens of a row; the head's share is not what is measured, and large


@dataclass(frozen=True)
class Setup:
    """What the user says about all benchmarks.

    Parameters
    ----------
    model : str
        ``model.path``.
    data : str
        Folder of the data set ``e2e``; empty for ``dialogues``.
    small : bool
        Tiny models for ``gpu``, whatever is there; ``soak`` without faults.
    minutes : float
        That ``soak`` lasts.
    """

    model: str = "smollm2-135m"
    data: str = ""
    small: bool = False
    minutes: float = 30.0


Benchmark = Callable[[Setup], Iterator[Row]]
"""Yields rows with the same keys."""


@dataclass(frozen=True)
class Sample:
    """The figures of one side over all turns, in their order."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        """Half of the turns are below it."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Distance between the quartiles; 0 for a single turn."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return high - low

    def __truediv__(self, other: Sample) -> Sample:
        """Quotients turn by turn: both sides of one met the machine in the same state."""
        return Sample([mine / its for mine, its in zip(self.values, other.values, strict=True)])


def take_turns(sides: Sequence[Callable[[], float]], turns: int, warm_up: int = 1) -> list[Sample]:
    """Figures of sides that take turns, so that all meet the same machine; those of the first ``warm_up`` are dropped.

    Every other turn goes backwards, so that no side always follows the same one.
    """
    values: list[list[float]] = [[] for _ in sides]
    for turn in range(warm_up + turns):
        for index in range(len(sides))[:: -1 if turn % 2 else 1]:
            values[index].append(sides[index]())
    return [Sample(each[warm_up:]) for each in values]


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Apart:
    """An object in a process of its own; a context manager.

    Parameters
    ----------
    make : Callable[..., object]
        Makes the object there, a class for instance; it and its arguments can be pickled.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_make, initargs=(make, arguments)
        )

    def start(self, method: str, *arguments: object) -> Future[Any]:
        """Call a method there; the result comes later."""
        return self._process.submit(_call, method, arguments)

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method there, and wait for its result."""
        return self.start(method, *arguments).result()

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.shutdown()


_held = threading.local()
"""Of the one thread of a process that takes calls."""


def _make(make: Callable[..., object], arguments: Sequence[object]) -> None:
    _held.object = make(*arguments)


def _call(method: str, arguments: Sequence[object]) -> Any:
    return getattr(_held.object, method)(*arguments)


def specs(names: Iterable[str]) -> dict[str, AdapterSpec]:
    """An adapter of rank 8 for every layer."""
    return {name: AdapterSpec(RANK, 2.0 * RANK) for name in names}


def spread_batches(rows: int, length: int, vocabulary: int) -> Iterator[Batch]:
    """Batches of one padded and otherwise full rows, whose ids are spread evenly over the vocabulary.

    The embeddings are mapped from a file, and only the pages that some token has used take memory. A long run uses
    them all; a few of these batches do so, too.
    """
    count = rows * length
    stride = -(-vocabulary // count)
    step = 0
    while True:
        ids = (torch.arange(count) * stride + step * stride // STEPS) % vocabulary
        ids = ids.reshape(rows, length)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        labels = ids.masked_fill((torch.arange(length) < length - LABELLED) | (mask == 0), IGNORED)
        yield Batch(ids, mask, labels)
        step += 1
