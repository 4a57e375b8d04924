"""Where commands print."""

from __future__ import annotations

from rich.console import Console


def table_console() -> Console:
    """Standard output, for tables; in a file they are as wide as they need to be."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
