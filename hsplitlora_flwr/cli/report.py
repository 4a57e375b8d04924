"""What runs came to: ``hsplitlora report RUN [RUN...]``.

Makes ``report.html`` of a run anew from its ``summary.json``. Several runs are laid side by side: the settings in which
they differ, and what came out.

::

    hsplitlora report runs/2026-11-28_00-58-10
    hsplitlora report runs/sweep/*
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from hsplitlora_flwr.cli.outcome import Outcome, ends
from hsplitlora_flwr.cli.terminal import table_console
from hsplitlora_flwr.comparison.results import measurements
from hsplitlora_flwr.reporting.page import PAGE_FILE, write_page

_OF_EVERY_RUN = ("run.dir", "run.resume")


def report(arguments: Sequence[str] | None = None) -> None:
    """Write the page of each run, and print a table of several.

    Raises
    ------
    ValueError, OSError
        If one is no run folder, or cannot be written.
    """
    parser = argparse.ArgumentParser(description="Make the page of a run anew; several runs are laid side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    outcomes = [Outcome.read(folder) for folder in parser.parse_args(arguments).runs]
    console = table_console()
    for outcome in outcomes:
        write_page(outcome.summary, outcome.folder)
        console.print(str(outcome.folder / PAGE_FILE), soft_wrap=True, markup=False)
    if len(outcomes) > 1:
        console.print(side_by_side(outcomes))


def side_by_side(outcomes: Sequence[Outcome]) -> Table:
    """A column a run; rows for the settings that differ, then for what came out."""
    table = Table("", *(outcome.folder.name for outcome in outcomes))
    settings = [outcome.config.to_run_config() for outcome in outcomes]
    for key in settings[0]:
        if key not in _OF_EVERY_RUN and len({str(each[key]) for each in settings}) > 1:
            table.add_row(key, *(str(each[key]) for each in settings))
    table.add_section()
    figures = [_figures(outcome) for outcome in outcomes]
    for name in figures[0]:
        table.add_row(name, *(each[name] for each in figures))
    return table


def _figures(outcome: Outcome) -> dict[str, str]:
    finished = outcome.summary["status"] == "finished" and outcome.summary["rounds"]
    found = measurements(outcome.summary) if finished else None
    shown = {
        "perplexity before": found and f"{found['perplexities'][0]:.3f}",
        "perplexity after": found and f"{found['perplexities'][-1]:.3f}",
        "trainable parameters, 1e6": found and f"{found['trainable_parameters'] / 1e6:.2f}",
        "peak client memory, GB": found and found["peak_bytes"] and f"{found['peak_bytes'] / 1e9:.2f}",
        "sent by all, MB": found and f"{(sum(found['bytes_up']) + sum(found['bytes_down'])) / 1e6:.1f}",
        "seconds": found and f"{found['seconds']:.0f}",
    }
    return {"status": str(outcome.summary["status"])} | {name: text or "-" for name, text in shown.items()}


def command() -> None:
    """The command line."""
    ends(report)
