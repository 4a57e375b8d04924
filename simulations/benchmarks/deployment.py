"""``start`` and ``deployment``: what a client does before its first step, and SuperNodes beside simulated clients."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsplitlora_flwr.cli.settings import PROJECT
from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.reporting import read_events
from hsplitlora_flwr.reporting.events import EVENTS_FILE, Event
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.stream import StreamServer
from simulations.benchmarks.common import Row, Sample, Setup, specs
from simulations.deployment import CONNECTION, deploy

STARTS = 7
RUNS = 3
"""Of a deployment and of a simulation each."""
MEMORY_GB = (1.3, 1.7, 2.2)
SETTINGS: dict[str, int | str] = {
    "clients.count": len(MEMORY_GB),
    "method": "hsplitlora-no-armsc",  # the same cut and rank for all, so both sides have the same work
    "train.rounds": 3,
    "train.steps": 20,
    "train.batch_size": 4,
    "data.eval_rows": 10,
}


def start(setup: Setup) -> Iterator[Row]:
    """From the start of a client process to its open stream, part by part, for a split after a third of the blocks.

    Flower starts a process for every message of a deployment; a simulation keeps its own. Medians and distances between
    quartiles over processes one after another; files are in the system's cache from the first one on. See
    :mod:`simulations.benchmarks.starting` for the parts.
    """
    base = SharedBase(setup.model)
    split = max(int(base.model.config.num_hidden_layers) // 3, 1)
    part = base.server_part(split).train()
    adapters = inject(part, specs(name for name, _ in part.linears()), "")
    handler = ServerTrainer(part, OwnHalf(AdapterOptimizer(adapters, TrainConfig())))
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    task = {"path": setup.model, "split": split, "endpoint": asdict(stream.endpoint)}
    try:
        runs = [_start({**task, "token": stream.admit(handler)}) for _ in range(STARTS + 1)][1:]
    finally:
        stream.stop()
    runs = [{**parts, "in all": sum(parts.values())} for parts in runs]
    for name in runs[0]:
        seconds = Sample([parts[name] for parts in runs])
        yield {"part": name, "seconds": seconds.median, "spread_s": seconds.spread}


def _start(task: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by part of one process."""
    command = [sys.executable, "-m", "simulations.benchmarks.starting"]
    given = json.dumps({**task, "begun": time.time()})
    done = subprocess.run(command, cwd=PROJECT, input=given, capture_output=True, text=True, check=True)
    parts: dict[str, float] = json.loads(done.stdout)
    return parts


def deployment(setup: Setup) -> Iterator[Row]:
    """One job in a simulation and on a deployment, there with a message of Flower's for every task and with one for all
    rounds, which take turns: three clients, cut after a third of the blocks.

    Processes of a simulation are larger, which would give its clients other plans; so split and rank are fixed, and the
    budgets, 1.3, 1.7 and 2.2 GB, hold them. The deployment is a SuperLink and a SuperNode for each client on this
    machine, with TLS and node authentication. The simulation has as many client processes at the same time, whatever
    the number of cores.

    - ``s_per_step``: time of a step of one client beside the others, while all clients of a round train; goal:
      ``/ simulation``, turn by turn, at most 1.10.
    - ``before_s``: what a client does between the message and its first step: text, weights, the update so far, stream.
    - ``around_s``: the rest of the time from the message to the reply: Flower, processes, imports.

    These two are medians over clients and rounds of a turn.

    - ``first_round_s``: from the start of the run to the end of the first round: start-up is counted here.
    - ``fixed_s``: what a later round takes besides its steps: planning, scoring, messages, aggregation; median over
      rounds and turns so far. Goal: below 1 s with one message.
    """
    split = max(int(read_config(setup.model).num_hidden_layers) // 3, 1)
    wanted = {**SETTINGS, "model.path": setup.model, "split.point": split}
    if setup.data:
        wanted |= {"data": "e2e", "data.path": str(Path(setup.data).absolute())}
    nodes = [
        (f"partition-id={index} num-partitions={len(MEMORY_GB)} memory-gb={budget}", dict[str, str]())
        for index, budget in enumerate(MEMORY_GB)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with deploy(folder / "nodes", nodes) as running:
            env = dict(running.env)
            budgets = f"clients.memory_gb='{','.join(map(str, MEMORY_GB))}'"
            there = [f"launcher.superlink={CONNECTION}", "transport.address=127.0.0.1"]
            sides = {
                "simulation": [budgets, f"launcher.cpus={max(len(MEMORY_GB), all_cores())}"],
                "deployment, a message a task": [*there, "train.rounds_per_message=1"],
                "deployment, one message": [*there, "train.rounds_per_message=0"],
            }
            arguments = [f"{key}={value}" for key, value in wanted.items()]
            fixed: dict[str, list[float]] = {way: [] for way in sides}
            for turn in range(RUNS):
                simulated = 0.0
                for way, own in sides.items():
                    run = folder / f"{way}{turn}"
                    _launch([*arguments, *own, f"run.dir={run}"], env)
                    rounds = json.loads((run / "summary.json").read_text())["rounds"]
                    clients = [client for each in rounds for client in each["clients"]]
                    events = read_events(run / EVENTS_FILE)[0]
                    step_s = seconds_of_a_step(events)
                    first, later = seconds_besides_steps(events)
                    fixed[way] += later
                    simulated = simulated or step_s
                    yield {
                        "way": way,
                        "turn": turn + 1,
                        "s_per_step": step_s,
                        "/ simulation": step_s / simulated,
                        "before_s": Sample([client["seconds_before"] for client in clients]).median,
                        "around_s": Sample([client["seconds_around"] for client in clients]).median,
                        "first_round_s": first,
                        "fixed_s": Sample(fixed[way]).median,
                    }


def _launch(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "simulations.run", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=dict(env), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def seconds_besides_steps(events: Sequence[Event]) -> tuple[float, list[float]]:
    """Time until the first round was finished, and what every later one took besides its steps.

    Steps last from the first to the last of a round, as they are told when they are done, and one step more, as long as
    those were on average. Between two rounds the server measures the model, which is part of neither.
    """
    steps: dict[int, list[float]] = {}
    ended, measured = dict[int, float](), dict[int, float]()
    for event in events:
        if event["kind"] == "step":
            steps.setdefault(event["round"], []).append(event["time"])
        elif event["kind"] == "round_finished":
            ended[event["round"]] = event["time"]
        elif event["kind"] == "evaluated":
            measured[event["round"]] = event["time"]
    besides = []
    for number in sorted(ended)[1:]:
        times = steps[number]
        training = (max(times) - min(times)) * len(times) / (len(times) - 1)
        besides.append(ended[number] - measured[number - 1] - training)
    return ended[1] - events[0]["time"], besides


def seconds_of_a_step(events: Sequence[Event]) -> float:
    """Time of a step of one client beside the others: while all clients of a round train, over all rounds.

    The clients' number x that time / the steps that all of them took in it.

    Raises
    ------
    ValueError
        If there was no such time in any round.
    """
    rounds: dict[int, dict[str, list[float]]] = {}
    for event in events:
        if event["kind"] == "step":
            rounds.setdefault(event["round"], {}).setdefault(event["client"], []).append(event["time"])
    steps, seconds = 0, 0.0
    for clients in rounds.values():
        begin, end = max(min(times) for times in clients.values()), min(max(times) for times in clients.values())
        if begin < end:
            steps += sum(begin < time <= end for times in clients.values() for time in times)
            seconds += len(clients) * (end - begin)
    if not steps:
        raise ValueError("in no round did all clients train at the same time; more steps would help")
    return seconds / steps
