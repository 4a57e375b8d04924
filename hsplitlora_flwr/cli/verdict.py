"""Whether a run that is over did finish and, if not, why: from its folder, its logs and Flower's status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsplitlora_flwr.cli.superlink import RunStatus
from hsplitlora_flwr.reporting import EVENTS_FILE

FLOWER_LOG = "flwr.log"
SUPERLINK_LOG = "superlink.log"
_LINES, _WIDEST = 6, 400  # of an exception's text
NOT_STARTED = RunStatus("not started", "")


def failure_cause(folder: Path, status: RunStatus, final: Mapping[str, Any] | None) -> str:
    """Why a run that is over counts as failed; "" if it does not."""
    if final and final["kind"] == "failed":
        return str(final["error"])
    if status == NOT_STARTED:
        return f"'flwr run' could not start the run\n{last_words(folder / FLOWER_LOG)}"
    if status.text == "finished:stopped":
        return "the run was stopped at its SuperLink, as by 'flwr stop'"
    if "heartbeat" in status.details:
        return "the process of the run ended without a word; most often the system killed it for lack of memory"
    if status.text != "finished:completed":
        return f"Flower says {status.text}\n{last_words(folder / FLOWER_LOG)}"
    return missing_results(folder, final, folder / FLOWER_LOG)


def missing_results(folder: Path, final: Mapping[str, Any] | None, log: Path) -> str:
    """The results that a run which ended without an error did not write; "" if everything is there."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{last_words(log)}\nno readable summary.json: {error}"
    if summary["status"] != "finished":
        return f"{last_words(log)}\nsummary.json says {summary['status']!r}"
    if not final:
        return f"the run ended with no 'finished' event in {EVENTS_FILE}"
    missing = [name for name in summary["results"] if not (folder / name).is_file()]
    return f"the run finished without writing {', '.join(missing)}" if missing else ""


def last_words(log: Path) -> str:
    """The first cause of the last failure in a log of Flower, in a few lines; the last lines if it has no traceback."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip("│╭╮╰╯─").rstrip() for line in text.splitlines()]  # `flwr` frames its own errors
    lines = [line for line in lines if line.strip(" ^~")]
    starts = [i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if not starts:
        return "\n".join(line[:_WIDEST] for line in lines[-10:])
    # Python tells an exception that led to another one first, with a sentence between them.
    while len(starts) > 1 and re.match("(The above|During handling of the above) exception", lines[starts[-1] - 1]):
        lines = lines[: starts.pop() - 1]
    block = lines[starts[-1] + 1 :]
    # Frames are indented, the exception is not, and the next record of the log ends its text.
    first = next((i for i, line in enumerate(block) if not line.startswith(" ")), 0)
    after = (
        i for i, line in enumerate(block) if i > first and re.match(r"(DEBUG|INFO|WARNING|ERROR) *:|\(\w+ pid=", line)
    )
    end = next(after, len(block))
    told = [line[:_WIDEST] for line in block[max(0, first - 2) : min(end, first + _LINES)]]
    return "\n".join([*told, *(["..."] if end > first + _LINES else [])])
