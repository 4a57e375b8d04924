"""A SuperLink to run on: one of our own that lives as long as the run, or one that the user keeps.

Flower's own local SuperLink stays behind after a run, on a fixed port, with the Python path and the environment of
whoever started it first. Ours has a free port, a private ``FLWR_HOME``, the code of the project, and at the end it
takes everything that it started with it, Ray included.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 60.0
_CONNECTION = "hsplitlora"

# Ray's longest socket path below its folder is 68 bytes, mkdtemp adds 13, and macOS allows 103 in all.
_LONGEST_TEMP_DIR = 22


class SuperLinkError(RuntimeError):
    """The SuperLink did not start, or does not answer any more. The text holds the last lines of its log."""


@dataclass(frozen=True)
class RunStatus:
    """What Flower says about a run: ``finished:completed``, ``running``, ..., and its reason where it has one."""

    text: str
    details: str

    @property
    def over(self) -> bool:
        return self.text.startswith("finished")


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink as ``flwr`` sees it: a connection of the Flower configuration, and the environment that holds it."""

    connection: str
    env: Mapping[str, str]
    cwd: Path
    own: bool  # ends with us, and all its runs with it

    @contextmanager
    def stream(self, app: Path, run_config: Path, federation: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start a run of ``app``; its log streams into the file ``log`` while the returned process lives."""
        command = ["flwr", "run", str(app), self.connection, "--stream"]
        command += ["--run-config", str(run_config), "--federation-config", federation]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C is ours to handle, in order.
            process = subprocess.Popen(
                command,
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.kill()  # it only shows logs: the run itself lives in the SuperLink
            process.wait()

    def status(self, run_id: str) -> RunStatus:
        """Ask for the state of a run.

        Raises
        ------
        SuperLinkError
            If there is no answer.
        """
        try:
            answer = self._flwr("ls", self.connection, "--run-id", run_id, "--format", "json")
            run = json.loads(answer)["runs"][0]
        except (subprocess.SubprocessError, ValueError, LookupError) as error:
            raise SuperLinkError(f"the SuperLink '{self.connection}' does not answer 'flwr ls': {error}") from error
        return RunStatus(run["status"], run["status-details"])

    def stop(self, run_id: str) -> None:
        """Stop a run, as far as the SuperLink still can."""
        with suppress(subprocess.SubprocessError):  # it is over already, or the SuperLink is gone
            self._flwr("stop", run_id, self.connection)

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["flwr", *arguments], env=self.env, cwd=self.cwd, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout


def started_run(log: Path) -> str | None:
    """The id of the run whose ``flwr run`` writes ``log``; None while it has not started."""
    found = re.search(r"Successfully started run (\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


@contextmanager
def open_superlink(connection: str, cwd: Path, log: Path, ray_address: str = "") -> Iterator[SuperLink]:
    """Use the user's ``connection``, or, if it is empty, a SuperLink of our own.

    Parameters
    ----------
    connection : str
        A name of the user's Flower configuration, or "".
    cwd : Path
        Where the SuperLink starts. Ray's workers import from there first, so it is the folder with the app's code.
    log : Path
        The log of our own SuperLink.
    ray_address : str
        The Ray cluster on which our own SuperLink simulates clients; "" for one of its own, on this machine.

    Raises
    ------
    SuperLinkError
        If our own SuperLink does not start.
    """
    if connection:
        yield SuperLink(connection, _environment(), cwd, own=False)
        return
    home = Path(tempfile.mkdtemp(prefix="hsl-", dir=_short_temp_dir()))
    try:
        port = _free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        # Ray keeps its sockets and logs, and looks for running clusters, below RAY_TMPDIR.
        env = {**_environment(), "FLWR_HOME": str(home), "RAY_TMPDIR": str(home)}
        env.pop("RAY_ADDRESS", None)
        if ray_address:
            env["RAY_ADDRESS"] = ray_address
        with _process(port, env, cwd, log):
            yield SuperLink(_CONNECTION, env, cwd, own=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _process(port: int, env: Mapping[str, str], cwd: Path, log: Path) -> Iterator[None]:
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log)
        yield
    finally:
        with _undisturbed():
            _stop_all(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    # No proxy: the address is this machine, whatever the environment says about the rest of the world.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    why = f"ended with status {process.poll()}" if process.poll() is not None else f"not up after {START_SECONDS:.0f} s"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
    raise SuperLinkError(f"{tail}\nthe SuperLink did not start ({why}); its whole log is {log}")


def _stop_all(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and whatever it has started: first by asking it, then by asking all, then by force."""
    # Flower and Ray start sessions of their own, and a process whose parent died still belongs to its session.
    sessions = _sessions(process.pid)
    process.terminate()
    psutil.wait_procs(_members(sessions), timeout=3)
    for member in _members(sessions):
        member.terminate()
    psutil.wait_procs(_members(sessions), timeout=3)
    while members := _members(sessions):
        for member in members:
            member.kill()
        psutil.wait_procs(members, timeout=1)
    process.wait()


def _sessions(pid: int) -> set[int]:
    """The sessions of a session leader and of its descendants."""
    sessions = {pid}
    try:
        for child in psutil.Process(pid).children(recursive=True):
            sessions.add(os.getsid(child.pid))
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass  # ended meanwhile
    return sessions


def _members(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of some sessions."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    return members


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM off while processes are being stopped; it takes seconds, not more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    """Our environment, with the programs of this Python first and nothing that calls or installs from outside."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", os.defpath)])
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        # gRPC, over which Flower's parts meet, asks the first of them alone where it is set
        if name in env or name != "no_grpc_proxy":
            env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    # OpenMP threads that spin while they wait make several processes on one machine many times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env | {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # a fresh environment, torch included, for every run
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "COLUMNS": "300",  # `flwr` wraps its errors
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # simulated clients share the GPUs instead of seeing none
    }


def _short_temp_dir() -> str:
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST_TEMP_DIR else "/tmp"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
