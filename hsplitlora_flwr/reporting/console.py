"""A run on the terminal: what is going on, the plan, progress with time left, perplexity, and where the results are.

In a terminal the bars of the current round stay at the bottom and everything final scrolls above them. Elsewhere
(a file, a CI log) the same facts come as plain lines, progress about every five seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from hsplitlora_flwr.reporting.events import (
    PLAN_COLUMNS,
    STEP_LOG_SECONDS,
    Event,
    client_order,
    event_text,
    lost_clients,
    plan_rows,
    plan_title,
)


class RunConsole:
    """Shows a run from its events.

    Use it as a context manager, so that the terminal is given back whatever happens.

    Parameters
    ----------
    console : Console or None
        Where to write; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = _LiveView(self._console) if self._console.is_interactive else None
        self._progress = _RunProgress()
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
            self._live.wait_for({"status": event.get("text", ""), "step": ""}.get(event["kind"], "working"))
        match event["kind"]:
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
                self._line(event_text(event) or "", "dim")
            case "round_finished":
                self._progress.round_finished()
                self._line(event_text(event) or "", "dim")
        if self._live:
            self._live.show(self._progress)

    def close(self) -> None:
        """Take the bars away; what was printed stays."""
        if self._live:
            self._live.stop()

    def _line(self, text: str, style: str = "") -> None:
        # soft_wrap: a line in a file must not be broken at the 80 columns that rich assumes there
        self._console.print(Text(text, style=style), soft_wrap=True)

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
        table = Table(title=plan_title(event), title_justify="left", header_style="bold")
        for i, name in enumerate(PLAN_COLUMNS):
            table.add_column(name, justify="right" if i in (1, 2) else "left", overflow="fold")
        for row in plan_rows(event):
            table.add_row(*(Text(cell, style="yellow" if cell.startswith("left out") else "") for cell in row))
        self._console.print(table)

    def _step(self, event: Event) -> None:
        starts_round = event["round"] != self._progress.round
        self._progress.step(event)
        if self._live:
            return
        if starts_round:  # nothing to tell yet: speeds are known from the second step on
            self._line_time = event["time"]
        if event["time"] - self._line_time >= STEP_LOG_SECONDS:
            self._line_time = event["time"]
            self._line(self._progress.line())

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


@dataclass
class _Client:
    """One client's progress in the current round."""

    first_time: float
    first_step: int
    step: int
    steps: int
    loss: float
    last_time: float
    tokens: int = 0  # of the steps after the first seen one: its own duration is unknown

    @property
    def rate(self) -> float:
        """Tokens a second; 0 while unknown."""
        elapsed = self.last_time - self.first_time
        return self.tokens / elapsed if elapsed > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds to the end of its round; None while unknown."""
        return _remaining(self.last_time - self.first_time, self.step - self.first_step, self.steps - self.step)


class _RunProgress:
    """How far the run is, worked out from events alone, so that a replayed log shows what a live one did."""

    def __init__(self) -> None:
        self.clients: dict[str, _Client] = {}
        self.round, self.rounds = 0, 0
        self.members: list[str] = []
        self._done_before = 0  # steps of the rounds before this one
        self._first: tuple[float, int] | None = None
        self._last_time = 0.0
        self._round_time, self._round_tokens = 0.0, 0  # since the first step of this round

    def planned(self, event: Event) -> None:
        names = [client["client"] for client in event["clients"] if not client["left_out"]]
        self.members = sorted(names, key=client_order)

    def step(self, event: Event) -> None:
        if event["round"] != self.round and self.clients:
            self.round_finished()
        self.round, self.rounds, self._last_time = event["round"], event["rounds"], event["time"]
        if self.clients:
            self._round_tokens += event["all_tokens"]
        else:
            self._round_time, self._round_tokens = event["time"], 0
        client = self.clients.get(event["client"])
        if client is None:
            now, step = event["time"], event["step"]
            client = _Client(now, step, step, event["steps"], event["loss"], now)
            self.clients[event["client"]] = client
        else:
            client.tokens += event["all_tokens"]
        client.step, client.loss, client.last_time = event["step"], event["loss"], event["time"]
        self._first = self._first or (event["time"], self.done)

    def client_failed(self, event: Event) -> None:
        """A failed client's steps count as done: nobody will make them."""
        if client := self.clients.get(event["client"]):
            client.step = client.steps

    def round_finished(self) -> None:
        self._done_before += self._round_total
        self.clients.clear()

    @property
    def done(self) -> int:
        """Steps of all clients made so far."""
        return self._done_before + sum(client.step for client in self.clients.values())

    @property
    def total(self) -> int:
        """Steps of all clients in the whole run."""
        return self._done_before + self._round_total * (self.rounds - self.round + bool(self.clients))

    @property
    def left(self) -> float | None:
        """Seconds to the end of the run; None while unknown."""
        if self._first is None:
            return None
        since, done = self._first
        return _remaining(self._last_time - since, self.done - done, self.total - self.done)

    @property
    def rate(self) -> float:
        """Tokens a second of all clients together in this round; 0 while unknown."""
        elapsed = self._last_time - self._round_time
        return self._round_tokens / elapsed if elapsed > 0 else 0.0

    def line(self) -> str:
        """Progress of the round and of the run in one line."""
        clients = self.clients.values()
        made, wanted = sum(client.step for client in clients), self._round_total
        loss = sum(client.loss for client in clients) / len(clients)
        return (
            f"round {self.round}/{self.rounds}  steps {made}/{wanted}  loss {loss:.3f} (mean of {len(clients)} clients)"
            f"  {self.rate:.0f} tokens/s  {_clock(self.left)} left"
        )

    @property
    def _round_total(self) -> int:
        steps = max((client.steps for client in self.clients.values()), default=0)
        return steps * max(len(self.members), len(self.clients))


class _LiveView:
    """The part of the terminal that changes: what is being waited for, a bar for the run, a bar a client."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            *(TextColumn("{task.fields[" + name + "]}", justify="right") for name in ("loss", "rate", "left")),
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
        """Show a spinner and the seconds since now under everything; empty text takes it away."""
        self._waiting = (Spinner("dots"), text, time.monotonic()) if text else None

    def show(self, progress: _RunProgress) -> None:
        """Bring the bars to where ``progress`` is."""
        if not progress.rounds:
            return
        text = f"round {progress.round} of {progress.rounds}"
        self._bar("", text, progress.done, progress.total, "", progress.rate, progress.left)
        names = sorted({*progress.members, *progress.clients}, key=client_order) if progress.clients else []
        steps = max((client.steps for client in progress.clients.values()), default=0)
        for name in names:
            if client := progress.clients.get(name):
                loss = f"loss {client.loss:.3f}"
                self._bar(name, f"client {name}", client.step, client.steps, loss, client.rate, client.left)
            else:  # on a small machine clients take turns
                self._bar(name, f"client {name}", 0, steps, "waiting", 0.0, None)
        for name in set(self._tasks) - {"", *names}:
            self._bars.remove_task(self._tasks.pop(name))

    def _bar(self, key: str, text: str, done: int, total: int, loss: str, rate: float, left: float | None) -> None:
        fields: dict[str, Any] = {
            "loss": loss,
            "rate": f"{rate:.0f} tokens/s" if rate else "",
            "left": "done" if done == total else f"{_clock(left)} left",
        }
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, **fields)
        self._bars.update(self._tasks[key], description=text, completed=done, total=total, **fields)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars] if self._tasks else []
        if self._waiting:
            spinner, text, since = self._waiting
            spinner.update(text=Text(f"{text}  {_clock(time.monotonic() - since)}", style="dim"))
            parts.append(spinner)
        return Group(*parts)


def _remaining(elapsed: float, made: int, missing: int) -> float | None:
    return elapsed / made * missing if made > 0 else None


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
