"""A run on the terminal: what is going on, the plan, progress with time left, perplexity, and where the results are.

In a terminal the bars of the current round, or what is going on meanwhile, stay at the bottom, and everything final
scrolls above them. Elsewhere (a file, a CI log) the same facts come as plain lines, progress about every five seconds.
Losses are means over a quarter of a client's round: those of single batches say more about the batch.
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

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
    format_bytes,
    lost_clients,
    plan_rows,
    plan_title,
    quarter,
)

_CHECKPOINTING = PLAN_COLUMNS.index("checkpointing")
_LONGEST_NAME = 20


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


@dataclass
class _Client:
    """One client's progress in the current round."""

    first_time: float
    first_step: int
    step: int
    steps: int
    last_time: float
    losses: list[float] = field(default_factory=list)
    tokens: int = 0  # of the steps after the first seen one: its own duration is unknown

    @property
    def loss(self) -> float:
        """Mean of its last steps, as many as a quarter of the round has."""
        last = self.losses[-quarter(self.steps) :]
        return sum(last) / len(last)

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
        self.finished: list[Event] = []
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
            client = _Client(now, step, step, event["steps"], now)
            self.clients[event["client"]] = client
        else:
            client.tokens += event["all_tokens"]
        client.step, client.last_time = event["step"], event["time"]
        client.losses.append(event["loss"])
        self._first = self._first or (event["time"], self.done)

    def client_failed(self, event: Event) -> None:
        """A failed client's steps count as done: nobody will make them."""
        if client := self.clients.get(event["client"]):
            client.step = client.steps

    def round_finished(self) -> None:
        self._done_before += self._round_total
        self.clients.clear()
        self.finished.clear()

    @property
    def round_done(self) -> bool:
        """All clients of the round have made all steps."""
        return self._round_total == sum(client.step for client in self.clients.values())

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


class _Bar(NamedTuple):
    """What stands in a line of the terminal that moves."""

    text: str
    done: int
    total: int
    told: str = ""
    rate: float = 0.0
    left: float | None = None


class _LiveView:
    """The part of the terminal that changes: what is going on, or a bar for the run and a bar a client.

    Of more clients than half of the terminal holds there are those that the round waits for, and the sum of the others.
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
        """Show a spinner and the seconds since now under everything; empty text takes it away."""
        self._waiting = (Spinner("dots"), text, time.monotonic()) if text else None

    def is_crowd(self, clients: Collection[str]) -> bool:
        """Whether there are too many of them for a line each."""
        return len(clients) > self._room

    @property
    def _room(self) -> int:
        return max(self._console.height // 2 - 2, 3)

    def show(self, progress: _RunProgress) -> None:
        """Bring the bars to where ``progress`` is."""
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
                left="done" if bar.done == bar.total else f"{_clock(bar.left)} left",
            )

    def _of_clients(self, progress: _RunProgress) -> dict[str, _Bar]:
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
            spinner.update(text=Text(f"{text}  {_clock(time.monotonic() - since)}", style="dim"))
            parts.append(spinner)
        return Group(*parts)


def _urgency(client: _Client | None) -> tuple[int, float]:
    """Sorts those first that a round waits for: who trains, by the time left; then who waits; then who is done."""
    if client is None:
        return 1, 0.0
    return (2, 0.0) if client.step == client.steps else (0, -(client.left or float("inf")))


def _bar_of(name: str, client: _Client | None, steps: int) -> _Bar:
    text = f"client {name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + '…'}"
    if client is None:  # on a small machine clients take turns
        return _Bar(text, 0, steps, "waiting")
    return _Bar(text, client.step, client.steps, f"loss {client.loss:.3f}", client.rate, client.left)


def _bar_of_others(names: Collection[str], known: Mapping[str, _Client], steps: int) -> _Bar:
    there = [known[name] for name in names if name in known]
    told = f"loss {sum(client.loss for client in there) / len(there):.3f}" if there else "waiting"
    left = [client.left for client in there if client.left is not None]
    made = sum(client.step for client in there)
    text = f"{len(names)} others"
    return _Bar(text, made, steps * len(names), told, sum(client.rate for client in there), max(left, default=None))


def _plan_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """In 80 columns, as long as names are short; what no client does has no column."""
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
    """A round of many clients in a line."""

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
    """Broken between words, and within none, so that a path can be copied."""
    if len(line) <= width:
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def _remaining(elapsed: float, made: int, missing: int) -> float | None:
    return elapsed / made * missing if made > 0 else None


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
