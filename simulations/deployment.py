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


@dataclass(frozen=True)
class Deployment:
    """A running deployment: the environment in which ``flwr`` knows it as ``CONNECTION``, and its logs."""

    env: Mapping[str, str]
    folder: Path

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
        stack.enter_context(_process(superlink, env, folder / "superlink.log"))
        _wait_until_healthy(port, certificate, folder / "superlink.log")
        for index, (node_config, surroundings) in enumerate(nodes):
            private = _register(env, folder, index)
            node = ["flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(certificate)]
            node += ["--auth-supernode-private-key", str(private), "--port", str(free_port())]
            node += ["--node-config", f'{node_config} state-dir="{folder / f"node{index}"}"']
            own = {**env, "FLWR_HOME": str(folder / f"home{index}"), **surroundings}
            stack.enter_context(_process(node, own, folder / f"node{index}.log"))
        yield Deployment(env, folder)


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


@contextmanager
def _process(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(_PROGRAMS / command[0]), *command[1:]],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)


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
