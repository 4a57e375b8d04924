"""The moving part of the terminal: a bar for the run and one for each client, or what is waited for."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from hsplitlora_flwr.reporting.events import client_order
from hsplitlora_flwr.reporting.progress import ClientProgress, RunProgress, clock

_LONGEST_NAME = 20


class _Bar(NamedTuple):
    """One line of the moving part."""

    text: str
    done: int
    total: int
    told: str = ""
    rate: float = 0.0
    left: float | None = None


class LiveView:
    """The part of the terminal that changes: what is going on, and bars for the run and for each client.

    If there are more clients than lines in half of the terminal, those that the round waits for have a line each, and
    the others share one.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            *(TextColumn("{task.fields[" + name + "]}", justify="right") for name in ("told", "rate", "left")),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._waiting: tuple[Spinner, str, float] | None = None
        self._live = Live(console=console, get_renderable=self._render, transient=True, refresh_per_second=8)

    def start(self) -> None:
        if not self._live.is_started:
            self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def wait_for(self, text: str) -> None:
        """Show a spinner with the seconds from now on below everything else; an empty text removes it."""
        self._waiting = (Spinner("dots"), text, time.monotonic()) if text else None

    def is_crowd(self, clients: Collection[str]) -> bool:
        """Whether there are too many of them for a line each."""
        return len(clients) > self._room

    @property
    def _room(self) -> int:
        return max(self._console.height // 2 - 2, 3)

    def show(self, progress: RunProgress) -> None:
        """Update the bars from ``progress``."""
        if not progress.rounds:
            return
        text = f"round {progress.round} of {progress.rounds}"
        bars = {"": _Bar(text, progress.done, progress.total, "", progress.rate, progress.left)}
        if progress.clients:
            bars |= self._of_clients(progress)
        if list(bars) != list(self._tasks):
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks = {key: self._bars.add_task("", told="", rate="", left="") for key in bars}
        for key, bar in bars.items():
            self._bars.update(
                self._tasks[key],
                description=bar.text,
                completed=bar.done,
                total=bar.total,
                told=bar.told,
                rate=f"{bar.rate:.0f} tokens/s" if bar.rate else "",
                left="done" if bar.done == bar.total else f"{clock(bar.left)} left",
            )

    def _of_clients(self, progress: RunProgress) -> dict[str, _Bar]:
        known = progress.clients
        names = sorted({*progress.members, *known}, key=client_order)
        steps = max(client.steps for client in known.values())
        shown = names
        if self.is_crowd(names):
            first = sorted(names, key=lambda name: _urgency(known.get(name)))
            shown = sorted(first[: self._room - 1], key=client_order)
        bars = {name: _bar_of(name, known.get(name), steps) for name in shown}
        if others := set(names) - set(shown):
            bars["\n"] = _bar_of_others(others, known, steps)  # which is nobody's name
        return bars

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars] if self._tasks else []
        if self._waiting:
            spinner, text, since = self._waiting
            spinner.update(text=Text(f"{text}  {clock(time.monotonic() - since)}", style="dim"))
            parts.append(spinner)
        return Group(*parts)


def _urgency(client: ClientProgress | None) -> tuple[int, float]:
    """Sort key of clients: those that train, by the time left; then those that wait; then those that are done."""
    if client is None:
        return 1, 0.0
    return (2, 0.0) if client.step == client.steps else (0, -(client.left or float("inf")))


def _bar_of(name: str, client: ClientProgress | None, steps: int) -> _Bar:
    text = f"client {name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + '…'}"
    if client is None:  # on a small machine clients take turns
        return _Bar(text, 0, steps, "waiting")
    return _Bar(text, client.step, client.steps, f"loss {client.loss:.3f}", client.rate, client.left)


def _bar_of_others(names: Collection[str], known: Mapping[str, ClientProgress], steps: int) -> _Bar:
    there = [known[name] for name in names if name in known]
    told = f"loss {sum(client.loss for client in there) / len(there):.3f}" if there else "waiting"
    left = [client.left for client in there if client.left is not None]
    made = sum(client.step for client in there)
    text = f"{len(names)} others"
    return _Bar(text, made, steps * len(names), told, sum(client.rate for client in there), max(left, default=None))
