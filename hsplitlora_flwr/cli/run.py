"""One federated run on this machine: ``hsplitlora run [overrides]``.

Composes the settings from ``conf/``, checks everything that can be checked before anything starts, starts a SuperLink,
runs the app on it, shows the run while it goes on, and judges at the end whether it really finished. The exit status
is 0 if it did, 1 if the run failed, 2 if the settings or the data are wrong; of a sweep, how many jobs failed.

::

    hsplitlora run                                    # three clients, the model that is fetched
    hsplitlora run experiment=e2e data.path=e2e/      # the reference run
    hsplitlora run -m train.lr=1e-3,3e-4              # a sweep: a job each; again, and it goes on with what is missing
    hsplitlora run -m +sweep=budgets                  # a sweep of conf/sweep
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.checks import WRONG, Checked, prepare_apart
from hsplitlora_flwr.cli.interrupts import Interrupted, interruptible
from hsplitlora_flwr.cli.jobs import Place, SweepCallback, do, failed_jobs, sweep_folder
from hsplitlora_flwr.cli.launch import launch, phase, say
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import start
from hsplitlora_flwr.cli.settings import CONF, PROJECT
from hsplitlora_flwr.cli.superlink import check_connection
from hsplitlora_flwr.comparison.points import JOB_FILE
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.paths import with_absolute_paths
from hsplitlora_flwr.reporting import EVENTS_FILE, RunConsole
from hsplitlora_flwr.reporting.events import Listener, format_bytes

_MOST_FAILED = 100  # an exit status has 8 bits, and those from 126 up mean other things
_statuses: list[int] = []


def _read(composed: DictConfig) -> tuple[Config, Launcher]:
    """The checked settings, with every path absolute: the run works in another folder than the user."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    launcher = Launcher.from_mapping(values.pop("launcher"))
    config = Config.from_mapping(values)
    return with_absolute_paths(config), launcher


def _check_new(config: Config) -> None:
    """See that no other run has this folder."""
    folder = Path(config.run.dir)
    if not config.run.dir:
        raise ConfigError("run.dir is empty; name a folder")
    if any((folder / name).exists() for name in (EVENTS_FILE, "summary.json", "adapter")):
        raise ConfigError(f"run.dir={folder} already holds a run; choose another folder or remove it")


def _start(config: Config, launcher: Launcher, console: Listener, place: Place | None = None) -> int:
    """Check and launch; returns the exit status.

    Parameters
    ----------
    place : Place, optional
        Of a job, which may have to wait for memory.

    Raises
    ------
    ValueError, ModuleNotFoundError
        If something is wrong with what was asked for.
    """
    phase(console, "checking settings, text and model")
    if launcher.superlink:
        check_connection(launcher.superlink, PROJECT)
    checked = prepare_apart(config, console, simulated=not launcher.superlink, planned=bool(place and place.room))
    with place.room_for(checked.planned_bytes) if place else nullcontext():
        if launcher.superlink or config.clients.process_mb or METHODS[config.method.name].central:
            return launch(config, PROJECT, launcher, console)
        return _with_known_process(config, launcher, console, checked)


def _with_known_process(config: Config, launcher: Launcher, console: Listener, checked: Checked) -> int:
    """Launch with what is known of a client's process; what a run through Flower measures is known from then on."""
    known = checked.memory
    settled = config
    if known and (known.in_run or launcher.engine == "process"):
        say(console, f"a client's process takes {format_bytes(known.bytes)} by itself ({known.source})")
        clients = dataclasses.replace(config.clients, process_mb=known.bytes / 1e6)
        settled = dataclasses.replace(config, clients=clients)
    elif known:
        say(console, f"a client's process takes {format_bytes(known.bytes)} by the forecast; now clients measure it")
    status = launch(settled, PROJECT, launcher, console)
    if status == 0 and settled is config and launcher.engine == "flower":
        own_memory.learn(checked.key, Path(config.run.dir))
    return status


def _run(composed: DictConfig) -> int:
    """One run; returns the exit status."""
    with RunConsole() as console:
        try:
            config, launcher = _read(composed)
            _check_new(config)
            return _start(config, launcher, console)
        except WRONG as error:
            console.close()
            print(f"error: {error}", file=sys.stderr)
            return 2


def _job(composed: DictConfig) -> float:
    """One job of a sweep; returns its perplexity."""
    config, launcher, wrong = None, Launcher(), ""
    try:
        config, launcher = _read(composed)
    except WRONG as error:
        wrong = str(error)
    place = Place.here()
    return do(place, config, wrong, lambda settled, console: _start(settled, launcher, console, place))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> float | None:
    """Hydra's entry point: one run, or one job of a sweep, which goes on whatever becomes of a job."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _job(composed)
    _statuses.append(_run(composed))
    return None


def command() -> None:
    """The command line; its exit status is that of the run, of a signal, or the number of jobs that failed."""
    interruptible()
    sys.argv[1:] = sweep_folder(sys.argv[1:])
    try:
        status = start(main, Launcher, __doc__ or "")
    except Interrupted as error:
        if not error.told:
            when = "before Flower was started; the same command starts the run"
            print(f"interrupted by {error.signal.name} {when}", file=sys.stderr)
        raise
    finally:
        if SweepCallback.folder and any(SweepCallback.folder.glob(f"*/{JOB_FILE}")):
            from hsplitlora_flwr.cli.sweep import show

            show(SweepCallback.folder)
    failed = failed_jobs(SweepCallback.folder) if SweepCallback.folder else 0
    if failed:
        print(f"jobs that did not finish: {failed}; the same command does them again, from their last finished round")
    sys.exit(status or min(failed, _MOST_FAILED) or max(_statuses, default=0))
