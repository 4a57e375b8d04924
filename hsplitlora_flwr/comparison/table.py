"""A comparison as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hsplitlora_flwr.comparison.results import METRICS, REFERENCE, Comparison, Metric, Result, Spread

RATIOS = (
    "final_perplexity",
    "rounds_to_target",
    "simulated_to_target",
    "tokens_to_target",
    "bytes_to_target",
    "predicted_bytes",
)


@dataclass(frozen=True)
class Tuning:
    """How the learning rate of one method was chosen.

    Parameters
    ----------
    setting, method : str
    trials : dict of float to float or None
        Learning rate -> final perplexity on rows that no reported run is measured on; None where the trial failed.
        Those that have not been tried are absent.
    """

    setting: str
    method: str
    trials: Mapping[float, float | None]

    @property
    def choice(self) -> float | None:
        """The learning rate with the lowest perplexity, the smaller of equals; None if no trial finished."""
        finished = [(perplexity, rate) for rate, perplexity in self.trials.items() if perplexity is not None]
        return min(finished)[1] if finished else None

    @property
    def at_edge(self) -> bool:
        """The choice is an end of the grid, so a better one may lie outside."""
        return self.choice in (min(self.trials), max(self.trials))

    @property
    def beyond(self) -> float | None:
        """The next rate outside the grid, at the end where the choice is, as far off as its neighbour; None where the
        choice lies between others, or is none."""
        if self.choice is None or not self.at_edge or len(self.trials) < 2:
            return None
        low, *between, high = sorted(self.trials)
        inner = (between or [high])[0] if self.choice == low else (between or [low])[-1]
        return float(f"{self.choice**2 / inner:.3g}")


def render(comparison: Comparison, about: Mapping[str, str], tuning: Sequence[Tuning]) -> str:
    """The page.

    Parameters
    ----------
    comparison : Comparison
    about : Mapping[str, str]
        A line about every setting.
    tuning : Sequence[Tuning]
        Empty when there was one learning rate for all.
    """
    parts = ["# Methods compared", _notes(comparison)]
    for setting in comparison.settings:
        parts += [f"## {setting}", about[setting], _measured(comparison, setting)]
        if comparison.finished(setting, REFERENCE):
            parts += [f"As multiples of {REFERENCE}, seed by seed:", _ratios(comparison, setting)]
            known = {text: found for text, found in comparison.verdict(setting).items() if found.n + found.unreached}
            parts += ["\n".join(f"- {text}: **{cell(found)}**" for text, found in known.items())]
    if tuning:
        parts += ["## Learning rates", _rates(tuning)]
    if failed := [result for result in comparison.results if result.cause]:
        parts += ["## Failed runs", "\n".join(_failure(result) for result in failed)]
    parts += ["## Made with", _versions(comparison.results)]
    return "\n\n".join(parts) + "\n"


def cell(found: Spread, metric: Metric | None = None) -> str:
    """Mean ± standard deviation in the metric's unit, and how many seeds reached the target if not all did."""
    unit, digits = (metric.unit, metric.digits) if metric else (1.0, 3)
    if found.mean is None:
        return "not reached" if found.unreached else "-"
    text = f"{found.mean / unit:,.{digits}f}"
    if found.sd is not None:
        text += f" ± {found.sd / unit:,.{digits}f}"
    return text + (f" ({found.n} of {found.n + found.unreached})" if found.unreached else "")


def _notes(comparison: Comparison) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    rule = comparison.rule
    target = (
        f"the final perplexity of {rule} with the same seed" if isinstance(rule, str) else f"a perplexity of {rule:g}"
    )
    return (
        f"Mean ± sample standard deviation over the seeds {seeds}, as far as their runs finished. The target is "
        f"{target}. Rounds to it are interpolated linearly between the first round that ends at or below it and the "
        "round before; tokens and bytes follow them. Where only some seeds reach it, the mean is over those, and their "
        "number stands behind it. In brackets: where the mean lies on other held-out text, 95 % of a bootstrap over "
        "rows. Simulated seconds are those that the stated devices and links would take, without aggregation and "
        "evaluation. Bytes are those of all clients in both directions. Methods without clients are run "
        "once, on the server, and stand in every setting."
    )


def _measured(comparison: Comparison, setting: str) -> str:
    rows = []
    for method in comparison.methods:
        finished = comparison.finished(setting, method)
        rates = ", ".join(f"{rate:g}" for rate in sorted({result.learning_rate for result in finished})) or "-"
        cells = [cell(comparison.spread(name, setting, method), metric) for name, metric in METRICS.items()]
        cells[0] += _interval(comparison.interval(setting, method))
        rows.append([method, rates, str(len(finished)), *cells])
    return _table(["method", "learning rate", "seeds", *(metric.title for metric in METRICS.values())], rows)


def _ratios(comparison: Comparison, setting: str) -> str:
    rows = [
        [method, *(cell(comparison.ratio(name, setting, method)) for name in RATIOS)]
        for method in comparison.methods
        if method != REFERENCE
    ]
    for row in rows:
        row[1] += _interval(comparison.interval(setting, row[0], REFERENCE))
    return _table(["method", *(METRICS[name].title.partition(",")[0] for name in RATIOS)], rows)


def _interval(found: tuple[float, float] | None) -> str:
    return f" [{found[0]:.3f}, {found[1]:.3f}]" if found else ""


def _rates(tuning: Sequence[Tuning]) -> str:
    grid = sorted({rate for choice in tuning for rate in choice.trials})
    rows = []
    for one in tuning:
        trials = (one.trials.get(rate, math.nan) for rate in grid)
        perplexities = ["failed" if found is None else "-" if math.isnan(found) else f"{found:.3f}" for found in trials]
        chosen = "none" if one.choice is None else f"{one.choice:g}" + (", an end of the grid" if one.at_edge else "")
        rows.append([one.method, one.setting, *perplexities, chosen])
    text = "Final perplexity on held-out rows of their own, with a seed of their own, and the choice:"
    return f"{text}\n\n" + _table(["method", "setting", *(f"{rate:g}" for rate in grid), "chosen"], rows)


def _failure(result: Result) -> str:
    cause = result.cause.strip().splitlines()[-1]
    return f"- {result.setting}, {result.method}, seed {result.seed}: {cause}"


def _versions(results: Iterable[Result]) -> str:
    """One line if the same packages made all results."""
    lines = {", ".join(f"{name} {version}" for name, version in r.versions.items()) for r in results if r.versions}
    if len(lines) > 1:
        return "Different packages made these results:\n\n" + "\n".join(f"- {line}" for line in sorted(lines))
    return next(iter(lines), "-")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
