"""A comparison under way: which runs it needs, which are finished, and doing the others."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hsplitlora_flwr.comparison.board import Board, Line
from hsplitlora_flwr.comparison.clock import round_seconds
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.comparison.jobs import Job, Store, vary
from hsplitlora_flwr.comparison.options import Options
from hsplitlora_flwr.comparison.results import CENTRAL, Comparison, Result, measurements
from hsplitlora_flwr.comparison.table import Tuning, render
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.paths import with_absolute_paths
from hsplitlora_flwr.reporting.summary import ROWS_FILE, read_summary
from hsplitlora_flwr.schema import scalar

RunOnce = Callable[[Config, "Line"], int]
"""Does one run with absolute paths and tells a listener about it; 0 if it finished."""


class Study:
    """A comparison under way.

    Parameters
    ----------
    options : Options
    bases : Mapping[str, Config]
        The composed settings by client setting, the one for tuning included.
    run_once : RunOnce
        Called by several threads where runs go on side by side.
    console : Console
    at_once : int
        Runs that go on side by side.
    stop : Callable[[], None]
        Ends those that go on, where the study is to end early.

    Raises
    ------
    ConfigError
        If a method without clients would not be the same in every setting.
    """

    def __init__(
        self,
        options: Options,
        bases: Mapping[str, Config],
        run_once: RunOnce,
        console: Console,
        at_once: int = 1,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._options, self._bases, self._run_once, self._console = options, bases, run_once, console
        self._at_once, self._stop, self._board = at_once, stop, Board(console)
        self._store = Store(options.out)
        self._check_central()

    def run(self) -> int:
        """Tune, do the runs that have no result yet, and report after each; returns the exit status."""
        done = list[Job]()
        with self._board:
            while trials := [trial for trial in self._trials() if trial not in done]:  # a best rate asks for a next one
                self._complete_all(trials, len(done) + 1, len(done) + len(trials) + len(self._jobs()))
                done += trials
            jobs = self._jobs()  # now with the chosen learning rates
            self.report()
            self._complete_all(jobs, len(done) + 1, len(done) + len(jobs))
        results = [self._store.load(job) for job in jobs]
        return 0 if all(result and not result.cause for result in results) else 1

    def comparison(self) -> Comparison:
        """What is there so far."""
        options = self._options
        results = [result for job in self._jobs() if (result := self._store.load(job))]
        return Comparison(options.settings, options.methods, options.all_seeds, results, options.target)

    def report(self) -> None:
        """Write the table and the numbers from whatever is finished."""
        options, comparison = self._options, self.comparison()
        tuning = list(self._tuning().values())
        about = {setting: describe(self._bases[setting]) for setting in options.settings}
        write(options.out / "table.md", render(comparison, about, tuning))
        numbers = {
            "options": {name: value for name, value in vars(options).items() if name not in ("out", "work")},
            "tuning": [vars(one) | {"choice": one.choice} for one in tuning],
            **comparison.to_json(),
        }
        write(options.out / "results.json", json.dumps(numbers, indent=1) + "\n")

    # ------------------------------------------------------------------ which runs

    def _jobs(self) -> list[Job]:
        """The reported runs; one for all settings where there are no clients."""
        options, tuning = self._options, self._tuning()
        jobs: dict[str, Job] = {}
        for seed in options.all_seeds:
            for setting in options.settings:
                for method in (each for each in options.methods if seed in options.seeds_of(each)):
                    chosen = tuning.get(self._row(options.tuning_setting(setting), self._tuned_as(method)))
                    # Where no trial finished, the run itself will say why.
                    rate = (chosen and chosen.choice) or options.lrs[0]
                    job = self._job(setting, method, {"run.seed": seed, "train.lr": rate})
                    jobs.setdefault(job.name, job)
        return list(jobs.values())

    def _trials(self) -> list[Job]:
        """The runs that choose the learning rates; none if there is nothing to choose.

        Where the best of those that are done is the lowest or the highest, the next one beyond it is among them.
        """
        options = self._options
        jobs: dict[str, Job] = {}
        for setting in options.tuning_settings:
            for method in dict.fromkeys(map(self._tuned_as, options.methods)):
                for job in self._trials_of(setting, method):
                    jobs.setdefault(job.name, job)
        return list(jobs.values())

    def _trials_of(self, setting: str, method: str) -> Iterator[Job]:
        options, changes = self._options, tuning_changes(self._options, self._bases[setting])
        rates, found = list(options.lrs), dict[float, float | None]()
        for rate in rates:  # they become more while this goes on
            job = self._job(setting, method, {**changes, "train.lr": rate}, trial=True)
            yield job
            found |= self._outcome(job)
            beyond = Tuning(setting, method, found).beyond if len(found) == len(rates) else None
            if beyond and len(rates) < len(options.lrs) + options.widen:
                rates.append(beyond)

    def _outcome(self, trial: Job) -> dict[float, float | None]:
        """The final perplexity of a trial by its learning rate, None where it failed; empty where it was not done."""
        if result := self._store.load(trial):
            return {trial.config.train.lr: None if result.cause else result.perplexities[-1]}
        return {}

    def _job(self, setting: str, method: str, changes: Mapping[str, Any], trial: bool = False) -> Job:
        config = vary(self._bases[setting], {"method.name": method, **changes})
        return Job(self._row(setting, method)[0], config, trial)

    def _tuned_as(self, method: str) -> str:
        """Whose learning rate a method takes: an ablation differs from the whole in nothing else."""
        whole = method.partition("-no-")[0]
        return whole if whole in self._options.methods else method

    @staticmethod
    def _row(setting: str, method: str) -> tuple[str, str]:
        return (CENTRAL if METHODS[method].central else setting), method

    def _tuning(self) -> dict[tuple[str, str], Tuning]:
        """What the trials say so far, by row."""
        trials: dict[tuple[str, str], dict[float, float | None]] = {}
        for job in self._trials():
            trials.setdefault((job.setting, job.method), {}).update(self._outcome(job))
        return {row: Tuning(*row, perplexities) for row, perplexities in trials.items()}

    def _check_central(self) -> None:
        for method in self._options.methods:
            if METHODS[method].central:
                first, *others = (self._job(setting, method, {}).identity for setting in self._options.settings)
                for other in others:
                    if differ := [key for key in first if first[key] != other[key]]:
                        raise ConfigError(
                            f"{method} has no clients and is the same in all of {', '.join(self._options.settings)}, "
                            f"but they differ in {', '.join(differ)}; make them equal, or compare them one by one"
                        )

    # ------------------------------------------------------------------ one run

    def _complete_all(self, jobs: Sequence[Job], first: int, total: int) -> None:
        """Do those that have no result yet, several at a time, and report after each."""
        ending = threading.Event()

        def complete(number: int, job: Job) -> bool:
            try:
                return not ending.is_set() and self._complete(job, f"[{number}/{total}] {job.text}")
            except BaseException:
                ending.set()  # before this thread takes the next
                raise

        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                for done in as_completed(pool.submit(complete, *each) for each in enumerate(jobs, first)):
                    if done.result():
                        self.report()
            except BaseException:
                ending.set()
                self._stop()
                raise

    def _complete(self, job: Job, text: str) -> bool:
        """Do a job unless its result is here; True if it was done."""
        result = self._store.load(job)
        if result and not result.cause:
            self._say(f"{text}: {_change(result)}, kept", "dim")
            return False
        folder = self._options.work / job.name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that failed or was killed
        started = time.monotonic()
        with self._board.line(text) as show:
            result = self._do(job, folder, Line(show))
        self._store.save(job, result)
        seconds = f"{time.monotonic() - started:.0f} s"
        if result.cause:
            self._say(f"{text}: failed after {seconds}: {result.cause.strip().splitlines()[-1]}", "red")
            self._say(f"  its folder: {folder}", "red")
        else:
            self._say(f"{text}: {_change(result)} in {seconds}")
            if not self._options.keep:
                shutil.rmtree(folder)
        return True

    def _do(self, job: Job, folder: Path, listener: Line) -> Result:
        config = with_absolute_paths(vary(job.config, {"run.dir": str(folder)}))
        try:
            if self._run_once(config, listener) == 0:
                return job.result(**read_run(config, folder))
        except Exception as error:  # whatever it is, the other runs go on
            return job.result(cause=f"{type(error).__name__}: {error}")
        return job.result(cause=listener.cause or "it ended without a word")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def read_run(config: Config, folder: Path) -> dict[str, Any]:
    """The fields of a :class:`~hsplitlora_flwr.comparison.results.Result` that follow from a run folder.

    Raises
    ------
    OSError, KeyError, ValueError
        If it is not that of a finished run.
    """
    summary = read_summary(folder)
    fields = {**measurements(summary), "simulated": round_seconds(config, summary)}
    if (folder / ROWS_FILE).exists():  # not of a run that went on from its own last round
        rows = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))
        fields |= {"row_nll": [round(nll, 4) for nll in rows["nll"]], "row_tokens": rows["tokens"]}
    return fields


def tuning_changes(options: Options, base: Config) -> dict[str, Any]:
    """What the trials of a setting have in place of its own: a seed, held-out rows and rounds.

    Raises
    ------
    ConfigError
        If the data source cannot set rows aside for the choice.
    """
    data = base.data
    if data.source != "e2e":
        raise ConfigError(
            f"data.source={data.source} cannot keep held-out rows for the choice of the learning rate apart from those "
            "that are reported; give one rate with --lrs, or use data=e2e"
        )
    return {
        "run.seed": options.tune_seed,
        "data.eval_skip": data.eval_skip + data.eval_rows,
        "data.eval_rows": options.tune_rows or data.eval_rows,
        "train.rounds": options.tune_rounds or base.train.rounds,
    }


def describe(config: Config) -> str:
    """A setting in a line."""
    data, clients, train = config.data, config.clients, config.train
    alpha = f" (alpha {data.alpha:g})" if data.partition == "dirichlet" else ""
    plan = config.plan
    devices = (
        f" Simulated devices: clients of {scalar(clients.gflops)} GFLOP/s, a server of {plan.server_gflops:g}, links "
        f"of {scalar(clients.mbit_up) or 'unlimited'} Mbit/s up and {scalar(clients.mbit_down) or 'unlimited'} down."
        if clients.gflops
        else ""
    )
    return (
        f"{config.model.path} on {data.source}: {clients.count} clients of {scalar(clients.memory_gb)} GB, rows dealt "
        f"{data.partition}{alpha}, {train.rounds} rounds x {train.steps} steps x {train.batch_size} rows, measured on "
        f"{data.eval_rows} held-out rows.{devices}"
    )


def _change(result: Result) -> str:
    return f"{result.perplexities[0]:.2f} → {result.perplexities[-1]:.2f}"
