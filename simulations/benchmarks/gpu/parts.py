"""The parts of the benchmark ``gpu``, each with its own time; what fails, or finds none, is said and hinders nobody."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from simulations.benchmarks.common import Row, Setup
from simulations.benchmarks.gpu.cases import Case, Figure, Place
from simulations.benchmarks.gpu.clients import clients
from simulations.benchmarks.gpu.device import card
from simulations.benchmarks.gpu.exact import exact
from simulations.benchmarks.gpu.step import step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Cases that share their time in seconds: when it is over, no other one begins."""

    cases: Callable[[Place], Iterator[Case]]
    seconds: float


PARTS = {
    "card": Part(card, 30),
    "s1": Part(exact, 100),
    "step": Part(step, 60),
    "clients bfloat16": Part(lambda place: clients(place, "none"), 120),
    "clients 4bit": Part(lambda place: clients(place, "4bit"), 120),
}
"""Together 430 s; the case that is under way when the time of a part is over is finished."""


def gpu(setup: Setup) -> Iterator[Row]:
    """Everything on one device: the first GPU, or without one, or with ``small``, the CPU and tiny models.

    Products in fp32 are exact ones (no TF32). A row is a figure of a case, beside the goal where there is one.

    - ``card``: what the device reaches in large products and copies. Shares of a peak are of the figure of the maker's
      data sheet (bf16, dense) where the device's name is known, and of the measured one.
    - ``s1``: split training against stock PEFT from the same adapters, in fp32 and bf16 over every kind of model that
      is known by name, labels on either side, frames as bytes: the largest relative error of a step's loss, and that
      of the update of all adapters in 3 steps of SGD.
    - ``step``: tokens/s of a client and a server that exchange frames, as they are and as bytes, against stock PEFT on
      the same batches; and where the host waits for the device.
    - ``clients``: 8 clients with different splits of a LLaMA of 7 billion parameters, in bf16 and in 4 bits. The
      server's halves in one pass together against one after another; whole steps, client halves included, against one
      run of PEFT on the same tokens; and the most memory beside the prediction of the cost model.

    Cases that could not be run are rows too, ``not run``, with the reason.
    """
    place = Place.here(small=setup.small)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for name, part in PARTS.items():
        yield from _rows(name, part, place)


def _rows(name: str, part: Part, place: Place) -> Iterator[Row]:
    end = time.monotonic() + part.seconds
    try:
        for case in part.cases(place):
            if time.monotonic() > end:
                yield _row(name, case.name, Figure.not_run(f"the {part.seconds:.0f} s of this part are over"))
                continue
            started = time.monotonic()
            try:
                for figure in case.run():
                    yield _row(name, case.name, figure)
            except Exception as error:  # whatever it is, the others may go well
                log.warning("%s, %s: failed after %.1f s", name, case.name, time.monotonic() - started, exc_info=True)
                yield _row(name, case.name, Figure.not_run(f"{type(error).__name__}: {error}"))
            _free()
    except Exception as error:
        log.warning("%s: failed", name, exc_info=True)
        yield _row(name, "", Figure.not_run(f"{type(error).__name__}: {error}"))
    _free()


def _row(part: str, case: str, figure: Figure) -> Row:
    met = "" if figure.met is None else "yes" if figure.met else "no"
    return {
        "part": part,
        "case": case,
        "figure": figure.name,
        "value": figure.value,
        "goal": figure.goal,
        "met": met,
        "note": figure.note,
    }


def _free() -> None:
    """What a case left on the device, a failed one in its traceback."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
