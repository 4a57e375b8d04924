"""A SuperLink to run on: one of our own that lives as long as the run, or one that the user keeps.

Flower's own local SuperLink stays behind after a run, on a fixed port, with the Python path and the environment of
whoever started it first. Ours has a free port, a private ``FLWR_HOME``, the code of the project, and at the end it
takes everything that it started with it, Ray included, even where we are killed (:mod:`hsplitlora_flwr.cli.guard`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hsplitlora_flwr.cli.guard import HOME, end_all, guarding
from hsplitlora_flwr.cli.interrupts import held, obey
from hsplitlora_flwr.config import ConfigError

START_SECONDS = 60.0
ANSWER_SECONDS = 60.0
_CONNECTION = "hsplitlora"
_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Environment variables that make programs write to files as they do to terminals."""

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


class Question:
    """``flwr ls`` at work, which on a busy machine takes a minute."""

    def __init__(self, connection: str, run_id: str, env: Mapping[str, str], cwd: Path) -> None:
        self._connection = connection
        self._process = subprocess.Popen(
            ["flwr", "ls", connection, "--run-id", run_id, "--format", "json"],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def answer(self) -> RunStatus | None:
        """The state of the run; None while there is no answer.

        Raises
        ------
        SuperLinkError
            If there will be none.
        """
        if self._process.poll() is None:
            return None
        text, errors = self._process.communicate()
        try:
            run = json.loads(text)["runs"][0]
            return RunStatus(run["status"], run["status-details"])
        except (ValueError, LookupError, TypeError):
            said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", f"{text}\n{errors}").split())
            raise SuperLinkError(f"the SuperLink '{self._connection}' does not answer 'flwr ls': {said}") from None

    def drop(self) -> None:
        """Ask no more."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink as ``flwr`` sees it: a connection of the Flower configuration, and the environment that holds it."""

    connection: str
    env: Mapping[str, str]
    cwd: Path
    process: subprocess.Popen[bytes] | None = None  # of our own one, which ends with us, and all its runs with it
    log: Path | None = None

    @property
    def own(self) -> bool:
        return self.process is not None

    def check(self) -> None:
        """Raise :class:`SuperLinkError` if the process of our own has ended."""
        if self.process and self.process.poll() is not None:
            raise SuperLinkError(f"the SuperLink ended with status {self.process.poll()}; its whole log is {self.log}")

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

    def ask(self, run_id: str) -> Question:
        """Ask for the state of a run."""
        return Question(self.connection, run_id, self.env, self.cwd)

    def status(self, run_id: str) -> RunStatus:
        """The state of a run, waited for.

        Raises
        ------
        SuperLinkError
            If there is no answer within :data:`ANSWER_SECONDS`.
        """
        question, deadline = self.ask(run_id), time.monotonic() + ANSWER_SECONDS
        try:
            while time.monotonic() < deadline:
                if answer := question.answer():
                    return answer
                time.sleep(0.1)
        finally:
            question.drop()
        raise SuperLinkError(f"the SuperLink '{self.connection}' took more than {ANSWER_SECONDS:.0f} s to answer")

    def stop(self, run_id: str) -> None:
        """Stop a run, as far as the SuperLink still can."""
        with suppress(subprocess.SubprocessError):  # it is over already, or the SuperLink is gone
            command = ["flwr", "stop", run_id, self.connection]
            subprocess.run(command, env=self.env, cwd=self.cwd, capture_output=True, timeout=60, check=True)


def check_connection(name: str, cwd: Path) -> None:
    """Raise :class:`ConfigError` if the user's Flower configuration has no connection of this name."""
    command = ["flwr", "config", "list", "--format", "json"]
    try:
        asked = subprocess.run(
            command, env=_environment(), cwd=cwd, capture_output=True, text=True, timeout=60, check=True
        )
        listed = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"launcher.superlink={name}: 'flwr config list' does not answer: {error}") from error
    if name not in listed["superlink"]:
        raise ConfigError(
            f"launcher.superlink={name} is not in your Flower configuration, which knows "
            f"{', '.join(listed['superlink']) or 'none'}; add [superlink.{name}], or leave it empty to start one"
        )


def started_run(log: Path) -> str | None:
    """The id of the run whose ``flwr run`` writes ``log``; None while it has not started."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    found = re.search(r"Successfully started run (\d+)", text)
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
        If our own SuperLink does not start, or Ray is missing.
    """
    if connection:
        yield SuperLink(connection, _environment(), cwd)
        return
    if find_spec("ray") is None:
        raise SuperLinkError(
            "clients are simulated by Ray, which is not installed: pip install 'hsplitlora-flwr[simulation]'; or name "
            "a SuperLink with nodes of its own: launcher.superlink=NAME"
        )
    if ray_address:
        _check_ray(ray_address)
    with ExitStack() as stack:
        with held():  # whatever is started is noted as started
            home = Path(tempfile.mkdtemp(prefix="hsl-", dir=_short_temp_dir()))
            stack.callback(shutil.rmtree, home, ignore_errors=True)
            port = _free_port()
            (home / "config.toml").write_text(
                f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
                f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
            )
            # Ray keeps its sockets and logs, and looks for running clusters, below RAY_TMPDIR.
            env = {**_environment(), HOME: str(home), "RAY_TMPDIR": str(home)}
            env.pop("RAY_ADDRESS", None)
            if ray_address:
                env["RAY_ADDRESS"] = ray_address
            process = stack.enter_context(_process(port, env, cwd, log))
        yield SuperLink(_CONNECTION, env, cwd, process, log)


@contextmanager
def _process(port: int, env: Mapping[str, str], cwd: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
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
    with guarding(process.pid, env[HOME], log.parent):
        try:
            _wait_until_healthy(process, port, log)
            yield process
        finally:
            with held():
                end_all(process.pid, env[HOME])
                process.wait()


def _check_ray(address: str) -> None:
    """Ray itself looks for a cluster for minutes, and then says so in a hundred lines."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise SuperLinkError(
            f"no Ray cluster answers at launcher.ray_address={address} ({error}); `ray start --head` begins one"
        ) from None


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    # No proxy: the address is this machine, whatever the environment says about the rest of the world.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        obey()
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    why = f"ended with status {process.poll()}" if process.poll() is not None else f"not up after {START_SECONDS:.0f} s"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
    raise SuperLinkError(f"{tail}\nthe SuperLink did not start ({why}); its whole log is {log}")


def _environment() -> dict[str, str]:
    """Our environment, with the programs of this Python first and nothing that calls or installs from outside."""
    # What Flower's programs answer is read, so it has no colours, whoever asks for them, as notebooks and CI do.
    env = {name: value for name, value in os.environ.items() if name not in _COLOURS}
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
        "NO_COLOR": "1",
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
