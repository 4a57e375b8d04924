"""The jobs of a sweep, a folder for each: the same command again does what is missing.

``job.json`` in a job's folder says what was typed for it and which settings that came to, and so which job the folder
belongs to: a finished one is kept, one that failed or was stopped goes on after its last finished round, or starts
anew if it has none. What it had done before lies in ``earlier/`` until it has finished.

Jobs may run in processes of their own, beside others or on other machines, as Hydra's launchers have it. So everything
is told by the folders, and Hydra tells this module only where they are (:class:`SweepCallback`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from hsplitlora_flwr.cli.checks import WRONG
from hsplitlora_flwr.cli.room import SHARE_OF_MEMORY, Room
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.comparison.points import FIGURES, JOB_FILE, QUALITY, Point, typed_axes
from hsplitlora_flwr.config import Config, Scalar
from hsplitlora_flwr.paths import absolute, last_round, with_absolute_paths
from hsplitlora_flwr.reporting import Listener, RunConsole
from hsplitlora_flwr.reporting.events import Event

EARLIER = "earlier"
CONSOLE_FILE = "console.log"
"""What a job tells that shares the terminal with others."""
_SWEEP = "HSPLITLORA_SWEEP"
"""The environment variable that tells jobs which command they belong to, which keys it varies, how many they are, and
what memory there was for them."""
_ON_THIS_MACHINE = ("joblib",)
"""Launchers of Hydra that do jobs side by side here."""
_ITS_OWN = ("run.dir", "run.resume")


@dataclass(frozen=True)
class Job:
    """A job of a sweep and its folder.

    Parameters
    ----------
    folder : Path
    overrides : Sequence[str]
        What was typed for it.
    settings : Mapping[str, Scalar], optional
        Dotted keys, without where it runs; None if they are wrong.
    """

    folder: Path
    overrides: Sequence[str]
    settings: Mapping[str, Scalar] | None

    @classmethod
    def claim(cls, sweep: Path, number: int, overrides: Sequence[str], config: Config | None) -> Job:
        """The folder of the job with these settings, or a new one: that of its number, if nobody has it.

        Parameters
        ----------
        sweep : Path
            The folder of the sweep.
        number : int
            Of the job in its command.
        config : Config, optional
            None if there is none, since what was typed is wrong.
        """
        settings = None
        if config:
            flat = with_absolute_paths(config).to_run_config()
            settings = {key: value for key, value in flat.items() if key not in _ITS_OWN}
        sweep.mkdir(parents=True, exist_ok=True)
        for file in sorted(sweep.glob(f"*/{JOB_FILE}")):
            if _is_same(file, overrides, config):
                job = cls(file.parent, overrides, settings)
                job.note()
                return job
        while True:
            folder = sweep / str(number)
            folder.mkdir(exist_ok=True)
            if not any(folder.iterdir()) and _create(folder / JOB_FILE):
                job = cls(folder, overrides, settings)
                job.note()
                return job
            number += 1

    def note(self, error: str = "") -> None:
        """Say whose folder this is, and what went wrong before the run began."""
        content = {
            "overrides": list(self.overrides),
            "settings": self.settings,
            "error": error,
            "command": _this_sweep()["command"],
        }
        write(self.folder / JOB_FILE, json.dumps(content, indent=1) + "\n")

    @property
    def point(self) -> Point:
        """What became of it so far."""
        return Point.read(self.folder) or Point(self.folder.name, {}, "not started")

    @property
    def finished(self) -> bool:
        """There is nothing left to do."""
        return self.point.status == "finished"

    def again(self, config: Config) -> Config:
        """The settings with which it starts or goes on, once its folder has room for that."""
        earlier = self.folder / EARLIER
        if last_round(self.folder):
            shutil.rmtree(earlier, ignore_errors=True)
            earlier.mkdir()
            for each in self._leftovers():
                each.rename(earlier / each.name)
        for each in self._leftovers():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        config = _in_folder(config, self.folder)
        if last_round(earlier):
            from hsplitlora_flwr.server.checkpoint import check_resume  # takes seconds

            resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=str(earlier)))
            try:
                check_resume(resumed, self.folder)
                return resumed
            except (ValueError, OSError):  # a method that cannot, or a damaged file: from the start
                pass
        shutil.rmtree(earlier, ignore_errors=True)
        return config

    def done(self) -> None:
        """Remove what only a run that goes on needs."""
        shutil.rmtree(self.folder / EARLIER, ignore_errors=True)

    def _leftovers(self) -> Iterator[Path]:
        return (each for each in list(self.folder.iterdir()) if each.name not in (JOB_FILE, EARLIER))


def _in_folder(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def _is_same(file: Path, overrides: Sequence[str], config: Config | None) -> bool:
    """Whether a folder is that of a job with these settings or, where they are wrong, with this typed."""
    content = _read(file)
    if config is None or not content.get("settings"):
        return bool(config is None and content.get("overrides") == list(overrides))
    try:
        # through the schema, so that a setting that is younger than the job has its default
        there = Config.from_run_config(content["settings"])
    except (ValueError, TypeError):
        return False
    here = dataclasses.replace(config, run=dataclasses.replace(config.run, dir="", resume=""))
    return with_absolute_paths(there) == with_absolute_paths(here)


def _create(file: Path) -> bool:
    """Make a file that nobody has made yet."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------------- what Hydra says of a sweep


class SweepCallback(Callback):
    """Notes what this process is about to start, for itself and, in the environment, for the jobs.

    Attributes
    ----------
    folder : Path or None
        Of the sweep; None where there is none.
    """

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweeper = config.hydra.sweeper
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        keys, total = swept([*config.hydra.overrides.task, *params])
        total = int(sweeper.get("n_trials") or total)
        memory = int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
        told = {"command": secrets.token_hex(8), "keys": keys, "total": total, "memory": memory}
        os.environ[_SWEEP] = json.dumps(told)
        SweepCallback.folder = Path(absolute(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        shutil.rmtree(_room(Path(absolute(config.hydra.sweep.dir))).folder, ignore_errors=True)


def swept(overrides: Sequence[str]) -> tuple[list[str], int]:
    """The keys that have several values, and how many jobs these make; 0 where that cannot be told."""
    found = OverridesParser.create().parse_overrides(list(overrides))
    found = [override for override in found if override.is_sweep_override()]
    keys = list(dict.fromkeys(override.key_or_group for override in found))
    if not all(override.is_discrete_sweep() for override in found):
        return keys, 0
    return keys, math.prod(len(list(override.sweep_string_iterator())) for override in found)


@dataclass(frozen=True)
class Place:
    """A job as Hydra tells of it.

    Parameters
    ----------
    sweep : Path
        The folder of its sweep.
    number : int
        From 0.
    overrides : Sequence[str]
        All that was typed, with the values of this job.
    beside : bool
        Other jobs may run at the same time, so that the terminal is not its own.
    room : Room, optional
        What it shares with them, where they run on this machine.
    """

    sweep: Path
    number: int
    overrides: Sequence[str]
    beside: bool
    room: Room | None = None

    @classmethod
    def here(cls) -> Place:
        """Of the job that this process does now."""
        config = HydraConfig.get()
        launcher = config.runtime.choices.get("hydra/launcher", "basic")
        sweep = Path(absolute(config.sweep.dir))
        room = _room(sweep) if launcher in _ON_THIS_MACHINE else None
        return cls(sweep, int(config.job.num), list(config.overrides.task), launcher != "basic", room)

    @property
    def headline(self) -> str:
        """Which job this is, and in what it differs from the others."""
        typed, sweep = typed_axes(self.overrides), _this_sweep()
        told = {key: value for key, value in typed.items() if key in sweep["keys"]} or typed
        of = f" of {sweep['total']}" if sweep["total"] else ""
        return f"job {self.number + 1}{of}: " + "  ".join(f"{key}={value}" for key, value in told.items())

    def room_for(self, wanted: int) -> AbstractContextManager[None]:
        """Wait until there is memory for what the job is planned to take, and keep it; the terminal is told of it."""
        if not self.room:
            return nullcontext()
        return self.room.taken(wanted, lambda told: _print(f"{self.headline}: {told}"))


def _room(sweep: Path) -> Room:
    told = _this_sweep()
    return Room(sweep / f".{told['command']}", told["memory"])


def _print(text: str, style: str = "") -> None:
    Console(highlight=False).print(Text(text, style=style), soft_wrap=True)


def _this_sweep() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.environ.get(_SWEEP, "{}"))
    return {"command": "", "keys": [], "total": 0, "memory": 0} | told


def do(place: Place, config: Config | None, wrong: str, start: Callable[[Config, Listener], int]) -> float:
    """Do a job of a sweep, unless it has finished before.

    Parameters
    ----------
    config : Config, optional
        Its settings; None if these are wrong.
    wrong : str
        What is wrong with them.
    start : Callable
        Runs with settings and tells a console; 0 if the run finished. What it raises of :data:`WRONG` is why it cannot
        begin.

    Returns
    -------
    float
        The perplexity after it, for sweepers that look for the lowest; ``nan`` if it did not finish.
    """
    job = Job.claim(place.sweep, place.number, place.overrides, config)
    if job.finished:
        _print(f"{place.headline}: finished before, {_outcome(job)}", "dim")
        return job.point.figures.get(QUALITY, math.nan)
    _print(place.headline, "bold")
    if config:
        config = job.again(config)
        if config.run.resume:
            _print("it goes on after the last round that it finished before")
        with _console(job.folder if place.beside else None) as console:
            told = _Told(console)
            try:
                start(config, told)
            except WRONG as error:
                wrong = str(error)
            finally:
                job.note(wrong or told.cause)
    else:
        job.note(wrong)
    if job.finished:
        job.done()
        _print(f"{place.headline}: {_outcome(job)}", "green")
    else:
        cause = job.point.cause.strip() or "it ended without a word"
        _print(f"{place.headline}: failed: {cause.splitlines()[-1]}", "red")
    return job.point.figures.get(QUALITY, math.nan)


class _Told:
    """Passes events on, and remembers why a run failed, which may have had no folder to say it in."""

    def __init__(self, console: Listener) -> None:
        self._console = console
        self.cause = ""

    def handle(self, event: Event) -> None:
        if event["kind"] == "failed":
            self.cause = str(event["error"])
        self._console.handle(event)


@contextmanager
def _console(folder: Path | None) -> Iterator[Listener]:
    """The terminal, or, where others share it, a file in the job's folder."""
    if folder is None:
        with RunConsole() as console:
            yield console
    else:
        with (folder / CONSOLE_FILE).open("w", encoding="utf-8") as file, _in_file(file) as console:
            yield console


def _in_file(file: IO[str]) -> RunConsole:
    return RunConsole(Console(file=file, force_interactive=False, no_color=True))


def _outcome(job: Job) -> str:
    figures = job.point.figures
    told = (f"{FIGURES[name].title}: {FIGURES[name].shown(figures[name])}" for name in FIGURES if name in figures)
    return "; ".join(told)


# ---------------------------------------------------------------------- all of them


def sweep_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments with a folder for the sweep, where they ask for one and name none: the same in every call, by the
    keys that have several values."""
    multirun = {"-m", "--multirun"} & set(arguments)
    typed = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    if not multirun or typed & {"run.dir", "hydra.sweep.dir", "sweep"}:
        return list(arguments)
    keys, _ = swept([argument for argument in arguments if "=" in argument and not argument.startswith("-")])
    names = "+".join(key.rpartition(".")[2].replace("/", "-") for key in keys) or "one"
    return [*arguments, f"run.dir=runs/sweep-{names}"]


def failed_jobs(sweep: Path) -> int:
    """The jobs of this command that have not finished."""
    command = _this_sweep()["command"]
    mine = (file.parent for file in sweep.glob(f"*/{JOB_FILE}") if _read(file).get("command") == command)
    return sum((point := Point.read(folder)) is None or point.status != "finished" for folder in mine)
