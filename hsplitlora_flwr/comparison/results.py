"""What a comparison keeps of every run, and what its runs say together.

A :class:`Result` is what the ``summary.json`` of a run comes down to. A :class:`Comparison` sets the results of several
methods, settings and seeds side by side:

- **target**: a perplexity, or the final perplexity of a named method in the same setting with the same seed.
- **rounds to the target**: up to the first round that ends at or below it, interpolated linearly in the perplexity
  between that round's end and its start. Tokens and bytes to the target are those of the whole rounds before, and the
  same share of that round's. A run that never gets there has ``inf``.
- **spread**: mean and sample standard deviation over seeds; a ratio to the reference is taken seed by seed first.
- **interval**: where the mean perplexity over seeds lies on other held-out text of the same kind, by the bootstrap over
  rows, which are the same in all runs; of a ratio to the reference both are taken on the same rows.
- **simulated seconds**: what a round would take on the devices and links that are stated
  (:mod:`hsplitlora_flwr.comparison.clock`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

REFERENCE = "hsplitlora"
CENTRAL = "central"
"""The setting of a method without clients; its results stand in every setting."""


@dataclass(frozen=True)
class Result:
    """One run.

    Parameters
    ----------
    setting : str
        The client setting, or ``CENTRAL``.
    config : dict
        The settings that could make a difference, as dotted keys.
    cause : str
        Why it failed; "" if it finished. A failed run has none of what follows.
    versions : dict
        Of the packages that made it.
    perplexities : list of float
        On the held-out text: before training, after round 1, 2, ...
    tokens, bytes_up, bytes_down : list of int
        Of all clients together in round 1, 2, ...
    trainable_parameters : float
        Mean over clients and rounds.
    predicted_bytes : int
        Largest memory that a client was planned to take in any round; 0 where nothing is planned.
    peak_bytes : int
        Largest memory that a client took in any round; 0 if no client measured it, as where all share a process.
    peak_share : float
        Largest share of its budget that a client took; 0 if none measured or had a budget.
    seconds : float
        Wall time.
    simulated : list of float
        Simulated seconds of round 1, 2, ...; empty where no speeds are stated.
    row_nll, row_tokens : list
        Nats, and labelled tokens, of every held-out row after the last round.
    """

    setting: str
    method: str
    seed: int
    learning_rate: float
    config: dict[str, Any]
    cause: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    perplexities: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)
    trainable_parameters: float = 0.0
    predicted_bytes: int = 0
    peak_bytes: int = 0
    peak_share: float = 0.0
    seconds: float = 0.0
    simulated: list[float] = field(default_factory=list)
    row_nll: list[float] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)

    @property
    def traffic(self) -> list[int]:
        """Bytes in both directions in round 1, 2, ..."""
        return [up + down for up, down in zip(self.bytes_up, self.bytes_down, strict=True)]


def measurements(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`Result` that stand in a ``summary.json``.

    Raises
    ------
    KeyError, ValueError
        If the summary is not that of a finished run.
    """
    rounds = summary["rounds"]
    if summary["status"] != "finished" or not rounds:
        raise ValueError(f"summary.json says {summary['status']!r} after {len(rounds)} rounds")
    rows = [row for round_ in rounds for row in round_["clients"]]
    budgeted = [row for row in rows if row.get("budget_bytes")]
    return {
        "versions": dict(summary["versions"]),
        "perplexities": [summary["perplexity_before"], *(round_["perplexity"] for round_ in rounds)],
        **{name: [sum(row[name] for row in r["clients"]) for r in rounds] for name in ("tokens", *_BYTES)},
        "trainable_parameters": statistics.mean(row["trainable_parameters"] for row in rows),
        "predicted_bytes": max(row["predicted_bytes"] for row in rows),
        "peak_bytes": max(row["measured_bytes"] for row in rows),
        "peak_share": max((row["measured_bytes"] / row["budget_bytes"] for row in budgeted), default=0.0),
        "seconds": summary["seconds"],
    }


_BYTES = ("bytes_up", "bytes_down")
_IN_RECORDS = ("config", "versions", "row_nll", "row_tokens")  # stand in the file of every run


def rounds_to(perplexities: Sequence[float], target: float) -> float:
    """Rounds until the perplexity is first at or below ``target``, interpolated; ``inf`` if it never is.

    Parameters
    ----------
    perplexities : Sequence[float]
        Before training, after round 1, 2, ...
    """
    for round_, perplexity in enumerate(perplexities):
        if perplexity <= target:
            if round_ == 0:
                return 0.0
            before = perplexities[round_ - 1]
            return round_ - 1 + (before - target) / (before - perplexity)
    return math.inf


def amount_by(per_round: Sequence[float], rounds: float) -> float:
    """What has added up after so many ``rounds``, a share of a round counting as that share of its amount."""
    if math.isinf(rounds):
        return math.inf
    whole = int(rounds)
    share = rounds - whole
    return sum(per_round[:whole]) + (share * per_round[whole] if share else 0.0)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over ``n`` seeds; ``unreached`` more never came to their target.

    ``mean`` is None where ``n`` is 0, ``sd`` where it is below 2.
    """

    mean: float | None
    sd: float | None
    n: int
    unreached: int = 0


def spread(values: Iterable[float | None]) -> Spread:
    """The spread of some values; None (no value) is passed over, ``inf`` (target not reached) is counted apart."""
    present = [value for value in values if value is not None]
    finite = [value for value in present if math.isfinite(value)]
    return Spread(
        statistics.mean(finite) if finite else None,
        statistics.stdev(finite) if len(finite) > 1 else None,
        len(finite),
        len(present) - len(finite),
    )


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Parameters
    ----------
    title : str
        With the unit.
    value : Callable
        From a result and its target perplexity (``nan`` if there is none); None where the metric has no meaning.
    unit : float
        What the value is divided by to be shown.
    digits : int
        Decimals shown.
    """

    title: str
    value: Callable[[Result, float], float | None]
    unit: float = 1.0
    digits: int = 2


def _rounds(result: Result, target: float) -> float | None:
    return None if math.isnan(target) else rounds_to(result.perplexities, target)


def _to_target(per_round: Callable[[Result], Sequence[float]]) -> Callable[[Result, float], float | None]:
    def value(result: Result, target: float) -> float | None:
        rounds = _rounds(result, target)
        # Without clients nothing is sent, and without speeds nothing takes time.
        return amount_by(per_round(result), rounds) if rounds is not None and any(per_round(result)) else None

    return value


METRICS = {
    "final_perplexity": Metric("final perplexity", lambda result, _: result.perplexities[-1], digits=3),
    "rounds_to_target": Metric("rounds to target", _rounds),
    "tokens_to_target": Metric("1000 tokens to target", _to_target(lambda result: result.tokens), 1e3, 1),
    "bytes_to_target": Metric("MB to target", _to_target(lambda result: result.traffic), 1e6, 1),
    "simulated_to_target": Metric("simulated s to target", _to_target(lambda result: result.simulated), 1, 1),
    "trainable_parameters": Metric("trainable parameters, millions", lambda r, _: r.trainable_parameters, 1e6),
    "predicted_bytes": Metric("planned client memory, GB", lambda result, _: result.predicted_bytes or None, 1e9),
    "peak_bytes": Metric("peak client memory, GB", lambda result, _: result.peak_bytes or None, 1e9),
    "peak_share": Metric("peak / budget", lambda result, _: result.peak_share or None),
    "seconds": Metric("wall time, s", lambda result, _: result.seconds, 1, 0),
}


class Comparison:
    """Results of settings x methods x seeds; those that failed or are not there yet count as missing.

    Parameters
    ----------
    settings, methods : Sequence[str]
        In the order in which they are shown.
    seeds : Sequence[int]
    results : Iterable[Result]
    target : float or str
        A perplexity, or the method whose final perplexity is the target.
    """

    def __init__(
        self,
        settings: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
        results: Iterable[Result],
        target: float | str,
    ) -> None:
        self.settings, self.methods, self.seeds = settings, methods, seeds
        self.results = list(results)
        self._finished = {(r.setting, r.method, r.seed): r for r in self.results if not r.cause}
        self.rule = target

    def find(self, setting: str, method: str, seed: int) -> Result | None:
        """The finished run of a cell."""
        found = self._finished.get((setting, method, seed))
        return found or self._finished.get((CENTRAL, method, seed))

    def finished(self, setting: str, method: str) -> list[Result]:
        """The finished runs of a row, by seed."""
        found = (self.find(setting, method, seed) for seed in self.seeds)
        return [result for result in found if result]

    def target(self, setting: str, seed: int) -> float:
        """The target perplexity; ``nan`` while the run that sets it is missing."""
        if not isinstance(self.rule, str):
            return self.rule
        result = self.find(setting, self.rule, seed)
        return result.perplexities[-1] if result else math.nan

    def spread(self, metric: str, setting: str, method: str) -> Spread:
        """A metric of a row."""
        return spread(self._value(metric, setting, method, seed) for seed in self.seeds)

    def ratio(self, metric: str, setting: str, method: str) -> Spread:
        """A metric of a row as a multiple of the reference's, seed by seed."""

        def of_seed(seed: int) -> float | None:
            value = self._value(metric, setting, method, seed)
            reference = self._value(metric, setting, REFERENCE, seed)
            if value is None or not reference:
                return None
            return math.inf if math.isinf(reference) else value / reference

        return spread(of_seed(seed) for seed in self.seeds)

    def interval(self, setting: str, method: str, over: str = "") -> tuple[float, float] | None:
        """Interval of the mean final perplexity over seeds, or of its ratio to that of ``over``, over held-out rows.

        None where runs have other rows than the others, or none.
        """
        pairs = [(self.find(setting, method, seed), self.find(setting, over or method, seed)) for seed in self.seeds]
        found = [(one, other) for one, other in pairs if one and other]
        rows = [tuple(result.row_tokens) for pair in found for result in pair]
        if not rows or not rows[0] or len(set(rows)) > 1:
            return None
        tokens, draws = np.array(rows[0]), _draws(len(rows[0]))

        def perplexities(results: Iterable[Result]) -> NDArray[np.float64]:
            """``(resamples,)``; means over seeds."""
            nll = np.array([result.row_nll for result in results])
            means: NDArray[np.float64] = np.exp(nll[:, draws].sum(axis=2) / tokens[draws].sum(axis=1)).mean(axis=0)
            return means

        values = perplexities(one for one, _ in found)
        if over:
            values /= perplexities(other for _, other in found)
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    def verdict(self, setting: str) -> dict[str, Spread]:
        """What is claimed of the reference, by sentence."""
        sentences = {f"final perplexity of {REFERENCE} / of cenlora": self._final_perplexity_over("cenlora", setting)}
        for rival in ("hetlora", "splitlora"):
            sentence = f"rounds of {REFERENCE} to the final perplexity of {rival} / rounds of {rival} to it"
            sentences[sentence] = self._rounds_over(rival, setting)
        for rival in ("cenlora", "full", "hetlora", "splitlora"):
            sentence = f"simulated time of {REFERENCE} to the final perplexity of {rival} / of {rival} to it"
            sentences[sentence] = self._time_over(rival, setting)
        return sentences

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain data: a row a run, then mean, standard deviation and count by setting and method."""

        def rows(of: Callable[[str, str, str], Spread], metrics: Iterable[str]) -> dict[str, Any]:
            return {
                setting: {
                    method: {metric: vars(of(metric, setting, method)) for metric in metrics} for method in self.methods
                }
                for setting in self.settings
            }

        return {
            "runs": [{key: value for key, value in vars(r).items() if key not in _IN_RECORDS} for r in self.results],
            "target": self.rule,
            "summary": rows(self.spread, METRICS),
            "ratio_to_reference": rows(self.ratio, METRICS),
            "interval": {
                setting: {
                    method: {
                        "final_perplexity": self.interval(setting, method),
                        "ratio_to_reference": self.interval(setting, method, REFERENCE),
                    }
                    for method in self.methods
                }
                for setting in self.settings
            },
            "verdict": {
                setting: {text: vars(found) for text, found in self.verdict(setting).items()}
                for setting in self.settings
            },
        }

    def _value(self, metric: str, setting: str, method: str, seed: int) -> float | None:
        result = self.find(setting, method, seed)
        return METRICS[metric].value(result, self.target(setting, seed)) if result else None

    def _pairs(self, rival: str, setting: str) -> list[tuple[Result, Result]]:
        """The reference and a rival, by seed, where both finished."""
        pairs = ((self.find(setting, REFERENCE, seed), self.find(setting, rival, seed)) for seed in self.seeds)
        return [(ours, theirs) for ours, theirs in pairs if ours and theirs]

    def _final_perplexity_over(self, rival: str, setting: str) -> Spread:
        return spread(ours.perplexities[-1] / theirs.perplexities[-1] for ours, theirs in self._pairs(rival, setting))

    def _rounds_over(self, rival: str, setting: str) -> Spread:
        shares = []
        for ours, theirs in self._pairs(rival, setting):
            target = theirs.perplexities[-1]
            needed = rounds_to(theirs.perplexities, target)
            shares.append(rounds_to(ours.perplexities, target) / needed if needed else None)
        return spread(shares)

    def _time_over(self, rival: str, setting: str) -> Spread:
        shares = []
        for ours, theirs in self._pairs(rival, setting):
            target = theirs.perplexities[-1]
            needed = amount_by(theirs.simulated, rounds_to(theirs.perplexities, target)) if theirs.simulated else 0.0
            known = needed and ours.simulated
            shares.append(amount_by(ours.simulated, rounds_to(ours.perplexities, target)) / needed if known else None)
        return spread(shares)


@lru_cache(maxsize=2)
def _draws(rows: int, resamples: int = 1000) -> NDArray[np.int64]:
    """``(resamples, rows)``; the rows of every resample, the same in every comparison."""
    return np.random.default_rng(0).integers(rows, size=(resamples, rows))
