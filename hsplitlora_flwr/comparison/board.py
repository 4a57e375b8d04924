"""The runs of a comparison that are under way, on the terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.text import Text

from hsplitlora_flwr.reporting import event_text
from hsplitlora_flwr.reporting.events import Event


class Board:
    """Shows what goes on, a line for each run, while it is open."""

    def __init__(self, console: Console) -> None:
        self._status, self._lock = console.status(""), threading.Lock()
        self._lines: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    @contextmanager
    def line(self, name: str) -> Iterator[Callable[[str], None]]:
        """A line, and what writes to it."""
        self._show(name, name)
        try:
            yield lambda said: self._show(name, f"{name}: {said}")
        finally:
            self._show(name, "")

    def _show(self, name: str, text: str) -> None:
        with self._lock:
            self._lines[name] = text
            self._status.update(Text("\n".join(filter(None, self._lines.values()))))


class Line:
    """Shows the last thing that happened in a run, and remembers why it failed."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.cause = ""

    def handle(self, event: Event) -> None:
        if event["kind"] == "failed":
            self.cause = str(event["error"])
        elif text := event_text(event):
            self._show(text.splitlines()[0])
