"""``soak``: a deployment whose links and processes fail at random, for as long as one likes."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from hsplitlora_flwr.cli.settings import PROJECT
from hsplitlora_flwr.reporting import read_events
from hsplitlora_flwr.reporting.events import EVENTS_FILE
from simulations.benchmarks.common import Row, Setup
from simulations.benchmarks.scale import make_model
from simulations.deployment import CONNECTION, Deployment, deploy, free_port
from simulations.relay import Relay

Undo = Callable[[], None]

NODES = 4
LOOK_SECONDS = 30.0
"""From one row to the next."""
PAUSES = 10.0, 40.0
"""Seconds between two faults, at least and at most."""
ABSENCE = 4.0, 25.0
"""Seconds that a link is gone or a process stands still: less than the grace, and more."""
NODE_SECONDS = 10.0
"""From one look to the next whether every node is there."""
GRACE = 15
SETTINGS: dict[str, int | float | str] = {
    "clients.count": NODES,
    "clients.repeats": 20,
    "clients.memory_gb": "",
    "data.train_rows": 200,
    "data.eval_rows": 8,
    "data.max_length": 32,
    "lora.ranks": "'0,2,4'",
    "train.rounds": 1_000_000,
    "train.rounds_per_message": 0,
    "train.steps": 4,
    "train.batch_size": 2,
    "transport.address": "127.0.0.1",
    "transport.grace": GRACE,
    "server.patience": 5,
    "launcher.superlink": CONNECTION,
}


def soak(setup: Setup) -> Iterator[Row]:
    """A tiny model trained on a SuperLink and four SuperNodes on this machine, without end, while at random

    - every connection of the stream is reset, or refused for some seconds (``resets``, ``outages``),
    - a client process is killed, or stands still for some seconds (``kills``, ``stops``),
    - a SuperNode is killed, and started anew some seconds later (``nodes``).

    The stream goes through a relay. It lasts as long as ``--minutes`` says; with ``--small`` nothing fails. Every half
    minute a row says

    - ``rounds``: that were finished; ``repeated``: attempts at one that too few clients finished. A run that ends by
      itself is an error.
    - ``clients_a_round``: that finished one, of all rounds so far.
    - ``s_a_round``: median of those since the row before.
    - ``server_mb``, ``descriptors``, ``threads``: of the server's process.
    - ``client_processes``: of this deployment, on all nodes; more than one a node are orphans.
    - ``orphans``: client processes that killed SuperNodes left behind; ``orphan_s``: the longest that one of them lived
      on, to within a second.
    """
    dice, faults, orphans = random.Random(0), Counter[str](), _Orphans()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_model(folder / "model")
        nodes = [
            (f"partition-id={i} num-partitions={NODES} memory-gb={20 + 10 * i}", dict[str, str]()) for i in range(NODES)
        ]
        running = stack.enter_context(deploy(folder / "nodes", nodes))
        relay = stack.enter_context(Relay(port := free_port()))
        own = {"model.path": str(folder / "model"), "run.dir": str(folder / "run")}
        own |= {"transport.port": str(port), "transport.public_port": str(relay.port)}
        command = [sys.executable, "-m", "simulations.run", *(f"{k}={v}" for k, v in (SETTINGS | own).items())]
        run = stack.enter_context(_Started(command, running))
        begun, seen = time.monotonic(), 0.0
        fault_at = float("inf")  # until the first round is finished
        look_at, undone = begun, list[tuple[float, Undo]]()
        for number in itertools.count(1):
            until = begun + number * LOOK_SECONDS
            while (now := time.monotonic()) < until:
                if run.poll() is not None:
                    raise RuntimeError(f"the run ended: {_cause(folder)}\n{running.logs()[-5000:]}")
                for entry in [each for each in undone if each[0] <= now]:
                    undone.remove(entry)
                    entry[1]()
                orphans.look()
                if now >= look_at:  # Flower takes a node back when it has missed it, and not before
                    look_at = now + NODE_SECONDS
                    for node in running.nodes:
                        if not node.lives:
                            node.start()
                if now >= fault_at and not undone:
                    if undo := _fault(dice, faults, running, relay, orphans):
                        undone.append((now + dice.uniform(*ABSENCE), undo))
                    fault_at = now + dice.uniform(*PAUSES)
                time.sleep(0.2)
            row, seen = _row(folder / "run", running, seen)
            if row:
                fault_at = min(fault_at, time.monotonic()) if not setup.small else fault_at
                counts = {name: faults[name] for name in _FAULTS}
                yield {"minutes": (until - begun) / 60, **row, **counts, **orphans.figures()}
            if until - begun >= 60 * setup.minutes:
                return


_FAULTS = ("resets", "outages", "kills", "stops", "nodes")


class _Orphans:
    """Client processes whose SuperNode was killed, and how long they live on."""

    def __init__(self) -> None:
        self._living: dict[psutil.Process, float] = {}  # since when
        self._count, self._longest = 0, 0.0

    def note(self, clients: Sequence[psutil.Process]) -> None:
        """They lose their SuperNode now."""
        self._living |= dict.fromkeys(clients, time.monotonic())
        self._count += len(clients)

    def look(self) -> None:
        """See who still lives."""
        now = time.monotonic()
        for process, since in list(self._living.items()):
            self._longest = max(self._longest, now - since)
            if not _lives(process):
                del self._living[process]

    def figures(self) -> dict[str, float]:
        """As in a row."""
        return {"orphans": self._count, "orphan_s": self._longest}


def _fault(
    dice: random.Random, faults: Counter[str], running: Deployment, relay: Relay, orphans: _Orphans
) -> Undo | None:
    """Do something bad; returns what undoes it, if anything does."""
    what, node = dice.choice(_FAULTS), dice.choice(running.nodes)
    faults[what] += 1
    if what == "resets":
        relay.cut()
    elif what == "outages":
        relay.refuse()
        return relay.admit
    elif what == "nodes":
        orphans.note(_clients(node.pid))
        node.kill()  # and is started anew below
    else:
        clients = _clients(node.pid)
        for client in clients[:1]:
            with suppress(psutil.NoSuchProcess):
                if what == "kills":
                    client.kill()
                else:
                    client.suspend()
                    return lambda: _resume(client)
    return None


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.resume()


def _clients(node: int) -> list[psutil.Process]:
    """The client processes of a node."""
    with suppress(psutil.NoSuchProcess):
        return [each for each in psutil.Process(node).children(recursive=True) if _is(each, "clientapp")]
    return []


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is(process: psutil.Process, name: str) -> bool:
    with suppress(psutil.Error):
        return name in " ".join(process.cmdline())
    return False


def _is_client_of(running: Deployment, process: psutil.Process) -> bool:
    """Whether a process is a client of this deployment, also if the node that started it is gone: it has its home."""
    with suppress(psutil.Error):
        return _is(process, "clientapp") and running.folder in Path(process.environ().get("FLWR_HOME", "")).parents
    return False


def _row(folder: Path, running: Deployment, seen: float) -> tuple[Row | None, float]:
    """The figures now, where a round has been finished, and the time of the last one."""
    events = read_events(folder / EVENTS_FILE)[0] if (folder / EVENTS_FILE).exists() else []
    ended = [event for event in events if event["kind"] == "round_finished"]
    servers = [
        each for each in psutil.Process(running.superlink.pid).children(recursive=True) if _is(each, "serverapp")
    ]
    if not ended or not servers:
        return None, seen
    server = max(servers, key=lambda each: each.memory_info().rss)
    times = [event["time"] for event in ended]
    latest = [after - before for before, after in itertools.pairwise(times) if after > seen]
    clients = sum(event["kind"] == "client_finished" for event in events)
    with server.oneshot():
        return {
            "rounds": len(ended),
            "repeated": sum("is repeated" in str(event.get("text")) for event in events),
            "clients_a_round": clients / len(ended),
            "s_a_round": sorted(latest)[len(latest) // 2] if latest else float("nan"),
            "server_mb": server.memory_info().rss / 1e6,
            "descriptors": server.num_fds(),
            "threads": server.num_threads(),
            "client_processes": sum(_is_client_of(running, each) for each in psutil.process_iter()),
        }, times[-1]


class _Started:
    """The run, which is interrupted in the end."""

    def __init__(self, command: Sequence[str], running: Deployment) -> None:
        self._command, self._running = command, running

    def __enter__(self) -> subprocess.Popen[bytes]:
        with (self._running.folder / "run.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=PROJECT, env=dict(self._running.env), stdout=log, stderr=subprocess.STDOUT
            )
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()


def _cause(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return str(json.loads((folder / "run" / "summary.json").read_text()).get("error"))
    return "it said nothing"
