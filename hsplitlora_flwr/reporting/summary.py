"""``summary.json``: what a run was and what came out of it.

While the run goes on its tables, which grow with every round, stand in a file beside it, which ``journal`` names
(:mod:`hsplitlora_flwr.reporting.journal`); :func:`read_summary` puts both together. Once it has ended all is in here.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hsplitlora_flwr.reporting.journal import JOURNAL_FILE, Journal

SUMMARY_FILE = "summary.json"
ROWS_FILE = "held_out.json"
STOPPED = "the process of the run was stopped; Flower's log says why"
"""The error of a run that learned no more than that."""
TABLES = ("rounds", "plans", "importance_drift", "failures")
"""Fields that grow with the run."""
_RENAMED = {"recompute": "checkpointing"}
"""Fields by the names that they had."""
_PACKAGES = ("hsplitlora-flwr", "flwr", "torch", "transformers", "peft", "ray")


class Summary:
    """The summary of a run folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        The settings as dotted keys.

    Attributes
    ----------
    content : dict
        What it says. Of plans before the last the clients are in the file alone: they are most of it where every round
        has other clients, and nobody asks for them before the run has ended.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder, self._journal = folder, Journal(folder)
        self._journal.forget()
        self.content: dict[str, Any] = {
            "status": "running",
            "started": time.time(),
            "config": config,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "perplexity_before": None,
            "perplexity_after": None,
            "rounds": [],
        }

    def resume(self, run_folder: Path, server_round: int) -> None:
        """Take over what the summary of another run says of its rounds up to ``server_round``.

        Raises
        ------
        OSError, ValueError
            If there is none that can be read.
        """
        earlier = read_summary(run_folder)
        for name in ("rounds", "plans", "importance_drift"):
            for row in earlier.get(name, ()):
                if row["round"] <= server_round:
                    self.add(name, row)
        kept = {name: earlier[name] for name in ("perplexity_before", "importance", "texts") if name in earlier}
        if 0 < (earlier.get("best") or {}).get("round", 0) <= server_round:
            kept["best"] = earlier["best"]
        self.save(**kept, resumed={"run": str(run_folder), "after_round": server_round})

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Append a row to one of the tables; it is on disk when this returns."""
        self._journal.add(table, row)
        rows = self.content.setdefault(table, [])
        if table == "plans" and rows:
            rows[-1] = {**rows[-1], "clients": []}
        rows.append(row)

    def amend(self, table: str, **changes: Any) -> None:
        """Take over changes of a table's last row."""
        row = self.content[table][-1]
        row |= changes
        self._journal.add(table, row, again=True)

    def save(self, **changes: Any) -> None:
        """Take over ``changes`` and write the file, all of it once the run has ended.

        A reader sees the old content or the new, never a half.
        """
        self.content.update(changes, seconds=time.time() - self.content["started"])
        head = {name: value for name, value in self.content.items() if name not in TABLES}
        if head["status"] == "running":
            _write(self._folder / SUMMARY_FILE, head | {"journal": JOURNAL_FILE})
        else:
            _write_whole(self._folder, head)


def read_summary(folder: Path) -> Any:
    """What the summary of a run folder says, by the names that its fields have now; anything if it is damaged.

    Raises
    ------
    OSError, ValueError
        If there is none, or it is no JSON.
    """
    content = _parse((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.pop("journal", None):
        try:
            content |= {"rounds": []} | {name: rows for name in TABLES if (rows := list(_rows(folder, name)))}
        except FileNotFoundError:  # the run has ended meanwhile
            content = _parse((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    return content


def _parse(text: str) -> Any:
    return json.loads(text, object_hook=lambda fields: {_RENAMED.get(name, name): fields[name] for name in fields})


def write_rows(folder: Path, server_round: int, rows: Sequence[tuple[float, int]]) -> None:
    """Replace what the run folder holds of the held-out rows: nats and labelled tokens of each."""
    nll, tokens = ([row[place] for row in rows] for place in (0, 1))
    _write(folder / ROWS_FILE, {"round": server_round, "nll": nll, "tokens": tokens})


def end_as_failed(folder: Path, error: str) -> dict[str, Any] | None:
    """Let the summary of a run that has ended say so, where it still says that the run goes on.

    Parameters
    ----------
    folder : Path
        The run folder.
    error : str
        Why the run ended.

    Returns
    -------
    dict or None
        What the summary says now; None if there is none that can be read, or it told already why the run ended.

    Raises
    ------
    OSError
        If it cannot be written; even then it says ``failed`` where the file itself can be changed.
    """
    path = folder / SUMMARY_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["status"] != "running" and content.get("error") != STOPPED:
            return None
        content |= {"status": "failed", "error": error, "seconds": time.time() - content["started"]}
    except (OSError, ValueError, TypeError, LookupError):
        return None
    try:
        _write_whole(folder, content)
    except OSError:
        _overwrite_status(path)
        raise
    ended: dict[str, Any] = read_summary(folder)
    return ended


def _write(path: Path, content: Mapping[str, Any], tables: Mapping[str, Iterable[Any]] | None = None) -> None:
    """Write ``content`` and, after it, tables whose rows come one by one and take a line each."""
    draft = path.with_suffix(".json.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2).removesuffix("\n}"))
        for name, rows in (tables or {}).items():
            file.write(f',\n  "{name}": [')
            for number, row in enumerate(rows):
                file.write(f"{',' if number else ''}\n    {json.dumps(row)}")
            file.write("\n  ]")
        file.write("\n}\n")
    draft.replace(path)


def _write_whole(folder: Path, head: Mapping[str, Any]) -> None:
    """Write the summary of a run that has ended, with the tables from where they are now; the journal is gone then."""
    names = [name for name in TABLES if name == "rounds" or next(iter(_rows(folder, name)), None)]
    content = {name: value for name, value in head.items() if name not in (*TABLES, "journal")}
    _write(folder / SUMMARY_FILE, content, {name: _rows(folder, name) for name in names})
    Journal(folder).forget()


def _rows(folder: Path, table: str) -> Iterable[Any]:
    """The rows of a table, from the journal if there is one, else from the summary as it stands."""
    journal = Journal(folder)
    if journal.exists:
        return journal.rows(table, _parse)
    rows: Iterable[Any] = _parse((folder / SUMMARY_FILE).read_text(encoding="utf-8")).get(table, ())
    return rows


def _overwrite_status(path: Path) -> None:
    """Change the status in place, by as many bytes as it has: that needs no room on a full disk."""
    running, failed = b'"status": "running"', b'"status": "failed" '
    with path.open("r+b") as file:
        place = file.read().find(running)
        if place >= 0:
            file.seek(place)
            file.write(failed)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
