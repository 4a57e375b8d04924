"""``summary.json``: what a run was and what came out of it, complete after every round."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"
ROWS_FILE = "held_out.json"
STOPPED = "the process of the run was stopped; Flower's log says why"
"""The error of a run that learned no more than that."""
_RENAMED = {"recompute": "checkpointing"}
"""Fields by the names that they had."""
_PACKAGES = ("hsplitlora-flwr", "flwr", "torch", "transformers", "peft", "ray")


class Summary:
    """The summary of a run folder, rewritten in one piece whenever it is saved.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        The settings as dotted keys.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._path = folder / SUMMARY_FILE
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
            if name in earlier:
                self.content[name] = [row for row in earlier[name] if row["round"] <= server_round]
        kept = {name: earlier[name] for name in ("perplexity_before", "importance", "texts") if name in earlier}
        if 0 < (earlier.get("best") or {}).get("round", 0) <= server_round:
            kept["best"] = earlier["best"]
        self.save(**kept, resumed={"run": str(run_folder), "after_round": server_round})

    def save(self, **changes: Any) -> None:
        """Take over ``changes`` and write the file; a reader sees the old content or the new, never a half."""
        self.content.update(changes, seconds=time.time() - self.content["started"])
        _write(self._path, self.content)


def read_summary(folder: Path) -> Any:
    """What the summary of a run folder says, by the names that its fields have now; anything if it is damaged.

    Raises
    ------
    OSError, ValueError
        If there is none, or it is no JSON.
    """
    text = (folder / SUMMARY_FILE).read_text(encoding="utf-8")
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
        _write(path, content)
    except OSError:
        _overwrite_status(path)
        raise
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


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
