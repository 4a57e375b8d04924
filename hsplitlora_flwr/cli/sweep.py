"""What the runs in a folder came to: ``hsplitlora sweep FOLDER``.

Lays the jobs of a sweep side by side, or any runs whose folders lie in one: ``sweep.html`` with a table and pictures,
each point a link to its run's page, and ``sweep.csv``. ``hsplitlora run -m`` does so at its end, and this at any time.

::

    hsplitlora sweep runs/sweep-lr
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from hsplitlora_flwr.cli.outcome import ends
from hsplitlora_flwr.cli.terminal import table_console
from hsplitlora_flwr.comparison.page import write_points
from hsplitlora_flwr.comparison.points import FIGURES, Point, axes_of, fronts, read_points
from hsplitlora_flwr.config import ConfigError

_NARROW = {
    "perplexity": "perplexity",
    "peak_bytes": "peak GB",
    "traffic": "sent MB",
    "seconds": "s",
    "adapter_bytes": "adapter MB",
}


def show(folder: Path) -> None:
    """Write ``sweep.html`` and ``sweep.csv``, and print the table.

    Raises
    ------
    ConfigError
        If no run lies in the folder.
    """
    points = read_points(folder) if folder.is_dir() else []
    if not points:
        raise ConfigError(f"{folder} holds no runs: none of its folders has a summary.json or a job.json")
    write_points(points, folder, "sweep", f"Sweep: {folder.name}")
    console = table_console()
    console.print(table(points))
    console.print(f"{folder / 'sweep.html'}, and sweep.csv beside it", soft_wrap=True, markup=False)


def table(points: Sequence[Point]) -> Table:
    """A row a run: what it differs in, what came out, and ``*`` at a cost on whose Pareto front it is."""
    axes, on_front = axes_of(points), fronts(points)
    known = [name for name in FIGURES if any(name in point.figures for point in points)]
    shown = Table("run", *(axis.rpartition(".")[2] for axis in axes), "status", header_style="bold")
    for name in known:
        shown.add_column(_NARROW[name], justify="right")
    for point in points:
        best = {*on_front[point.name]}
        cells = (
            FIGURES[name].shown(point.figures.get(name)) + (" *" if name in best else "  " if best else "")
            for name in known
        )
        shown.add_row(point.name, *(point.axes.get(axis, "-") for axis in axes), point.status, *cells)
    if any(on_front.values()):
        shown.caption = "* no other run has a lower perplexity for no more of this"
    return shown


def sweep(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says.

    Raises
    ------
    ValueError, OSError
        If no run lies in the folder, or it cannot be written.
    """
    parser = argparse.ArgumentParser(description="Lay the runs in a folder side by side, as those of a sweep.")
    parser.add_argument("folder", metavar="FOLDER", help="folder of a sweep: the runs lie in folders of it")
    show(Path(parser.parse_args(arguments).folder).expanduser().resolve())


def command() -> None:
    """The command line."""
    ends(sweep)
