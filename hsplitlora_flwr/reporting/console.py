"""A run on the terminal: what is going on, the plan, progress with time left, perplexity, and where the results are.

In a terminal the bars of the current round, or what is going on meanwhile, stay at the bottom, and everything final
scrolls above them. Elsewhere (a file, a CI log) the same facts come as plain lines, progress about every five seconds.
Losses are means over a quarter of a client's round: those of single batches say more about the batch.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hsplitlora_flwr.reporting.events import (
    PLAN_COLUMNS,
    STEP_LOG_SECONDS,
    Event,
    event_text,
    format_bytes,
    lost_clients,
    plan_rows,
    plan_title,
)
from hsplitlora_flwr.reporting.live import LiveView
from hsplitlora_flwr.reporting.progress import RunProgress

_CHECKPOINTING = PLAN_COLUMNS.index("checkpointing")


class RunConsole:
    """Shows a run from its events.

    Use it as a context manager, so that the terminal is given back whatever happens.

    Parameters
    ----------
    console : Console or None
        Where to write; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        # where FORCE_COLOR is set, rich takes every file for a terminal
        moves = None if sys.stdout.isatty() else False
        self._console = console or Console(highlight=False, force_interactive=moves)
        self._live = LiveView(self._console) if self._console.is_interactive else None
        self._progress = RunProgress()
        self._perplexity: float | None = None
        self._line_time = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def handle(self, event: Event) -> None:
        """Show one event. Events of an unknown kind are passed over."""
        if self._live:
            self._live.start()
        match event["kind"]:
            case "phase":
                self._phase(event["text"])
            case "status":
                self._line(event["text"])
            case "step":
                self._step(event)
            case "evaluated":
                self._evaluated(event)
            case "planned":
                self._planned(event)
            case "finished":
                self._finished(event)
            case "failed":
                self._failed(event)
            case "client_failed":
                self._progress.client_failed(event)
                self._line(event_text(event) or "", "red")
            case "client_finished":
                self._client_finished(event)
            case "round_finished":
                self._round_finished(event)
        if self._live:
            self._live.show(self._progress)

    def close(self) -> None:
        """Take the bars away; what was printed stays."""
        if self._live:
            self._live.stop()

    def _line(self, text: str, style: str = "") -> None:
        if self._live:
            text = "\n".join(_broken(line, self._console.width) for line in text.splitlines())
        # soft_wrap: a line in a file must not be broken at the 80 columns that rich assumes there
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _phase(self, text: str) -> None:
        if self._live:
            self._live.wait_for(text)
        else:
            self._line(text)

    def _evaluated(self, event: Event) -> None:
        new, old = event["perplexity"], self._perplexity
        self._perplexity = new
        when = f"round {event['round']}" if event["round"] else "before training"
        change = f"{old:.2f} → {new:.2f}" if old is not None else f"{new:.2f}"
        self._line(f"{when}  perplexity {change}", "bold")

    def _planned(self, event: Event) -> None:
        self._progress.planned(event)
        if not self._live:
            self._line(event_text(event) or "")
            return
        self._console.print(Text(plan_title(event)))
        self._console.print(_plan_table(plan_rows(event)))

    def _step(self, event: Event) -> None:
        starts_round = event["round"] != self._progress.round
        self._progress.step(event)
        if self._live:
            self._live.wait_for("clients send their adapters" if self._progress.round_done else "")
            return
        if starts_round:  # nothing to tell yet: speeds are known from the second step on
            self._line_time = event["time"]
        if event["time"] - self._line_time >= STEP_LOG_SECONDS:
            self._line_time = event["time"]
            self._line(self._progress.line())

    def _client_finished(self, event: Event) -> None:
        self._progress.finished.append(event)
        if not (self._live and self._live.is_crowd(self._progress.members)):  # whose sum comes with the round
            self._line(event_text(event) or "", "dim")

    def _round_finished(self, event: Event) -> None:
        if self._live and self._live.is_crowd(self._progress.members) and self._progress.finished:
            self._line(_sum_text(self._progress.finished), "dim")
        self._progress.round_finished()
        self._line(event_text(event) or "", "dim")

    def _finished(self, event: Event) -> None:
        self.close()
        change = f"{event['perplexity_before']:.2f} → {event['perplexity_after']:.2f}"
        self._line(f"finished  perplexity {change}", "bold green")
        if lost := lost_clients(event):
            self._line(f"only {lost}summary.json says why", "bold yellow")
        self._line(f"results in {event['folder']}")
        kinds = {name.partition("/")[0] for name in event["results"]}
        if "adapter" in kinds:
            self._line("  adapter/      the LoRA adapter; PEFT loads it")
        if "merged" in kinds:
            self._line("  merged/       the model; transformers loads it")
        self._line("  report.html   plan, ranks, memory, losses and perplexity, for a browser")
        self._line("  summary.json  the same with the settings, for programs")

    def _failed(self, event: Event) -> None:
        self.close()
        self._line(f"failed: {event['error']}", "bold red")


def _plan_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """The plan as a table of 80 columns if names are short, without a column for what no client does."""
    hidden = {_CHECKPOINTING} if all(row[_CHECKPOINTING] in ("", "none") for row in rows) else set()
    names = [*PLAN_COLUMNS[:-1], "memory"]
    table = Table(box=None, padding=(0, 2 if hidden else 1, 0, 0), pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        if i not in hidden:
            table.add_column(name, justify="right" if i in (1, 2) else "left", overflow="fold")
    for row in rows:
        style = "yellow" if any(cell.startswith("left out") for cell in row) else ""
        table.add_row(*(Text(cell) for i, cell in enumerate(row) if i not in hidden), style=style)
    return table


def _sum_text(finished: Sequence[Event]) -> str:
    """A round of many clients in one line."""

    def mean(name: str) -> float:
        return math.fsum(event[name] for event in finished) / len(finished)

    slowest = max(finished, key=lambda event: float(event["seconds"]))
    largest = max(finished, key=lambda event: int(event["measured_bytes"]))
    memory = f", memory {format_bytes(largest['measured_bytes'])} at most" if largest["measured_bytes"] else ""
    return (
        f"round {slowest['round']}, {len(finished)} clients: loss {mean('loss_first'):.3f} → {mean('loss_last'):.3f}, "
        f"client {slowest['client']} took longest, {slowest['seconds']:.1f} s{memory}"
    )


def _broken(line: str, width: int) -> str:
    """Lines broken between words only, so that a path can be copied."""
    if len(line) <= width:
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
