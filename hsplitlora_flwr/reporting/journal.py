"""What a run's rounds leave while it goes on, a line each.

A summary that is written anew after every round costs more with every round. So its tables grow here, line by line, and
go into the summary when the run has ended::

    {"table": "rounds", "row": {"round": 1, ...}}
    {"table": "rounds", "row": {"round": 1, "perplexity": 9.1, ...}, "again": true}     in place of the one before
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

JOURNAL_FILE = "rounds.jsonl"

Row = dict[str, Any]


class Journal:
    """The tables of a run folder that are not in its summary yet.

    Parameters
    ----------
    folder : Path
        The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return self._path.exists()

    def add(self, table: str, row: Mapping[str, Any], *, again: bool = False) -> None:
        """Append a row to a table, or say the last one ``again``, as it is now.

        Raises
        ------
        TypeError
            If the row is not plain JSON.
        """
        line = json.dumps({"table": table, "row": row} | ({"again": True} if again else {}))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def rows(self, table: str, parse: Callable[[str], Any] = json.loads) -> Iterator[Row]:
        """The rows of a table, of which no more than two are in memory; ``parse`` reads a line.

        A last line that a writer which was killed left behind is passed over.
        """
        latest: Row | None = None
        with self._path.open(encoding="utf-8") as file:
            for line in file:
                if not (line.endswith("\n") and line.startswith(f'{{"table": "{table}"')):
                    continue
                entry = parse(line)
                if latest is not None and not entry.get("again"):
                    yield latest
                latest = entry["row"]
        if latest is not None:
            yield latest

    def forget(self) -> None:
        """Remove the file: a summary has the tables."""
        self._path.unlink(missing_ok=True)
