"""Methods x client settings x seeds: ``hsplitlora compare [options] [overrides]``.

Chooses every method's learning rate from the same grid, on a seed and on held-out rows that no reported run uses (an
ablation takes that of the whole method); then runs what has no result yet, as many side by side as cores and memory
hold, each in a process of its own (``launcher.engine=flower``: one after the other on Flower), and writes ``table.md``,
``results.json`` and plots from whatever is finished. A second call goes on where the first one stopped. Overrides are
those of ``hsplitlora run`` and hold for every run; a setting is a file of ``conf/experiment``. The exit status is 0 if
every run finished, 1 if one failed, 2 if the settings or the data are wrong.

::

    hsplitlora compare data.path=e2e/
    nohup hsplitlora compare data.path=e2e/ > compare.log &
    hsplitlora compare data.path=e2e/ --methods hsplitlora,splitlora --seeds 1,2 train.rounds=2
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from hsplitlora_flwr.cli.checks import prepare
from hsplitlora_flwr.cli.interrupts import Interrupted, interruptible
from hsplitlora_flwr.cli.launch import launch
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import check_keys, keys_of, literal, one_line, refuse_keys, renamed
from hsplitlora_flwr.cli.room import SHARE_OF_MEMORY
from hsplitlora_flwr.cli.settings import CONF, PROJECT, register, settings_text
from hsplitlora_flwr.cli.superlink import SuperLink, open_superlink
from hsplitlora_flwr.comparison.board import Line
from hsplitlora_flwr.comparison.jobs import vary
from hsplitlora_flwr.comparison.options import CHOSEN_HERE, EACH, Options
from hsplitlora_flwr.comparison.study import Study, tuning_changes
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.paths import with_absolute_paths
from hsplitlora_flwr.planning.round import cost_model
from hsplitlora_flwr.reporting import Listener


class ProcessRuns:
    """Runs of this project's app, each in a process of its own; may be called by several threads."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher, self._stopping = launcher, threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, config: Config, listener: Listener) -> int:
        return launch(config, PROJECT, self._launcher, listener, stopping=self._stopping)

    def stop(self) -> None:
        """End those that go on."""
        self._stopping.set()


class FlowerRuns:
    """Runs of this project's app, one after the other on one SuperLink; after a failed run the next has a new one.

    Parameters
    ----------
    launcher : Launcher
    log : Path
        The log of the SuperLink.
    """

    def __init__(self, launcher: Launcher, log: Path) -> None:
        self._launcher, self._log = launcher, log
        self._stack = ExitStack()
        self._superlink: SuperLink | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the SuperLink, and with it what goes on."""
        self._close()

    def __call__(self, config: Config, listener: Listener) -> int:
        if self._superlink is None:
            opening = open_superlink(self._launcher.superlink, PROJECT, self._log, self._launcher.ray_address)
            self._superlink = self._stack.enter_context(opening)
        status = launch(config, PROJECT, self._launcher, listener, self._superlink)
        if status:
            self._close()
        return status

    def _close(self) -> None:
        self._superlink = None
        self._stack.close()


def compose_setting(setting: str, overrides: Sequence[str]) -> tuple[Config, Launcher]:
    """The settings of a run in a client setting, without those that a comparison chooses.

    Raises
    ------
    ConfigError, HydraException, OmegaConfBaseException
        If a key or a value is wrong, or there is no such setting.
    """
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [f"experiment={setting}", *_OF_A_COMPARISON, *overrides])
    values: Any = OmegaConf.to_container(composed, resolve=True)
    launcher = Launcher.from_mapping(values.pop("launcher"))
    if launcher.engine == "process" and not launcher.cpus:  # several runs on a core each end sooner than one on all
        launcher = replace(launcher, cpus=1)
    return vary(Config.from_mapping(values), {"run.dir": ""}), launcher


_OF_A_COMPARISON = ("launcher.engine=process", "evaluation.texts=0")  # nobody reads the pages of its runs


class _Parser(argparse.ArgumentParser):
    """Its help goes on with the settings."""

    def format_help(self) -> str:
        return f"{super().format_help()}\n{settings_text(Launcher)}\n"


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Raises
    ------
    ConfigError
        If a value is not allowed. Options that do not exist end the program with status 2, as argparse does.
    """
    default = Options()
    parser = _Parser(
        description="Compare methods over client settings and seeds; a second call goes on where the first stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
        def read(text: str) -> tuple[Any, ...]:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

        read.__name__ = f"comma-separated {kind.__name__}"  # argparse's messages name it
        return read

    def target(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    def option(name: str, kind: Callable[[str], Any], text: str) -> None:
        value = getattr(default, name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=shown, help=text)

    option("settings", listed(str), "client settings: files of conf/experiment")
    option("methods", listed(str), "methods")
    option("seeds", listed(int), "seeds that are reported")
    option("leaders", listed(str), "methods with more seeds than the others")
    option("more_seeds", listed(int), "those seeds")
    option("lrs", listed(float), "learning rates that every method chooses from; one = no choice")
    option("tune_in", str, f"setting in which they choose; '{EACH}' = every setting for itself")
    option("tune_seed", int, "seed of that choice; none of --seeds")
    option("tune_rows", int, "held-out rows of that choice, after the reported ones; 0 = as many")
    option("tune_rounds", int, "rounds of that choice; 0 = as many")
    option("widen", int, "rates that may be tried beyond the grid, while the best one is an end of it")
    option("target", target, "target perplexity: a number, or a method whose final perplexity it is")
    option("out", Path, "results folder")
    option("work", Path, "folder for the runs while they last; what failed stays there")
    option("at_once", int, "runs side by side; 0 = as many as cores (launcher.cpus each) and memory hold")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all runs")
    parser.add_argument("overrides", nargs="*", help="settings of every run, such as data.path=FOLDER train.rounds=2")
    values = vars(parser.parse_intermixed_args(arguments))
    overrides = literal(renamed(values["overrides"]))
    check_keys(overrides, keys_of("launcher", Launcher))
    refuse_keys(overrides, CHOSEN_HERE, "this is what a comparison chooses; see --help")
    return Options(**values | {"overrides": tuple(overrides)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and check everything, then run and draw what is finished; returns the exit status."""
    if importlib.util.find_spec("matplotlib") is None:
        print("error: the plots need matplotlib: pip install 'hsplitlora_flwr[compare]'", file=sys.stderr)
        return 2
    from hsplitlora_flwr.comparison.plots import plot

    console = Console(highlight=False)
    try:
        options = parse(arguments)
        bases, launcher = _prepared(options, console)
        runs: ProcessRuns | FlowerRuns = ProcessRuns(launcher)
        at_once = options.at_once or runs_at_once(launcher, next(iter(bases.values())))
        if launcher.engine == "flower":
            runs, at_once = FlowerRuns(launcher, options.work / "superlink.log"), 1
        study = Study(options, bases, runs, console, at_once, runs.stop)
    except HydraException as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (ValueError, OmegaConfBaseException) as error:  # all errors of settings, data and models
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        with runs:
            status = study.run()
    finally:
        plot(study.comparison(), options.out)
    console.print(f"results in {options.out}: table.md, results.json and plots", soft_wrap=True)
    return status


def runs_at_once(launcher: Launcher, config: Config) -> int:
    """Runs that cores and free memory hold side by side, each with its server, its clients and a process."""
    cores = all_cores() // (launcher.cpus or all_cores())
    weights = cost_model(config, config.train.batch_size, config.data.max_length).total_weight_bytes
    needed = _PROCESS_BYTES + (1 + _SHARE_OF_CLIENT * config.clients.count) * weights
    return max(min(cores, int(SHARE_OF_MEMORY * psutil.virtual_memory().available / needed)), 1)


_PROCESS_BYTES, _SHARE_OF_CLIENT = 1e9, 2.0
"""What a process takes without weights, and what of them a client holds and trains with."""


def _prepared(options: Options, console: Console) -> tuple[dict[str, Config], Launcher]:
    """The checked settings by name; the model is there."""
    composed = {name: compose_setting(name, options.overrides) for name in options.all_settings}
    bases = {setting: config for setting, (config, _) in composed.items()}
    trials = [vary(bases[name], tuning_changes(options, bases[name])) for name in options.tuning_settings]
    for config in [*bases.values(), *trials]:
        prepare(with_absolute_paths(config), Line(console.print))
    return bases, composed[options.settings[0]][1]


def command() -> None:
    """The command line."""
    interruptible()
    try:
        sys.exit(main())
    except Interrupted as error:
        print(f"interrupted by {error.signal.name}; the same call goes on from here", file=sys.stderr)
        raise
