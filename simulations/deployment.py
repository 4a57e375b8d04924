"""A deployment of Flower on this machine: a SuperLink with TLS that knows its nodes by key, and SuperNodes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from hsplitlora_flwr.transport.certificates import make_identity

CONNECTION = "hospital"
_PROGRAMS = Path(sys.executable).parent


class Program:
    """A program of Flower's in a process of its own, with whatever that starts.

    Parameters
    ----------
    command : Sequence[str]
        With its name first.
    env : Mapping[str, str]
    log : Path
        What it says; a second start goes on there.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._command, self._env, self._log = [str(_PROGRAMS / command[0]), *command[1:]], dict(env), log
        self.start()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether its process is there."""
        return self._process.poll() is None

    def start(self) -> None:
        """Start it anew."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill its process, and nothing that that started."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End all of it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)


@dataclass(frozen=True)
class Deployment:
    """A running deployment.

    Parameters
    ----------
    env : Mapping[str, str]
        In which ``flwr`` knows it as ``CONNECTION``.
    folder : Path
        With its logs.
    superlink : Program
    nodes : Sequence[Program]
        The SuperNodes.
    """

    env: Mapping[str, str]
    folder: Path
    superlink: Program
    nodes: Sequence[Program]

    def logs(self) -> str:
        """The end of every log."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


def flwr(env: Mapping[str, str], *arguments: str) -> str:
    """Run a command of Flower's and return what it prints."""
    command = [str(_PROGRAMS / "flwr"), *arguments]
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def deploy(folder: Path, nodes: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[Deployment]:
    """Start a SuperLink, and a SuperNode for each node configuration and what its environment has besides.

    All end with the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    identity = make_identity("127.0.0.1")
    certificate, key = folder / "superlink.pem", folder / "superlink.key"
    certificate.write_bytes(identity.certificate)
    key.write_bytes(identity.private_key)
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{certificate}"\n'
    )
    env = dict(os.environ) | {
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([str(_PROGRAMS), os.environ.get("PATH", os.defpath)]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "COLUMNS": "300",
        "no_proxy": "127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with ExitStack() as stack:
        superlink = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--isolation", "subprocess"]
        superlink += ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(certificate)]
        superlink += ["--ssl-keyfile", str(key), "--enable-supernode-auth"]
        superlink += ["--disable-runtime-dependency-installation"]
        link, programs = Program(superlink, env, folder / "superlink.log"), list[Program]()
        stack.callback(link.end)
        _wait_until_healthy(port, certificate, folder / "superlink.log")
        for index, (node_config, surroundings) in enumerate(nodes):
            private = _register(env, folder, index)
            node = ["flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(certificate)]
            node += ["--auth-supernode-private-key", str(private), "--port", str(free_port())]
            node += ["--node-config", f'{node_config} state-dir="{folder / f"node{index}"}"']
            own = {**env, "FLWR_HOME": str(folder / f"home{index}"), **surroundings}
            programs.append(Program(node, own, folder / f"node{index}.log"))
            stack.callback(programs[-1].end)
        yield Deployment(env, folder, link, programs)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _register(env: Mapping[str, str], folder: Path, index: int) -> Path:
    """Make a node's key, tell the SuperLink its public half, and return the file of the private one."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"node{index}.key", folder / f"node{index}.key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    flwr(env, "supernode", "register", str(public), CONNECTION)
    return private


def _wait_until_healthy(port: int, certificate: Path, log: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError):
            opener.open(f"https://127.0.0.1:{port}/health", timeout=1).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"the SuperLink did not start: {log.read_text()}")
