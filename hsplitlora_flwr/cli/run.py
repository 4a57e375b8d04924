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
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.checks import WRONG, Checked, prepare_apart
from hsplitlora_flwr.cli.interrupts import Interrupted, held, interruptible, obey
from hsplitlora_flwr.cli.jobs import Place, SweepCallback, do, failed_jobs, sweep_folder
from hsplitlora_flwr.cli.overrides import keys_of, start
from hsplitlora_flwr.cli.run_process import RunProcess
from hsplitlora_flwr.cli.settings import CONF
from hsplitlora_flwr.cli.settings import PROJECT as PROJECT
from hsplitlora_flwr.cli.superlink import (
    Question,
    RunStatus,
    SuperLink,
    SuperLinkError,
    check_connection,
    open_superlink,
    started_run,
)
from hsplitlora_flwr.comparison.points import JOB_FILE
from hsplitlora_flwr.config import Config, ConfigError, unknown_key
from hsplitlora_flwr.methods import METHODS, with_room_for_messages
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.paths import last_round, nodes_folder, with_absolute_paths
from hsplitlora_flwr.reporting import EVENTS_FILE, RunConsole, read_events
from hsplitlora_flwr.reporting.events import Listener, format_bytes
from hsplitlora_flwr.schema import checked, setting

_LOG = "flwr.log"
_RUN_LOG = "run.log"
_SUPERLINK_LOG = "superlink.log"
_SILENCE_SECONDS = 20.0  # then ask Flower whether the run still lives; asking costs 1.5 s of CPU
_AGAIN_SECONDS = 2.0  # to the next question about a run whose log has ended
_REFUSALS, _PATIENCE = 3, 300.0  # questions without a sign of life between them, and seconds: then the run is lost
_SLOW_SECONDS = 180.0  # then a question is asked anew
_MOST_FAILED = 100  # an exit status has 8 bits, and those from 126 up mean other things
_LINES, _WIDEST = 6, 400  # of an exception's text
_NOT_STARTED = RunStatus("not started", "")
_statuses: list[int] = []
_UNSTATED_BYTES, _SHARE_OF_MEMORY = 2e9, 0.8
"""What a simulated client without a stated budget is taken for, and how much of the free memory all may take."""
_AGAINST_RAY = {"superlink": "it starts Ray by itself", "cpus": "the cluster says how many it has"}


def _address(text: str) -> str:
    if text and not re.fullmatch(r"[^\s:/]+:\d+", text):
        raise ValueError("must be HOST:PORT of a Ray cluster, or '' for none")
    return text


Address = Annotated[str, AfterValidator(_address)]


@dataclass(frozen=True)
class Launcher:
    """How a run is started, which is no part of the run itself."""

    engine: Literal["flower", "process"] = setting(
        "flower",
        "flower = Flower, with Ray for the clients; process = threads of one process, the same results, sooner",
    )
    superlink: str = setting(
        "", "a connection of `flwr config list`; empty = start a SuperLink for this run and stop it after"
    )
    client_cpus: int = setting(1, "CPUs of one simulated client; so many clients as fit run at the same time", ge=1)
    cpus: int = setting(
        0,
        "CPUs of simulated clients together; 0 = the machine's, or enough for steps in turn; engine=process: all",
        ge=0,
    )
    ray_address: Address = setting("", "HOST:PORT of a running Ray cluster, whose machines simulate the clients")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Launcher:
        """Build from the composed section.

        Raises
        ------
        ConfigError
            If a key is unknown or a value has the wrong type or is out of range.
        """
        known = keys_of("launcher", cls)
        for key in values:
            if f"launcher.{key}" not in known:
                raise unknown_key(f"launcher.{key}", known)
        launcher: Launcher = checked("launcher", cls, values)
        for name in ("superlink", "ray_address") if launcher.engine == "process" else ():
            if value := getattr(launcher, name):
                raise ConfigError(f"launcher.{name}={value!r} needs launcher.engine=flower")
        address = launcher.ray_address
        for name, why in _AGAINST_RAY.items() if address else ():
            if value := getattr(launcher, name):
                raise ConfigError(f"launcher.{name}={value!r} is not possible with launcher.ray_address: {why}")
        cpus, most = launcher.client_cpus, launcher.cpus or all_cores()
        if cpus > most and not address:
            raise ConfigError(
                f"launcher.client_cpus={cpus!r} must be a whole number from 1 to the {most} CPUs there are"
            )
        return launcher

    def federation(self, config: Config) -> str:
        """The settings of a simulation, as ``flwr run --federation-config`` takes them."""
        settings = {"num-supernodes": config.clients.count, "client-resources-num-cpus": self.client_cpus}
        if cpus := self._counted_cpus(config):
            settings["init-args-num-cpus"] = cpus
        return " ".join(f"{key}={value}" for key, value in settings.items())

    def in_order(self, config: Config) -> Config:
        """The settings with an order of steps that can be kept: where not all clients can train at the same time, one
        would wait for another that only starts when it has finished."""
        cpus = 0 if self.engine == "process" else self._counted_cpus(config)
        if not cpus or not takes_turns(config) or config.clients.count * self.client_cpus <= cpus:
            return config
        return dataclasses.replace(config, server=dataclasses.replace(config.server, order="arrival"))

    def with_workers(self, config: Config) -> Config:
        """The settings with messages that end with their task where one that lasts would keep a worker process from a
        client of the same round."""
        cpus = 0 if self.engine == "process" else self._counted_cpus(config)
        return with_room_for_messages(config, cpus // self.client_cpus) if cpus else config

    def _counted_cpus(self, config: Config) -> int:
        """CPUs that Ray is to count with: more than there are where steps take turns and memory holds all clients; 0
        where other machines know their own."""
        if self.cpus or self.ray_address or self.superlink:
            return self.cpus
        wanted, cores = config.clients.count * self.client_cpus, all_cores()
        if wanted <= cores or not takes_turns(config):
            return cores
        budgets = itertools.cycle([gb * 1e9 for gb in config.clients.memory_gb] or [_UNSTATED_BYTES])
        taken = sum(itertools.islice(budgets, config.clients.count))
        return wanted if taken <= _SHARE_OF_MEMORY * psutil.virtual_memory().available else cores


def takes_turns(config: Config) -> bool:
    """Whether clients' steps come in a fixed order at a half of the server that all train."""
    from hsplitlora_flwr.methods import shares_half

    return shares_half(config) and config.server.order == "fixed" and config.transport.kind != "messages"


def launch(
    config: Config,
    app: Path,
    launcher: Launcher,
    console: Listener,
    superlink: SuperLink | None = None,
    stopping: threading.Event | None = None,
) -> int:
    """Run a Flower app in simulation and show it.

    Parameters
    ----------
    config : Config
        The settings, with ``run.dir`` absolute. The app is expected to write its events, ``summary.json`` and the
        results that it names there.
    app : Path
        The folder with the app's ``pyproject.toml``.
    launcher : Launcher
        How to start it.
    console : Listener
        Where to show it.
    superlink : SuperLink, optional
        An open one to run on, which stays open, instead of one for this run alone.
    stopping : threading.Event, optional
        Ends the run with :class:`Interrupted` when it is set; for runs in threads, which get no signals.

    Returns
    -------
    int
        0 if Flower and the app both say that the run finished and every result is there, else 1. What the console
        shows last is where the results are, or why there are none.
    """
    try:
        with held():
            return _launch(config, app, launcher, console, superlink, stopping or threading.Event())
    except Interrupted as error:
        error.told = True
        raise


def _launch(
    config: Config,
    app: Path,
    launcher: Launcher,
    console: Listener,
    superlink: SuperLink | None,
    stopping: threading.Event,
) -> int:
    folder = Path(config.run.dir)
    settled = launcher.with_workers(launcher.in_order(config))
    if settled.server != config.server:
        _say(console, "not all clients can train at the same time here, so server.order=arrival: steps come as they do")
    if settled.train != config.train:
        _say(console, "not all clients of a round can be at work here, so every task is a message of its own")
    config, events = settled, _Shown(folder, console)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if launcher.engine == "process":
            cause = _in_process(config, launcher, events, stopping)
        else:
            cause = _on_flower(config, app, launcher, events, superlink)
    except (SuperLinkError, OSError) as error:
        cause = str(error)
    except Interrupted as error:
        _end(config, console, f"interrupted by {error.signal.name}; everything that was started is stopped")
        raise
    finally:
        if superlink is None and not launcher.superlink and (run_id := started_run(folder / _LOG)):
            # its nodes were here, and may have been killed before they could
            shutil.rmtree(nodes_folder() / run_id, ignore_errors=True)
    if cause or events.final is None:
        _end(config, console, cause)
        return 1
    console.handle(events.final)
    return 0


class _Shown:
    """The events of a run, shown as they come; the last word of the app waits until it is clear whether it is true.

    Attributes
    ----------
    final : dict or None
        That word.
    """

    def __init__(self, folder: Path, console: Listener) -> None:
        self.folder, self.console = folder, console
        self.final: dict[str, Any] | None = None
        self._offset = 0

    def show(self) -> bool:
        """Show what has come; whether there was anything."""
        events, self._offset = read_events(self.folder / EVENTS_FILE, self._offset)
        for event in events:
            if event["kind"] in ("finished", "failed"):
                self.final = event
            else:
                self.console.handle(event)
        return bool(events)


def _in_process(config: Config, launcher: Launcher, events: _Shown, stopping: threading.Event) -> str:
    """Run in a process beside this one; returns why the run counts as failed, "" if it does not."""
    log = events.folder / _RUN_LOG
    with RunProcess(config, log, cores=launcher.cpus, threads=launcher.client_cpus) as process:
        while not process.ended(0.2):
            obey()
            if stopping.is_set():
                raise Interrupted(signal.SIGTERM)
            events.show()
    events.show()
    final = events.final
    if final and final["kind"] == "failed":
        return str(final["error"])
    if process.killed:
        return "the process of the run was killed; most often the system does so for lack of memory"
    if not log.exists():
        return "the process of the run ended before it could say why"
    return _last_words(log) if process.failed else _missing(events.folder, final, log)


def _on_flower(config: Config, app: Path, launcher: Launcher, events: _Shown, superlink: SuperLink | None) -> str:
    """Run on a SuperLink; returns why the run counts as failed, "" if it does not."""
    folder, console = events.folder, events.console
    run_config = folder / "run_config.toml"
    run_config.write_text(run_config_toml(config), encoding="utf-8")
    _phase(console, "starting Flower")
    opened = nullcontext(superlink) if superlink else None
    log = folder / _SUPERLINK_LOG
    with opened or open_superlink(launcher.superlink, app, log, launcher.ray_address) as link:
        with link.stream(app, run_config, launcher.federation(config), folder / _LOG) as stream:
            status = _follow(link, stream, events, stays=superlink is not None)
        if link.own and not opened:
            _phase(console, "stopping Flower")
    return failure_cause(folder, status, events.final)


def _end(config: Config, console: Listener, cause: str) -> None:
    """Tell the end of a run that has no results: what is kept, how to go on, and last of all the cause."""
    from hsplitlora_flwr.reporting.report import failed_outside

    folder = Path(config.run.dir)
    if folder.is_dir():
        failed_outside(folder, cause)
    if logs := [str(folder / name) for name in (_LOG, _SUPERLINK_LOG, _RUN_LOG) if (folder / name).exists()]:
        _say(console, f"logs: {', '.join(logs)}")
    if done := last_round(folder):
        _say(console, f"round {done} is kept; the same command with run.resume={folder} and a new run.dir goes on")
    else:
        _say(console, "no round was finished; the same command starts anew, with a new run.dir where it names one")
    console.handle({"kind": "failed", "error": cause})


def _follow(superlink: SuperLink, stream: subprocess.Popen[bytes], events: _Shown, *, stays: bool = False) -> RunStatus:
    """Show events until the run is over; returns Flower's verdict.

    A run that is given up is stopped where its SuperLink ``stays``.
    """
    log, size = events.folder / _LOG, 0
    run_id: str | None = None
    watch = _Watch(superlink)
    try:
        while not watch.status.over:
            obey()
            ended = stream.poll() is not None
            run_id = run_id or started_run(log)
            if ended and run_id is None:
                break
            superlink.check()
            if run_id:
                watch.look(run_id, ended)
            if events.show() or log.stat().st_size != size:
                size = log.stat().st_size
                watch.heard()
            time.sleep(0.2)
    except BaseException:
        _phase(events.console, "stopping")
        if run_id and (stays or not superlink.own):
            superlink.stop(run_id)
        raise
    finally:
        watch.close()
    return watch.status


class _Watch:
    """Asks Flower about a run of which nothing is heard.

    On a machine that computes, Flower may take minutes to answer, and a network may be away for a while. Neither ends a
    run: it is lost when its SuperLink refuses again and again, and no sign of life comes in between.

    Attributes
    ----------
    status : RunStatus
        What Flower said last.
    """

    def __init__(self, superlink: SuperLink) -> None:
        self.status = _NOT_STARTED
        self._superlink = superlink
        self._question: Question | None = None
        self._refusals = 0
        self._heard = self._asked = time.monotonic()

    def heard(self) -> None:
        """The run gave a sign of life."""
        self._heard, self._refusals = time.monotonic(), 0

    def look(self, run_id: str, ended: bool) -> None:
        """Take an answer, if there is one; ask, if it is time to. ``ended``: the run's log has ended.

        Raises
        ------
        SuperLinkError
            If the run is lost.
        """
        now = time.monotonic()
        if self._question is None:
            silent = now - max(self._heard, self._asked) > _SILENCE_SECONDS
            if silent or (ended and now - self._asked > _AGAIN_SECONDS):
                self._question, self._asked = self._superlink.ask(run_id), now
            return
        try:
            answer = self._question.answer()
        except SuperLinkError:
            self._question, self._asked = None, now
            self._refusals += 1
            if self._refusals >= _REFUSALS and now - self._heard > _PATIENCE:
                raise
            return
        if answer:
            self._question, self._asked, self.status = None, now, answer
            self.heard()
        elif now - self._asked > _SLOW_SECONDS:
            self.close()
            self._asked = now

    def close(self) -> None:
        """Ask no more."""
        if self._question:
            self._question.drop()
            self._question = None


def failure_cause(folder: Path, status: RunStatus, final: Mapping[str, Any] | None) -> str:
    """Why a run that is over counts as failed; "" if it does not."""
    if final and final["kind"] == "failed":
        return str(final["error"])
    if status == _NOT_STARTED:
        return f"'flwr run' could not start the run\n{_last_words(folder / _LOG)}"
    if status.text == "finished:stopped":
        return "the run was stopped at its SuperLink, as by 'flwr stop'"
    if "heartbeat" in status.details:
        return "the process of the run ended without a word; most often the system killed it for lack of memory"
    if status.text != "finished:completed":
        return f"Flower says {status.text}\n{_last_words(folder / _LOG)}"
    return _missing(folder, final, folder / _LOG)


def _missing(folder: Path, final: Mapping[str, Any] | None, log: Path) -> str:
    """What a run that ended well has not left behind; "" if everything is there."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{_last_words(log)}\nno readable summary.json: {error}"
    if summary["status"] != "finished":
        return f"{_last_words(log)}\nsummary.json says {summary['status']!r}"
    if not final:
        return f"the run ended with no 'finished' event in {EVENTS_FILE}"
    missing = [name for name in summary["results"] if not (folder / name).is_file()]
    return f"the run finished without writing {', '.join(missing)}" if missing else ""


def _last_words(log: Path) -> str:
    """What began the last failure in a log of Flower, in a few lines; the log's last lines if it has no traceback."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip("│╭╮╰╯─").rstrip() for line in text.splitlines()]  # `flwr` frames its own errors
    lines = [line for line in lines if line.strip(" ^~")]
    starts = [i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if not starts:
        return "\n".join(line[:_WIDEST] for line in lines[-10:])
    # Python tells an exception that led to another one first, with a sentence between them.
    while len(starts) > 1 and re.match("(The above|During handling of the above) exception", lines[starts[-1] - 1]):
        lines = lines[: starts.pop() - 1]
    block = lines[starts[-1] + 1 :]
    # Frames are indented, the exception is not, and the next record of the log ends its text.
    first = next((i for i, line in enumerate(block) if not line.startswith(" ")), 0)
    after = (
        i for i, line in enumerate(block) if i > first and re.match(r"(DEBUG|INFO|WARNING|ERROR) *:|\(\w+ pid=", line)
    )
    end = next(after, len(block))
    told = [line[:_WIDEST] for line in block[max(0, first - 2) : min(end, first + _LINES)]]
    return "\n".join([*told, *(["..."] if end > first + _LINES else [])])


def run_config_toml(config: Config) -> str:
    """The run config as TOML; JSON's numbers, booleans and strings are TOML's too."""
    items = config.to_run_config().items()
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in items)


def _say(console: Listener, text: str) -> None:
    console.handle({"kind": "status", "text": text})


def _phase(console: Listener, text: str) -> None:
    console.handle({"kind": "phase", "text": text})


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


def _start(config: Config, launcher: Launcher, console: Listener) -> int:
    """Check and launch; returns the exit status.

    Raises
    ------
    ValueError, ModuleNotFoundError
        If something is wrong with what was asked for.
    """
    _phase(console, "checking settings, text and model")
    if launcher.superlink:
        check_connection(launcher.superlink, PROJECT)
    checked = prepare_apart(config, console, simulated=not launcher.superlink)
    if launcher.superlink or config.clients.process_mb or METHODS[config.method.name].central:
        return launch(config, PROJECT, launcher, console)
    return _with_known_process(config, launcher, console, checked)


def _with_known_process(config: Config, launcher: Launcher, console: Listener, checked: Checked) -> int:
    """Launch with what is known of a client's process; what a run through Flower measures is known from then on."""
    known = checked.memory
    settled = config
    if known and (known.in_run or launcher.engine == "process"):
        _say(console, f"a client's process takes {format_bytes(known.bytes)} by itself ({known.source})")
        clients = dataclasses.replace(config.clients, process_mb=known.bytes / 1e6)
        settled = dataclasses.replace(config, clients=clients)
    elif known:
        _say(console, f"a client's process takes {format_bytes(known.bytes)} by the forecast; now clients measure it")
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
    return do(Place.here(), config, wrong, lambda settled, console: _start(settled, launcher, console))


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
