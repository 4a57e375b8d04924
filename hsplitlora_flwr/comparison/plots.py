"""Perplexity over rounds and over bytes: the mean of the seeds, with a band of one sample standard deviation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hsplitlora_flwr.comparison.results import CENTRAL, REFERENCE, Comparison, Result

Floats = NDArray[np.float64]

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def plot(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw ``SETTING-rounds.png`` and ``SETTING-bytes.png`` of every setting that has a finished run.

    Returns
    -------
    list[Path]
        The files.
    """
    written = []
    for setting in comparison.settings:
        if not any(comparison.finished(setting, method) for method in comparison.methods):
            continue
        for kind, label in (("rounds", "round"), ("bytes", "bytes of all clients, both directions, 1e6")):
            figure = Figure(figsize=(8, 5), layout="constrained")
            axes = figure.add_subplot()
            _draw(axes, comparison, setting, over_bytes=kind == "bytes")
            axes.set(title=setting, xlabel=label, ylabel="perplexity of held-out text", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", ncols=2)
            written.append(folder / f"{setting}-{kind}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def curve(results: list[Result]) -> tuple[Floats, Floats, Floats]:
    """Mean traffic so far (1e6 bytes), and mean and sample standard deviation of the perplexity.

    Each has the length rounds + 1 and starts before training; the deviation of a single run is 0.
    """
    perplexities = np.array([result.perplexities for result in results])
    traffic = np.array([[0, *result.traffic] for result in results]).cumsum(axis=1) / 1e6
    sd = perplexities.std(axis=0, ddof=1) if len(results) > 1 else np.zeros(perplexities.shape[1])
    return traffic.mean(axis=0), perplexities.mean(axis=0), sd


def _draw(axes: Axes, comparison: Comparison, setting: str, *, over_bytes: bool) -> None:
    """One line a method; over bytes, one that sends nothing is a level: its last perplexity."""
    for index, method in enumerate(comparison.methods):
        results = comparison.finished(setting, method)
        if not results:
            continue
        traffic, mean, sd = curve(results)
        style = _style(method, index, central=results[0].setting == CENTRAL)
        if over_bytes and not traffic[-1]:
            axes.axhline(mean[-1], **style)
            continue
        first = 1 if over_bytes else 0  # a logarithmic axis has no place for nothing sent
        x = (traffic if over_bytes else np.arange(len(mean)))[first:]
        axes.plot(x, mean[first:], marker=".", **style)
        axes.fill_between(x, (mean - sd)[first:], (mean + sd)[first:], color=style["color"], alpha=0.2, linewidth=0)
    if over_bytes:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _style(method: str, index: int, *, central: bool) -> dict[str, Any]:
    if method == REFERENCE:
        return {"label": method, "color": "black", "linewidth": 2.0}
    dashes = "--" if central else ":" if method.startswith(REFERENCE) else "-"
    return {"label": method, "color": _COLOURS[index % len(_COLOURS)], "linestyle": dashes, "linewidth": 1.2}
