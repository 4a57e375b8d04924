"""Benchmarks: ``python -m simulations.benchmark [NAME...] [--model MODEL] [--data FOLDER] [--out FILE]``.

A benchmark yields rows of figures, units in their names. All rows of the named benchmarks, or of all of them, are shown
as tables and, with ``--out``, written as JSON together with the machine, the versions and the date. Sides that are
compared take turns; a figure is the median over the turns, a quotient the median of the quotients turn by turn, and a
spread the distance between the quartiles. :mod:`simulations.benchmarks` has a module for each, which says what is
compared with what:

- ``memory``: peak memory of a client process against the prediction of the cost model, over split points and batches.
- ``frozen``: time, bytes and memory of a client that trains its part, and of one that computes forward alone.
- ``step``: training speed of a client and the server against the unsplit model with stock PEFT.
- ``clients``: total training speed of clients that train at once against that of one.
- ``overlap``: time of a step over slow links with micro-batches in flight, against compute alone and wire alone.
- ``probe``: time and memory that scoring the weights adds to a step, on either side of the cut.
- ``aggregate``: aggregation of a round for LLaMA-2-7B against a dense sum and against PEFT.
- ``wire``: speed of the stream against a bare gRPC echo.
- ``narrow``: what narrow numbers on the wire do to a step.
- ``scale``: rounds with up to 500 clients of a tiny model, and with 50 of 1,000: time per client, and memory.
- ``plan``: time to plan for 1,000 and 10,000 clients of a model of 70 billion parameters.
- ``start``: what a client process does before its first step, part by part.
- ``deployment``: time of a step on SuperNodes against that of a simulation.
- ``gpu``: all that a GPU does: what is exact there, speed, memory; on a machine without one, or with ``--small``, tiny
  models take the same way.

``soak``, which is not among all, is a deployment whose links and processes fail at random for ``--minutes``.

``--model`` is for all but :data:`OWN_SHAPES`.
Figures are written after every row, so that those of a run that is ended are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from hsplitlora_flwr.cli.terminal import table_console
from hsplitlora_flwr.models.cores import all_cores
from simulations.benchmarks.common import Benchmark, Row, Setup


def _later(module: str, name: str) -> Benchmark:
    """A benchmark whose module is imported when it runs: not every machine has what another one needs."""

    def run(setup: Setup) -> Iterator[Row]:
        benchmark: Benchmark = getattr(import_module(f"simulations.benchmarks.{module}"), name)
        return benchmark(setup)

    return run


_MODULES = {
    "memory": "memory",
    "frozen": "frozen",
    "step": "step",
    "clients": "clients",
    "overlap": "overlap",
    "probe": "probe",
    "aggregate": "aggregate",
    "wire": "wire",
    "narrow": "narrow",
    "scale": "scale",
    "plan": "plan",
    "start": "deployment",
    "deployment": "deployment",
    "gpu": "gpu",
}
BENCHMARKS = {name: _later(module, name) for name, module in _MODULES.items()}
ALONE = {"soak": _later("soak", "soak")}
"""Those that run where they are named, and not among all."""
OWN_SHAPES = ("aggregate", "wire", "scale", "plan", "gpu", "soak")
"""Those that know nothing of ``--model``: they bring models of their own, or none."""
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "grpcio", "safetensors", "bitsandbytes")


def environment() -> dict[str, Any]:
    """The machine, the versions and the date: what figures depend on."""
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = next(iter(names), model)
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": all_cores(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load_5_min": psutil.getloadavg()[1],
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpus": ", ".join(f"{gpu.name} of {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus) or "none",
        "cuda": torch.version.cuda or "none",
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmark", description="Benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all), or soak")
    parser.add_argument("--model", default=Setup.model, help="model.path (default: %(default)s)")
    parser.add_argument("--data", default=Setup.data, metavar="FOLDER", help="of the data set e2e (default: dialogues)")
    parser.add_argument(
        "--small", action="store_true", help="tiny models for gpu, as on a machine without one; soak without faults"
    )
    parser.add_argument("--minutes", type=float, default=Setup.minutes, help="that soak lasts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS | ALONE]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    setup, console = Setup(options.model, options.data, options.small, options.minutes), table_console()
    machine = environment()
    results: dict[str, list[Row]] = {}
    names = options.names or list(BENCHMARKS)
    model = setup.model if set(names) - set(OWN_SHAPES) else "of its own"
    written = {"model": model, "data": setup.data or "dialogues", "environment": machine, "benchmarks": results}
    for name in names:
        results[name] = []
        for row in (BENCHMARKS | ALONE)[name](setup):
            results[name].append(row)
            console.print(", ".join(f"{key} {shown(value)}" for key, value in row.items()), style="dim", soft_wrap=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        console.print(table(name, results[name]))
    console.print(", ".join(f"{key} {shown(value)}" for key, value in machine.items()), soft_wrap=True)
    if options.out:
        console.print(f"figures in {options.out}", soft_wrap=True)
    return 0


def table(title: str, rows: Sequence[Row]) -> Table:
    """Rows as a table."""
    result = Table(title=title)
    for key in rows[0]:
        result.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        result.add_row(*map(shown, row.values()))
    return result


def shown(value: float | str) -> str:
    """A figure as text, numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
