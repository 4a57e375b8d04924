"""The runs of a comparison: which ones there are, which of them are done, and doing the others.

A run is a :class:`Job`; its :class:`~hsplitlora_flwr.comparison.results.Result` is a JSON file, and counts only for
exactly the settings that it holds. So a comparison that was stopped, or changed, goes on with what is missing.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from hsplitlora_flwr.comparison.clock import round_seconds
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.comparison.results import CENTRAL, Comparison, Result, measurements
from hsplitlora_flwr.comparison.table import Tuning, render
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.loading import with_model_dtype
from hsplitlora_flwr.paths import with_absolute_paths
from hsplitlora_flwr.reporting import event_text
from hsplitlora_flwr.reporting.events import Event
from hsplitlora_flwr.reporting.summary import ROWS_FILE, read_summary
from hsplitlora_flwr.schema import scalar

EACH = "each"
RunOnce = Callable[[Config, "Line"], int]
"""Does one run with absolute paths and tells a listener about it; 0 if it finished."""

CHOSEN_HERE = ("experiment", "method", "method.name", "run.seed", "run.dir", "train.lr")
"""What is set for every run, and so not by the user."""
_OF_CLIENTS = (
    "clients.memory_gb",
    "clients.gpu_memory_gb",
    "clients.gflops",
    "clients.process_mb",
    "clients.mbit_up",
    "clients.mbit_down",
    "clients.adapter_mb",
    "plan.server_memory_gb",
    "plan.server_gpu_memory_gb",
    "data.partition",
    "data.alpha",
)


@dataclass(frozen=True)
class Options:
    """What is compared. ``hsplitlora compare --help`` says what each one means.

    Raises
    ------
    ConfigError
        If a value is not allowed.
    """

    settings: tuple[str, ...] = ("heterogeneous", "homogeneous")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (1, 2, 3)
    leaders: tuple[str, ...] = ()
    more_seeds: tuple[int, ...] = ()
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tune_in: str = "heterogeneous"
    tune_seed: int = 0
    tune_rows: int = 0
    tune_rounds: int = 0
    widen: int = 2
    target: float | str = "splitlora"
    out: Path = Path("runs/compare")
    work: Path = Path("runs/compare-work")
    keep: bool = False
    at_once: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("settings", "methods", "all_seeds", "lrs"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name.removeprefix('all_')}={values!r} must name one or more, each once")
        if unknown := [method for method in self.leaders if method not in self.methods]:
            raise ConfigError(f"--leaders: {', '.join(unknown)} is not among --methods")
        if self.at_once < 0:
            raise ConfigError(f"--at-once={self.at_once} must be at least 1, or 0 for as many as the machine holds")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ConfigError(f"--methods: unknown {', '.join(unknown)}; known: {', '.join(METHODS)}")
        if isinstance(self.target, str) and self.target not in self.methods:
            raise ConfigError(f"--target={self.target} is not among --methods; add it there, or give a perplexity")
        if not isinstance(self.target, str) and not 0 < self.target < math.inf:
            raise ConfigError(f"--target={self.target!r} must be a perplexity above 0, or a method")
        if not all(0 < rate < math.inf for rate in self.lrs):
            raise ConfigError(f"--lrs={self.lrs!r} must be numbers above 0")
        if min(*self.all_seeds, self.tune_seed, self.tune_rows, self.tune_rounds, self.widen) < 0:
            raise ConfigError("seeds, --tune-rows, --tune-rounds and --widen must be at least 0")
        if self.tuned and self.tune_seed in self.all_seeds:
            raise ConfigError(
                f"--tune-seed={self.tune_seed} is among --seeds; choose another, so that no run reports it"
            )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Those of every method, and those of the leaders alone."""
        return (*self.seeds, *self.more_seeds)

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds of a method."""
        return self.all_seeds if method in self.leaders else self.seeds

    @property
    def tuned(self) -> bool:
        """There is a choice between learning rates."""
        return len(self.lrs) > 1

    @property
    def tuning_settings(self) -> tuple[str, ...]:
        """The settings in which learning rates are chosen."""
        if not self.tuned:
            return ()
        return self.settings if self.tune_in == EACH else (self.tune_in,)

    @property
    def all_settings(self) -> tuple[str, ...]:
        """Those that are compared and those in which learning rates are chosen."""
        return tuple(dict.fromkeys((*self.settings, *self.tuning_settings)))

    def tuning_setting(self, setting: str) -> str:
        """The setting in which the learning rates of ``setting`` are chosen."""
        return setting if self.tune_in == EACH else self.tune_in


@dataclass(frozen=True)
class Job:
    """One run: a cell of the comparison, or a trial of the tuning. ``config`` has no ``run.dir`` yet."""

    setting: str
    config: Config
    trial: bool = False

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def name(self) -> str:
        """Names the job's file and run folder."""
        kind = f"lr{self.config.train.lr}" if self.trial else f"seed{self.config.run.seed}"
        return f"{self.setting}-{self.method}-{kind}"

    @property
    def text(self) -> str:
        kind = f"lr {self.config.train.lr}" if self.trial else f"seed {self.config.run.seed}"
        return f"{self.setting} {self.method} {kind}"

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make a difference: not the run folder, nor clients where there are none."""
        ignored = ("run.dir", *(_OF_CLIENTS if self.setting == CENTRAL else ()))
        return {key: value for key, value in self.config.to_run_config().items() if key not in ignored}

    def result(self, **fields: Any) -> Result:
        config = self.config
        return Result(self.setting, self.method, config.run.seed, config.train.lr, self.identity, **fields)


class Store:
    """Results on disk, a JSON file each, in the folder ``records`` of the results folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "records"
        self._folder.mkdir(parents=True, exist_ok=True)

    def load(self, job: Job) -> Result | None:
        """The job's result, if there is one of exactly its settings."""
        try:
            result = Result(**json.loads((self._folder / f"{job.name}.json").read_text(encoding="utf-8")))
            # Through the schema, so that a setting that is younger than the result has its default; and a folder may be
            # written in another way.
            done, wanted = map(with_absolute_paths, map(Config.from_run_config, (result.config, job.identity)))
            if done.model.dtype != wanted.model.dtype:
                done, wanted = with_model_dtype(done), with_model_dtype(wanted)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return result if done == wanted else None

    def save(self, job: Job, result: Result) -> None:
        write(self._folder / f"{job.name}.json", json.dumps(vars(result)) + "\n")


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
                            f"{method} has no clients and stands in all settings of {self._options.settings}, but they "
                            f"differ in {', '.join(differ)}; make them equal, or compare the settings one by one"
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


class Board:
    """Shows what goes on, a line for each run, while it is open."""

    def __init__(self, console: Console) -> None:
        self._status, self._lock = console.status(""), threading.Lock()
        self._lines: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    @contextmanager
    def line(self, name: str) -> Iterator[Callable[[str], None]]:
        """A line, and what writes to it."""
        self._show(name, name)
        try:
            yield lambda said: self._show(name, f"{name}: {said}")
        finally:
            self._show(name, "")

    def _show(self, name: str, text: str) -> None:
        with self._lock:
            self._lines[name] = text
            self._status.update(Text("\n".join(filter(None, self._lines.values()))))


class Line:
    """Shows the last thing that happened in a run, and remembers why it failed."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.cause = ""

    def handle(self, event: Event) -> None:
        if event["kind"] == "failed":
            self.cause = str(event["error"])
        elif text := event_text(event):
            self._show(text.splitlines()[0])


def vary(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same settings but for some dotted keys."""
    return Config.from_run_config({**config.to_run_config(), **changes})


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
