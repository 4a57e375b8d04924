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
- ``scale``: rounds with up to 500 clients of a tiny model: time per client, and memory.
- ``plan``: time to plan for 1000 clients of a model of 70 billion parameters.
- ``start``: what a client process does before its first step, part by part.
- ``deployment``: time of a step on SuperNodes against that of a simulation.

``--model`` is for the first six, ``narrow``, ``start`` and ``deployment``; the others bring shapes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.models.cores import all_cores
from simulations.benchmarks.aggregate import aggregate
from simulations.benchmarks.clients import clients
from simulations.benchmarks.common import Benchmark, Row, Setup
from simulations.benchmarks.deployment import deployment, start
from simulations.benchmarks.frozen import frozen
from simulations.benchmarks.memory import memory
from simulations.benchmarks.narrow import narrow
from simulations.benchmarks.overlap import overlap
from simulations.benchmarks.plan import plan
from simulations.benchmarks.probe import probe
from simulations.benchmarks.scale import scale
from simulations.benchmarks.step import step
from simulations.benchmarks.wire import wire

BENCHMARKS: dict[str, Benchmark] = {
    "memory": memory,
    "frozen": frozen,
    "step": step,
    "clients": clients,
    "overlap": overlap,
    "probe": probe,
    "aggregate": aggregate,
    "wire": wire,
    "narrow": narrow,
    "scale": scale,
    "plan": plan,
    "start": start,
    "deployment": deployment,
}


def environment() -> dict[str, Any]:
    """The machine, the versions and the date: what figures depend on."""
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = next(iter(names), model)
    packages = ("torch", "transformers", "peft", "grpcio", "safetensors")
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
        **{name: version(name) for name in packages},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmark", description="Benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--model", default=Setup.model, help="model.path (default: %(default)s)")
    parser.add_argument("--data", default=Setup.data, metavar="FOLDER", help="of the data set e2e (default: dialogues)")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    setup, console = Setup(options.model, options.data), Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to keep to
    results: dict[str, list[Row]] = {}
    for name in options.names or BENCHMARKS:
        results[name] = []
        for row in BENCHMARKS[name](setup):
            results[name].append(row)
            console.print(", ".join(f"{key} {shown(value)}" for key, value in row.items()), style="dim", soft_wrap=True)
        console.print(table(name, results[name]))
    content = {"model": setup.model, "data": setup.data or "dialogues"}
    machine = environment()
    console.print(", ".join(f"{key} {shown(value)}" for key, value in machine.items()), soft_wrap=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {**content, "environment": machine, "benchmarks": results}
        options.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
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
