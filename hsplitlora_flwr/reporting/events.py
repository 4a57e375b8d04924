"""The event log of a run: one JSON object a line, appended to ``events.jsonl`` in the run folder.

The server writes it, everybody else reads it: the launcher's console follows the file while it grows, a report reads
it afterwards, and a :class:`Listener` in the server's process hears every event as it is written. Kinds and fields may
be added to: pass over what you do not know. Every event has a ``kind`` and a ``time`` (unix seconds) beside its own
fields:

- ``phase``: text; what goes on from now until another event says what came of it
- ``status``: text; a fact
- ``evaluated``: round (0 = before training), perplexity, tokens, seconds
- ``planned``: round, reason ("" for the first plan), clients (a list of: client, examples, budget_bytes, split, blocks,
  cut_transform ("" for none), ranks (mean, min, max), predicted_bytes, left_out ("" or the reason))
- ``step``: round, rounds, client, step (from 1), steps, loss, tokens (label tokens), all_tokens (non-padding tokens)
- ``client_finished``: round, client, seconds, loss_first, loss_last (means of the first and of the last quarter of its
  steps), measured_bytes, predicted_bytes
- ``client_failed``: round, client, error
- ``round_finished``: round, seconds, update_norm
- ``finished``: folder, results (files relative to it), perplexity_before, perplexity_after, and where clients train
  clients and known_clients: how many took part in the last round, and how many there are
- ``failed``: error
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

EVENTS_FILE = "events.jsonl"
PLAN_COLUMNS = ("client", "examples", "budget", "split", "ranks", "checkpointing", "predicted")
STEP_LOG_SECONDS = 5.0

Event = Mapping[str, Any]

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Anything that is told what happens in a run, such as a console or a tracker of experiments."""

    def handle(self, event: Event) -> None:
        """Take one event. The last one is ``finished`` or ``failed``, unless the process is killed.

        Events come one at a time, in the order of the log. They come from the threads that train, which wait: what
        takes long belongs into a thread of one's own.
        """


class EventLog:
    """Appends events to the log of a run folder, and says them to the ``flwr`` logger as readable lines.

    That logger is what ``flwr run --stream`` shows. Threads may share one log.

    Parameters
    ----------
    folder : Path
        The run folder; made if absent.
    listeners : Sequence[Listener]
        Hear every event once it is on disk. One that raises hears no more, and the run goes on.
    """

    def __init__(self, folder: Path, listeners: Sequence[Listener] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / EVENTS_FILE
        self._lock = threading.RLock()  # a listener may say something itself
        self._listeners = list(listeners)
        self._logger = logging.getLogger("flwr")
        self._step_logged = float("-inf")

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event and say it; it is on disk for readers when this returns.

        Raises
        ------
        TypeError
            If a field is not plain JSON: a tensor or a path in an event is a mistake of the caller.
        """
        event = self.append(kind, **fields)
        with self._lock:
            if kind == "step":  # many a second: a log wants to know that it goes on, not every step
                if time.monotonic() - self._step_logged < STEP_LOG_SECONDS:
                    return
                self._step_logged = time.monotonic()
        for text in (event_text(event) or "").splitlines():
            self._logger.log(_LEVELS.get(kind, logging.INFO), "%s", text)

    def append(self, kind: str, **fields: Any) -> Event:
        """Append one event without a word to the logger; returns it. Raises as :meth:`emit`."""
        event = {"kind": kind, "time": time.time(), **fields}
        line = json.dumps(event) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            self._tell(line)
        return event

    def _tell(self, line: str) -> None:
        for listener in list(self._listeners):
            try:
                listener.handle(json.loads(line))
            except Exception:
                log.warning("a listener failed and hears no more of the run: %r", listener, exc_info=True)
                self._listeners.remove(listener)


_LEVELS = {"failed": logging.ERROR, "client_failed": logging.WARNING}


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the events that were appended since ``offset``.

    Parameters
    ----------
    path : Path
        The log; one that does not exist yet has no events.
    offset : int
        Where the last call ended, in bytes; 0 reads from the start.

    Returns
    -------
    tuple[list[dict[str, Any]], int]
        The events, and the offset for the next call. A last line without its end is left for that call. A line that
        is no JSON object, left behind by a writer that was killed, is passed over.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    events = [event for line in whole.splitlines() if (event := _parse(line)) is not None]
    return events, offset + len(whole)


def event_text(event: Event) -> str | None:
    """An event as plain text, a plan as an aligned table; None for a kind that this version does not know."""
    round_ = f"round {event.get('round')}"
    match event["kind"]:
        case "phase" | "status":
            return str(event["text"])
        case "evaluated":
            when = round_ if event["round"] else "before training"
            measured = f"({event['tokens']} tokens in {event['seconds']:.1f} s)"
            return f"{when}: perplexity {event['perplexity']:.2f} {measured}"
        case "planned":
            return f"{plan_title(event)}\n{_align([PLAN_COLUMNS, *plan_rows(event)])}"
        case "step":
            place = f"{round_} of {event['rounds']}, client {event['client']}"
            return f"{place}: step {event['step']} of {event['steps']}, loss {event['loss']:.3f}"
        case "client_finished":
            losses = f"loss {event['loss_first']:.3f} → {event['loss_last']:.3f}"
            return f"{round_}, client {event['client']}: {losses} in {event['seconds']:.1f} s{_memory(event)}"
        case "client_failed":
            return f"{round_}, client {event['client']} failed: {event['error']}"
        case "round_finished":
            return f"{round_} finished in {event['seconds']:.1f} s, update norm {event['update_norm']:.4g}"
        case "finished":
            change = f"{event['perplexity_before']:.2f} → {event['perplexity_after']:.2f}"
            return f"finished: perplexity {change}, {lost_clients(event)}results in {event['folder']}"
        case "failed":
            return f"failed: {event['error']}"
    return None


def lost_clients(event: Event) -> str:
    """How many clients took part in the last round of a finished run; "" if all did."""
    took_part, known = event.get("clients", 0), event.get("known_clients", 0)
    return f"{took_part} of {known} clients in the last round, " if took_part < known else ""


def plan_title(event: Event) -> str:
    """The title of a plan: its round, and why it replaced the plan before."""
    return f"plan of round {event['round']}" + (f": {event['reason']}" if event["reason"] else "")


def plan_rows(event: Event) -> list[tuple[str, ...]]:
    """The cells of a ``planned`` event under ``PLAN_COLUMNS``, a row a client, by name.

    A client that is left out has the reason where its split would stand, and nothing after it.
    """
    rows: list[tuple[str, ...]] = []
    for client in sorted(event["clients"], key=lambda client: client_order(client["client"])):
        row = (str(client["client"]), str(client["examples"]), format_bytes(client["budget_bytes"]))
        if client["left_out"]:
            rows.append((*row, f"left out: {client['left_out']}", "", "", ""))
            continue
        which = "block 0" if client["split"] == 1 else f"blocks 0-{client['split'] - 1}"
        split = f"{which} of {client['blocks']}" if client["split"] < client["blocks"] else "whole model"
        if not client.get("trains", True):
            split += ", forward alone"
        if client.get("cut_transform"):
            split += f", {client['cut_transform']}"
        ranks = client["ranks"]
        spread = str(ranks["min"]) if ranks["min"] == ranks["max"] else f"{ranks['min']}-{ranks['max']}"
        mean = f" (mean {ranks['mean']:.1f})"
        rows.append((*row, split, spread + mean, client["checkpointing"], format_bytes(client["predicted_bytes"])))
    return rows


def client_order(name: str) -> tuple[int, str]:
    """Sorts clients as people count them: 2 before 10."""
    return len(name), name


def quarter(steps: int) -> int:
    """The number of steps that a shown loss is a mean of, since single batches differ more than a round changes."""
    return max(math.ceil(steps / 4), 1)


def format_bytes(count: float) -> str:
    """Bytes as GB (1e9 bytes, as budgets are given) or, below a tenth of it, as MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _memory(event: Event) -> str:
    if not event["measured_bytes"]:
        return ""
    predicted = f" (predicted {format_bytes(event['predicted_bytes'])})" if event["predicted_bytes"] else ""
    return f", {format_bytes(event['measured_bytes'])}{predicted}"


def _align(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    # The reason for leaving a client out is free text: it does not widen the column that it starts in.
    sized = [["" if cell.startswith("left out") else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*sized, strict=True)]
    aligned = [
        [cell.rjust(widths[i]) if i in (1, 2) else cell.ljust(widths[i]) for i, cell in enumerate(row)] for row in rows
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
