"""Runs as points: what they differ in, what came out, and which of them no other one beats.

A :class:`Point` is a run folder in any state. What runs of a sweep differ in are its **axes**: of runs that a sweep
started, what was typed for each; of any others, the settings that are not the same in all. What came out are the
:data:`FIGURES`. A point is on the **Pareto front** of perplexity and a cost where no other has a lower perplexity for
no more of it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsplitlora_flwr.comparison.results import measurements
from hsplitlora_flwr.reporting.page import PAGE_FILE
from hsplitlora_flwr.reporting.summary import read_summary

JOB_FILE = "job.json"
"""In the folder of a job of a sweep: what was typed for it, its settings, and why it failed before it began."""
ADAPTER_WEIGHTS = Path("adapter", "adapter_model.safetensors")
QUALITY = "perplexity"
_NO_AXES = ("run.dir", "run.resume", "clients.process_mb", "plan.server_process_mb")


@dataclass(frozen=True)
class Figure:
    """What is measured of a run.

    Parameters
    ----------
    title : str
        With the unit that is shown.
    unit : float
        What the value is divided by to be shown.
    digits : int
        Decimals shown.
    """

    title: str
    unit: float = 1.0
    digits: int = 2

    def shown(self, value: float | None) -> str:
        """The value in its unit; "-" where there is none."""
        return "-" if value is None else f"{value / self.unit:,.{self.digits}f}"


FIGURES = {
    QUALITY: Figure("perplexity", digits=3),
    "peak_bytes": Figure("peak client memory, GB", 1e9),
    "traffic": Figure("sent by all, MB", 1e6, 1),
    "seconds": Figure("seconds", digits=0),
    "adapter_bytes": Figure("adapter, MB", 1e6, 1),
}
"""What is drawn over the axes; all but the first are costs. Perplexity is that of held-out text after the last round,
and peak memory the largest that a client took, or was planned to take where none measures its own."""
COSTS = tuple(name for name in FIGURES if name != QUALITY)


@dataclass(frozen=True)
class Point:
    """A run of several that are laid side by side.

    Parameters
    ----------
    name : str
        Of its folder.
    axes : Mapping[str, str]
        What was typed for it, or its settings, by dotted key.
    status : str
        ``finished``, ``failed``, ``running`` or ``not started``.
    figures : Mapping[str, float]
        Of :data:`FIGURES`, those that it has; empty unless it finished.
    cause : str
        Why it failed.
    page : str
        Its own page, relative to the folder of all; "" if it has none.
    measured : bool
        Whether clients measured their peak memory, so that it is not the planned one.
    """

    name: str
    axes: Mapping[str, str]
    status: str
    figures: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""
    page: str = ""
    measured: bool = True

    @classmethod
    def read(cls, folder: Path, *, typed: bool = True) -> Point | None:
        """Of a run folder; None if it is none.

        Parameters
        ----------
        typed : bool
            Take what was typed for the axes, where that is known, and not all settings.
        """
        job, summary = _read(lambda: json.loads((folder / JOB_FILE).read_text())), _read(lambda: read_summary(folder))
        if not job and not {"status", "config", "rounds"} <= summary.keys():
            return None
        settings = {key: str(value) for key, value in (summary.get("config") or job.get("settings") or {}).items()}
        axes = typed_axes(job["overrides"]) if typed and job else settings
        cause = str(summary.get("error") or "") or str(job.get("error") or "")
        status = str(summary.get("status", "failed" if cause else "not started"))
        page = f"{folder.name}/{PAGE_FILE}" if (folder / PAGE_FILE).exists() else ""
        try:
            found = measurements(summary)
        except (KeyError, ValueError, TypeError):
            return cls(folder.name, axes, status, {}, cause, page)
        return cls(folder.name, axes, status, _figures(found, folder), "", page, bool(found["peak_bytes"]))


def read_points(folder: Path) -> list[Point]:
    """The runs in a folder, in the order of their names; a name that is a number counts as one.

    Where each was started by a sweep their axes are what was typed, else their settings.
    """
    found = [each for each in sorted(folder.iterdir(), key=_order) if each.is_dir()]
    typed = all((each / JOB_FILE).exists() for each in found if Point.read(each))
    return [point for each in found if (point := Point.read(each, typed=typed))]


def axes_of(points: Sequence[Point]) -> list[str]:
    """The keys in which points differ, in the order in which they come."""
    keys = dict.fromkeys(key for point in points for key in point.axes if key not in _NO_AXES)
    return [key for key in keys if len({point.axes.get(key) for point in points}) > 1]


def typed_axes(overrides: Iterable[str]) -> dict[str, str]:
    """What was typed for a job, by key: ``+sweep=budgets`` is how, not what."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value.strip("'\"") for key, _, value in pairs if key not in ("sweep", *_NO_AXES)}


def number_of(text: str | None) -> float | None:
    """A value of an axis as a place on it: a number, or the mean of a list of numbers; None if it is neither."""
    parts = (text or "").strip("[]()").split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    mean = sum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


def pareto_front(points: Sequence[Point], cost: str) -> list[Point]:
    """The points that no other one beats, from the cheapest to the best: of those with the same perplexity and cost
    all.

    Parameters
    ----------
    cost : str
        A figure, or an axis whose values are numbers.
    """
    placed = [(x, point.figures[QUALITY], point) for point in points if (x := place(point, cost)) is not None]
    return [
        point
        for x, y, point in sorted(placed, key=lambda each: each[:2])
        if not any((a <= x and b < y) or (a < x and b <= y) for a, b, _ in placed)
    ]


def place(point: Point, name: str) -> float | None:
    """Where a finished point lies along a figure or an axis; None where it has no place."""
    if QUALITY not in point.figures:
        return None
    return point.figures.get(name) if name in FIGURES else number_of(point.axes.get(name))


def fronts(points: Sequence[Point]) -> dict[str, list[str]]:
    """The costs on whose front a point is, by its name."""
    found: dict[str, list[str]] = {point.name: [] for point in points}
    for cost in COSTS:
        for point in pareto_front(points, cost):
            found[point.name].append(cost)
    return found


def to_csv(points: Sequence[Point]) -> str:
    """A row a run: name, state, what it differs in, its figures in bytes and seconds, and the fronts it is on."""
    axes, on_front = axes_of(points), fronts(points)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "status", *axes, *FIGURES, "peak_measured", "pareto_front", "cause"])
    for point in points:
        writer.writerow(
            [
                *(point.name, point.status),
                *(point.axes.get(axis, "") for axis in axes),
                *(point.figures.get(name, "") for name in FIGURES),
                point.measured if point.figures else "",
                " ".join(on_front[point.name]),
                " ".join(point.cause.split()),
            ]
        )
    return out.getvalue()


def _figures(found: Mapping[str, Any], folder: Path) -> dict[str, float]:
    adapter = folder / ADAPTER_WEIGHTS
    figures = {
        QUALITY: found["perplexities"][-1],
        "peak_bytes": found["peak_bytes"] or found["predicted_bytes"],
        "traffic": sum(found["bytes_up"]) + sum(found["bytes_down"]),
        "seconds": found["seconds"],
        "adapter_bytes": adapter.stat().st_size if adapter.exists() else None,
    }
    return {name: value for name, value in figures.items() if value and math.isfinite(value)}


def _order(folder: Path) -> tuple[bool, int, str]:
    number = folder.name.isdecimal()
    return not number, int(folder.name) if number else 0, folder.name


def _read(content_of: Callable[[], Any]) -> dict[str, Any]:
    try:
        content = content_of()
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
