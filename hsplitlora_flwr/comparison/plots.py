"""Perplexity over rounds, bytes and simulated seconds: the mean of the seeds, within a sample standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Draw ``SETTING-rounds.png``, ``SETTING-bytes.png`` and, where speeds are stated, ``SETTING-seconds.png`` of every
    setting that has a finished run.

    Returns
    -------
    list[Path]
        The files.
    """
    written = []
    for setting in comparison.settings:
        if not any(comparison.finished(setting, method) for method in comparison.methods):
            continue
        for kind, (label, per_round) in AXES.items():
            if not any(any(per_round(r)) for m in comparison.methods for r in comparison.finished(setting, m)):
                continue
            figure = Figure(figsize=(8, 5), layout="constrained")
            axes = figure.add_subplot()
            _draw(axes, comparison, setting, per_round)
            if kind == "rounds":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            else:
                axes.set_xscale("log")
            axes.set(title=setting, xlabel=label, ylabel="perplexity of held-out text", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", ncols=2)
            written.append(folder / f"{setting}-{kind}.png")
            figure.savefig(written[-1], dpi=120)
    return written


PerRound = Callable[[Result], Sequence[float]]
AXES: dict[str, tuple[str, PerRound]] = {
    "rounds": ("round", lambda result: [1.0] * len(result.tokens)),
    "bytes": ("bytes of all clients, both directions, 1e6", lambda result: [each / 1e6 for each in result.traffic]),
    "seconds": ("simulated seconds", lambda result: result.simulated),
}
"""What perplexity is drawn over: a label, and what of it every round adds."""


def curve(results: list[Result], per_round: PerRound) -> tuple[Floats, Floats, Floats]:
    """Mean of what has added up so far, and mean and sample standard deviation of the perplexity.

    Each has the length rounds + 1 and starts before training; the deviation of a single run is 0.
    """
    perplexities = np.array([result.perplexities for result in results])
    added = np.array([[0.0, *per_round(result)] for result in results]).cumsum(axis=1)
    sd = perplexities.std(axis=0, ddof=1) if len(results) > 1 else np.zeros(perplexities.shape[1])
    return added.mean(axis=0), perplexities.mean(axis=0), sd


def _draw(axes: Axes, comparison: Comparison, setting: str, per_round: PerRound) -> None:
    """One line a method; one that adds nothing, as without clients to bytes, is a level: its last perplexity."""
    counts_rounds = per_round is AXES["rounds"][1]
    for index, method in enumerate(comparison.methods):
        results = comparison.finished(setting, method)
        if not results:
            continue
        style = _style(method, index, central=results[0].setting == CENTRAL)
        known = [result for result in results if any(per_round(result))]
        x, mean, sd = curve(known or results, per_round if known else AXES["rounds"][1])
        if not known:
            axes.axhline(mean[-1], **style)
            continue
        first = 0 if counts_rounds else 1  # a logarithmic axis has no place for nothing
        axes.plot(x[first:], mean[first:], marker=".", **style)
        axes.fill_between(
            x[first:], (mean - sd)[first:], (mean + sd)[first:], color=style["color"], alpha=0.2, linewidth=0
        )


def _style(method: str, index: int, *, central: bool) -> dict[str, Any]:
    if method == REFERENCE:
        return {"label": method, "color": "black", "linewidth": 2.0}
    dashes = "--" if central else ":" if method.startswith(REFERENCE) else "-"
    return {"label": method, "color": _COLOURS[index % len(_COLOURS)], "linestyle": dashes, "linewidth": 1.2}
