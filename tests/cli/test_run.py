"""The launcher with real Flower and real Ray, on an app that does next to nothing."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from hsplitlora_flwr.cli import superlink
from hsplitlora_flwr.cli.interrupts import ENDING
from hsplitlora_flwr.cli.launch import launch, run_config_toml
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.settings import PROJECT
from hsplitlora_flwr.cli.superlink import RunStatus, SuperLinkError, open_superlink
from hsplitlora_flwr.cli.verdict import failure_cause
from hsplitlora_flwr.cli.watch import Watch
from hsplitlora_flwr.config import Config, render_pyproject_block
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.reporting import RunConsole

PYPROJECT = """
[project]
name = "tiny"
version = "0.1.0"
description = "an app for the launcher's tests"
license = { text = "Apache-2.0" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"

"""

# What it does is said in data.group_field, which the launcher carries and does not read.
APP = """
import json, os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid, context):
    config = context.run_config
    folder, task = Path(config["run.dir"]), config["data.group_field"]

    def emit(kind, **fields):
        with open(folder / "events.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\\n")

    emit("status", text="the tiny app runs")
    while len(nodes := list(grid.get_node_ids())) < config["clients.count"]:
        time.sleep(0.1)
    emit("status", text=f"{len(nodes)} nodes are here")
    if task == "crash":
        (folder / "checkpoints" / "round-3").mkdir(parents=True)
        raise RuntimeError("the server has no more ideas")
    if task == "hang":
        time.sleep(600)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            emit("failed", error=f"a client failed: {reply.error.reason.strip().splitlines()[-1]}")
            raise SystemExit(1)
        emit("status", text=f"the client works in {reply.content['answer']['cwd']}")
    (folder / "adapter.bin").write_bytes(b"")
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "results": ["adapter.bin"]}))
    emit("finished", folder=str(folder), results=["adapter.bin"], perplexity_before=9.0, perplexity_after=3.0)


@client.train()
def train(message, context):
    if context.run_config["data.group_field"] == "client-crash":
        raise ValueError("the client has no such block")
    return Message(RecordDict({"answer": ConfigRecord({"cwd": os.getcwd()})}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT + render_pyproject_block())
    (folder / "tiny" / "__init__.py").touch()
    (folder / "tiny" / "app.py").write_text(APP)
    return folder


def settings(folder: Path, task: str) -> Config:
    """One client; ``task`` tells the tiny app what to do."""
    config = Config()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder)),
        data=dataclasses.replace(config.data, group_field=task),
        clients=dataclasses.replace(config.clients, count=1),
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of the living processes of Flower and Ray that were started with ``folder`` in their command,
    their working directory or their open files: the SuperLink's, SuperExec's, the run's, Ray's."""
    found = []
    for process in psutil.process_iter():
        try:
            places = [*process.cmdline(), process.cwd(), *(file.path for file in process.open_files())]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in place for place in places):
            found.append(" ".join(process.cmdline()))
    return found


def test_an_open_superlink_carries_one_run_after_another_and_stays_open(app, tmp_path, capsys):
    ends = {}
    opening = open_superlink("", app, tmp_path / "superlink.log")
    with opening as superlink, RunConsole(Console(force_terminal=False)) as console:
        for task in ("crash", "client-crash", "succeed"):
            cpus = all_cores() + 1  # more than there are: only with `cpus` does Ray have room for a client
            launcher = Launcher(client_cpus=cpus, cpus=cpus)
            status = launch(settings(tmp_path / task, task), app, launcher, console, superlink)
            ends[task] = status, capsys.readouterr().out.splitlines()
            assert "stopping Flower" not in "\n".join(ends[task][1])
            assert processes_of(app), "the SuperLink is gone"
    assert processes_of(tmp_path) == []

    status, lines = ends["crash"]
    assert status == 1 and lines[-1] == "RuntimeError: the server has no more ideas"
    assert any("in main" in line for line in lines[-4:])
    kept = f"round 3 is kept; the same command with run.resume={tmp_path / 'crash'} and a new run.dir goes on"
    assert kept in lines
    status, lines = ends["client-crash"]
    assert status == 1 and lines[-1].startswith("failed: a client failed: ")
    assert "the client has no such block" in lines[-1] and not any("is kept" in line for line in lines)
    status, lines = ends["succeed"]
    assert status == 0 and "the tiny app runs" in lines
    assert f"the client works in {app}" in lines  # the code that the client imports is the project's
    assert "finished  perplexity 9.00 → 3.00" in lines
    assert f"results in {tmp_path / 'succeed'}" in lines


def ray(folder: Path, machine: str, *arguments: str) -> None:
    """Start Ray on a machine: processes that work in a folder of their own and keep their files in ``folder``."""
    (folder / machine).mkdir()
    env = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    command = [str(Path(sys.executable).parent / "ray"), *arguments]
    subprocess.run(command, cwd=folder / machine, env=env, check=True, capture_output=True, timeout=600)


@pytest.fixture
def ray_cluster() -> Iterator[tuple[str, Path]]:
    """The address of a cluster of two machines, and the folder of the one that has CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
    try:
        port = address.rpartition(":")[2]
        ray(folder, "first", "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", *common)
        ray(folder, "second", "start", f"--address={address}", "--num-cpus=1", *common)
        yield address, folder / "second"
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(folder) in part for part in process.info["cmdline"] or []):
                with suppress(psutil.Error):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_clients_are_simulated_on_the_machines_of_a_ray_cluster(app, tmp_path, capsys, ray_cluster, monkeypatch):
    address, machine = ray_cluster
    monkeypatch.setenv("PYTHONPATH", str(app))  # the app's code is installed on every machine
    launcher = Launcher.from_mapping({"ray_address": address})
    with RunConsole(Console(force_terminal=False)) as console:
        status = launch(settings(tmp_path / "run", "succeed"), app, launcher, console)
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, lines
    assert f"the client works in {machine}" in lines
    assert "stopping Flower" in "\n".join(lines)
    assert processes_of(tmp_path) == [], "nothing but the cluster is left running"


def test_clients_whose_steps_take_turns_are_simulated_at_the_same_time_where_memory_holds_them(monkeypatch):
    cores = all_cores()
    count = cores + 3

    def config(**values):
        return Config.from_run_config({"clients.count": count, "clients.memory_gb": "1.0,2.0"} | values)

    def available(gigabytes):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=gigabytes * 1e9))

    launcher, needed = Launcher(), sum(1.0 + index % 2 for index in range(count))
    available(needed / 0.8 + 0.1)
    assert f"init-args-num-cpus={count}" in launcher.federation(config())
    assert launcher.in_order(config()) == config()
    available(needed / 0.8 - 0.1)
    assert f"init-args-num-cpus={cores}" in launcher.federation(config())
    assert launcher.in_order(config()).server.order == "arrival"
    # nobody waits for anybody
    for others in ({"server.half": "per_client"}, {"method.name": "fedit"}, {"transport.kind": "messages"}):
        assert launcher.in_order(config(**others)) == config(**others)
        assert f"init-args-num-cpus={cores}" in launcher.federation(config(**others))
    for elsewhere in (Launcher(ray_address="host:1"), Launcher(superlink="hospital")):  # which knows what it has
        assert elsewhere.in_order(config()) == config()
        assert "init-args-num-cpus" not in elsewhere.federation(config())
    assert Launcher(cpus=count).in_order(config()) == config()


def test_where_a_round_has_more_clients_than_there_are_workers_no_message_outlasts_its_task():
    def config(**values):
        return Config.from_run_config({"clients.count": 6, "train.rounds_per_message": 0} | values)

    few = Launcher(cpus=4, client_cpus=2)
    assert few.with_workers(config()).train.rounds_per_message == 1
    for fits in ({"clients.per_round": 2}, {"clients.fraction": 0.3}, {"transport.kind": "messages"}):
        assert few.with_workers(config(**fits)) == config(**fits)
    assert few.with_workers(config(**{"method.name": "fedit"})) == config(**{"method.name": "fedit"})
    assert Launcher(superlink="hospital").with_workers(config()) == config()


RESULTS = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
COMPLETED = RunStatus("finished:completed", "N/A")
FINISHED = {"kind": "finished"}
LOG = """\x1b[92mINFO \x1b[0m:      Starting
Traceback (most recent call last):
  File "first.py", line 1, in first
ValueError: an earlier one
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  File "app.py", line 176, in __call__
    self._main(grid, context)
  File "tiny.py", line 13, in main
    raise RuntimeError("boom")
    ^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: boom
and why
\x1b[91mERROR \x1b[0m:     Exit Code: 700
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run folder with everything that a finished run leaves."""
    (tmp_path / "adapter").mkdir()
    for name in RESULTS:
        (tmp_path / name).touch()
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "results": RESULTS}))
    (tmp_path / "flwr.log").write_text(LOG)
    return tmp_path


def test_a_run_with_all_its_results_has_no_cause_of_failure(finished):
    assert failure_cause(finished, COMPLETED, FINISHED) == ""


@pytest.mark.parametrize("name", RESULTS)
def test_a_run_without_a_result_has_failed(finished, name):
    (finished / name).unlink()
    assert failure_cause(finished, COMPLETED, FINISHED) == f"the run finished without writing {name}"


def test_a_run_without_a_good_summary_has_failed(finished):
    (finished / "summary.json").write_text('{"status": "running"}')
    assert failure_cause(finished, COMPLETED, FINISHED).endswith("summary.json says 'running'")
    (finished / "summary.json").write_text('{"status": ')
    assert "no readable summary.json" in failure_cause(finished, COMPLETED, FINISHED)
    (finished / "summary.json").unlink()
    assert "no readable summary.json" in failure_cause(finished, COMPLETED, FINISHED)


def test_a_run_that_says_nothing_at_the_end_has_failed(finished):
    assert "no 'finished' event" in failure_cause(finished, COMPLETED, None)


def test_the_cause_is_the_end_of_the_last_traceback(finished):
    cause = failure_cause(finished, RunStatus("finished:failed", "N/A"), None).splitlines()
    assert cause[0] == "Flower says finished:failed"
    assert cause[1].strip() == 'File "tiny.py", line 13, in main'
    assert cause[-2:] == ["RuntimeError: boom", "and why"]


def test_the_cause_is_the_exception_that_led_to_the_last_one(finished):
    (finished / "flwr.log").write_text(
        LOG + "ERROR :     Simulation raised an exception\n"
        "Traceback (most recent call last):\n"
        '  File "ray.py", line 5, in init_ray\n    ray.init()\n    ^^^^^^^^^^\n'
        "ValueError: the raylet is too tired\n" + "".join(f"  and detail {i}\n" for i in range(100)) + "\n"
        "The above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "vce.py", line 7, in run\n    raise RuntimeError\n'
        "RuntimeError: Simulation Runtime crashed.\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "sim.py", line 9, in loop\n    raise RuntimeError\n'
        "RuntimeError: An error was encountered. Ending simulation.\n"
    )
    cause = failure_cause(finished, RunStatus("finished:failed", "N/A"), None).splitlines()
    assert "ValueError: the raylet is too tired" in cause
    assert not any("RuntimeError" in line for line in cause) and len(cause) < 12


def test_the_cause_is_the_end_of_the_log_where_no_traceback_is(finished):
    (finished / "flwr.log").write_text("one\n╭─ Error ───╮\n│ no such app │\n╰───────────╯\n")
    assert failure_cause(finished, RunStatus("not started", ""), None).splitlines()[-1].strip() == "no such app"


def test_what_the_app_says_about_its_failure_counts_most(finished):
    said = {"kind": "failed", "error": "no client has memory for a block"}
    assert failure_cause(finished, RunStatus("finished:failed", "N/A"), said) == "no client has memory for a block"
    assert failure_cause(finished, COMPLETED, said) == "no client has memory for a block"


def test_a_run_that_was_killed_says_so(finished):
    status = RunStatus("finished:failed", "No heartbeat received from the task")
    assert "killed it for lack of memory" in failure_cause(finished, status, None)


class Flower:
    """Answers questions about a run, or takes its time, or refuses."""

    def __init__(self) -> None:
        self.said: RunStatus | SuperLinkError | None = None
        self.asked = self.dropped = 0

    def ask(self, run_id: str) -> "Flower":
        self.asked += 1
        return self

    def answer(self) -> RunStatus | None:
        if isinstance(self.said, SuperLinkError):
            raise self.said
        return self.said

    def drop(self) -> None:
        self.dropped += 1


@pytest.fixture
def watched() -> tuple[Flower, Watch, Callable[[float], None]]:
    """A run on a Flower of ours, and a function that lets seconds pass."""
    clock = SimpleNamespace(now=0.0)
    flower = Flower()
    watch = Watch(flower, lambda: clock.now)

    def passes(seconds: float, ended: bool = False) -> None:
        for _ in range(round(seconds)):
            clock.now += 1.0
            watch.look("1", ended)

    return flower, watch, passes


def test_slow_answers_are_no_death(watched):
    flower, watch, passes = watched
    passes(3600.0)
    assert not watch.status.over and 1 < flower.asked < 30 and flower.dropped == flower.asked - 1
    flower.said = COMPLETED
    passes(2.0)
    assert watch.status == COMPLETED


def test_a_run_that_is_heard_of_is_not_asked_about(watched):
    flower, watch, passes = watched
    for _ in range(100):
        passes(10.0)
        watch.heard()
    assert flower.asked == 0
    passes(3.0, ended=True)
    assert flower.asked == 1, "a log that has ended tells nothing any more"


def test_refusals_are_no_death_while_the_run_is_heard_of(watched):
    flower, watch, passes = watched
    flower.said = SuperLinkError("connection refused")
    for _ in range(20):
        passes(120.0)
        watch.heard()
    with pytest.raises(SuperLinkError, match="connection refused"):
        passes(600.0)


def test_the_run_config_survives_toml(tmp_path):
    config = settings(tmp_path / 'a "quoted" - folder', "back\\slash")
    assert Config.from_run_config(flatten(tomllib.loads(run_config_toml(config)))) == config


def flatten(tables: dict[str, dict[str, object]]) -> dict[str, object]:
    return {f"{section}.{name}": value for section, table in tables.items() for name, value in table.items()}


LAUNCHER = """
import signal
import sys
from pathlib import Path
from hsplitlora_flwr.reporting import RunConsole
from hsplitlora_flwr.cli import run
from hsplitlora_flwr.cli.interrupts import ENDING, interruptible
from tests.cli.test_run import settings

for number in ENDING:
    signal.signal(number, signal.SIG_DFL)  # as it is without nohup
interruptible()
run.launch(settings(Path(sys.argv[1]), "hang"), Path(sys.argv[2]), run.Launcher(), RunConsole())
"""


@contextmanager
def launching(app: Path, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The launcher on a run that hangs; it prints what it shows."""
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", LAUNCHER, str(folder), str(app)]
    with subprocess.Popen(command, env=env, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        yield process


def until(process: "subprocess.Popen[str]", text: str) -> None:
    """Read what a process prints until it says ``text``."""
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line, "the launcher ended early"


def test_a_run_that_is_interrupted_says_how_to_go_on_and_leaves_no_process(app, tmp_path):
    folder = tmp_path / "run"
    with launching(app, folder) as launcher:
        until(launcher, "nodes are here")
        (folder / "summary.json").write_text(json.dumps({"status": "running", "started": time.time()}))
        (folder / "checkpoints" / "round-2").mkdir(parents=True)
        assert len(processes_of(app)) > 3  # or the search at the end would prove nothing
        launcher.send_signal(signal.SIGTERM)
        until(launcher, "stopping")
        launcher.send_signal(signal.SIGINT)  # an impatient user does not get in the way
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 143
    assert processes_of(tmp_path) == []
    assert f"round 2 is kept; the same command with run.resume={folder} and a new run.dir goes on" in output
    cause = "interrupted by SIGTERM; everything that was started is stopped"
    assert output.splitlines()[-1] == f"failed: {cause}"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", cause)


def test_a_start_that_is_interrupted_leaves_no_process(app, tmp_path):
    with launching(app, tmp_path / "run") as launcher:
        until(launcher, "starting Flower")
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 130
    assert processes_of(tmp_path) == []
    assert "the same command starts anew" in output and "interrupted by SIGINT" in output


@pytest.mark.parametrize("number", ENDING)
def test_before_flower_starts_an_interrupted_run_says_so(number, tmp_path):
    code = (
        f"import signal, sys; signal.signal({int(number)}, signal.SIG_DFL)  # as it is without nohup\n"
        "from hsplitlora_flwr.cli import run\n"
        "run.prepare_apart = lambda *settings, **more: (print('preparing', flush=True), sys.stdin.read())\n"
        f"sys.argv = ['run', 'run.dir={tmp_path / 'run'}']\nrun.command()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, text=True, **pipes) as launcher:
        until(launcher, "preparing")
        launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 128 + number
    assert errors.strip() == (
        f"interrupted by {number.name} before Flower was started; the same command starts the run"
    )
    assert not (tmp_path / "run").exists()


def test_a_superlink_that_is_killed_ends_the_run_and_leaves_no_process(app, tmp_path):
    folder = tmp_path / "run"
    with launching(app, folder) as launcher:
        until(launcher, "nodes are here")
        below = psutil.Process(launcher.pid).children()
        [superlink] = [child for child in below if any("flower-superlink" in part for part in child.cmdline())]
        superlink.kill()
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0  # of the script, which passes no status on
    assert processes_of(tmp_path) == []
    log = folder / "superlink.log"
    assert output.splitlines()[-1] == f"failed: the SuperLink ended with status -9; its whole log is {log}"


def test_without_ray_no_superlink_is_started(app, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(superlink, "find_spec", lambda name: None)
    with RunConsole(Console(force_terminal=False)) as console:
        assert launch(settings(tmp_path / "run", "succeed"), app, Launcher(), console) == 1
    assert "pip install 'hsplitlora-flwr[simulation]'" in capsys.readouterr().out
    assert not (tmp_path / "run" / "superlink.log").exists()


def test_a_launcher_that_is_killed_leaves_no_process(app, tmp_path):
    folder = tmp_path / "run"
    with launching(app, folder) as launcher:
        until(launcher, "nodes are here")
        (folder / "summary.json").write_text(json.dumps({"status": "running", "started": time.time()}))
        children = psutil.Process(launcher.pid).children(recursive=True)
        assert any("guard.py" in part for child in children for part in child.cmdline())
        launcher.kill()
        launcher.communicate(timeout=300)
    _, alive = psutil.wait_procs(children, timeout=300)
    assert alive == []
    assert processes_of(tmp_path) == []
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == (
        "failed",
        "the launcher was killed; everything that it had started is stopped",
    )


def test_a_superlink_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(superlink, "_free_port", lambda: 70000)  # no such port
    opening = open_superlink("", tmp_path, tmp_path / "superlink.log")
    with pytest.raises(SuperLinkError, match=r"did not start \(ended with status"), opening:
        pass


def test_bad_settings_have_status_2_and_one_line(tmp_path):
    for override, text in {
        "train.rounds=0": "error: train.rounds=0 is out of range; it must be at least 1",
        "data=e2e": "error: data.path is empty; data.source=e2e needs the path of its files",
        "launcher.client_cpus=0": "error: launcher.client_cpus=0 is out of range; it must be at least 1",
        "launcher.superlink=nowhere": "error: launcher.superlink=nowhere is not in your Flower configuration",
        "train.micro_batch_size=9": "error: train.micro_batch_size=9 is above train.batch_size=8",
        "launcher.cpus=-1": "error: launcher.cpus=-1 is out of range; it must be at least 0",
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "simulations.run", override, f"run.dir={tmp_path / 'run'}"],
            cwd=PROJECT,
            env={**os.environ, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"},  # as in notebooks: Flower's answers are read
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(text) and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_run_folder_is_used_once(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished"}))
    command = [sys.executable, "-m", "simulations.run", f"run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr


def test_a_run_folder_that_cannot_be_is_told_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "simulations.run", f"run.dir={tmp_path / 'file' / 'run'}", "model.path=nowhere"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: run\.dir=.* cannot be written: .*; name another folder\n", done.stderr)
