"""One run from its start to its end: start it, show its events, stop it, and say how it ended.

The run itself goes on elsewhere: in Flower's processes (:mod:`hsplitlora_flwr.cli.superlink`) or in one process of its
own (:mod:`hsplitlora_flwr.cli.run_process`). What it tells is read from the events in its folder.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hsplitlora_flwr.cli.interrupts import Interrupted, held, obey
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.run_process import RunProcess
from hsplitlora_flwr.cli.superlink import RunStatus, SuperLink, SuperLinkError, open_superlink, started_run
from hsplitlora_flwr.cli.verdict import FLOWER_LOG, SUPERLINK_LOG, failure_cause, last_words, missing_results
from hsplitlora_flwr.cli.watch import Watch
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.paths import last_round, nodes_folder
from hsplitlora_flwr.reporting import EVENTS_FILE, read_events
from hsplitlora_flwr.reporting.events import Listener

_RUN_LOG = "run.log"


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
        say(console, "not all clients can train at the same time here, so server.order=arrival: steps come as they do")
    if settled.train != config.train:
        say(console, "not all clients of a round can be at work here, so every task is a message of its own")
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
        if superlink is None and not launcher.superlink and (run_id := started_run(folder / FLOWER_LOG)):
            # its nodes ran here, and may have been killed before they could delete it
            shutil.rmtree(nodes_folder() / run_id, ignore_errors=True)
    if cause or events.final is None:
        _end(config, console, cause)
        return 1
    console.handle(events.final)
    return 0


class _Shown:
    """The events of a run, shown as they come. The app's last event is kept back until it is known to be true.

    Attributes
    ----------
    final : dict or None
        That event.
    """

    def __init__(self, folder: Path, console: Listener) -> None:
        self.folder, self.console = folder, console
        self.final: dict[str, Any] | None = None
        self._offset = 0

    def show(self) -> bool:
        """Show new events; returns whether there were any."""
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
    return last_words(log) if process.failed else missing_results(events.folder, final, log)


def _on_flower(config: Config, app: Path, launcher: Launcher, events: _Shown, superlink: SuperLink | None) -> str:
    """Run on a SuperLink; returns why the run counts as failed, "" if it does not."""
    folder, console = events.folder, events.console
    run_config = folder / "run_config.toml"
    run_config.write_text(run_config_toml(config), encoding="utf-8")
    phase(console, "starting Flower")
    opened = nullcontext(superlink) if superlink else None
    log = folder / SUPERLINK_LOG
    with opened or open_superlink(launcher.superlink, app, log, launcher.ray_address) as link:
        with link.stream(app, run_config, launcher.federation(config), folder / FLOWER_LOG) as stream:
            status = _follow(link, stream, events, stays=superlink is not None)
        if link.own and not opened:
            phase(console, "stopping Flower")
    return failure_cause(folder, status, events.final)


def _end(config: Config, console: Listener, cause: str) -> None:
    """Tell the end of a run that has no results: what is kept, how to go on, and last of all the cause."""
    from hsplitlora_flwr.reporting.report import failed_outside

    folder = Path(config.run.dir)
    if folder.is_dir():
        failed_outside(folder, cause)
    if logs := [str(folder / name) for name in (FLOWER_LOG, SUPERLINK_LOG, _RUN_LOG) if (folder / name).exists()]:
        say(console, f"logs: {', '.join(logs)}")
    if done := last_round(folder):
        say(console, f"round {done} is kept; the same command with run.resume={folder} and a new run.dir goes on")
    else:
        say(console, "no round was finished; the same command starts anew, with a new run.dir where it names one")
    console.handle({"kind": "failed", "error": cause})


def _follow(superlink: SuperLink, stream: subprocess.Popen[bytes], events: _Shown, *, stays: bool = False) -> RunStatus:
    """Show events until the run is over; returns Flower's verdict.

    A run that is given up is stopped where its SuperLink ``stays``.
    """
    log, size = events.folder / FLOWER_LOG, 0
    run_id: str | None = None
    watch = Watch(superlink)
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
        phase(events.console, "stopping")
        if run_id and (stays or not superlink.own):
            superlink.stop(run_id)
        raise
    finally:
        watch.close()
    return watch.status


def run_config_toml(config: Config) -> str:
    """The run config as TOML; JSON's numbers, booleans and strings are TOML's too."""
    items = config.to_run_config().items()
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in items)


def say(console: Listener, text: str) -> None:
    console.handle({"kind": "status", "text": text})


def phase(console: Listener, text: str) -> None:
    console.handle({"kind": "phase", "text": text})
