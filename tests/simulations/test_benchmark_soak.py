"""What the soak counts on a machine that has other things to do."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from simulations.benchmarks import soak


def test_client_processes_are_those_of_the_deployment(tmp_path: Path) -> None:
    deployment: Any = SimpleNamespace(folder=tmp_path / "nodes")
    started = {
        "a client": ("flwr-clientapp", tmp_path / "nodes" / "home0"),
        "another deployment's": ("flwr-clientapp", tmp_path / "others" / "home0"),
        "a node": ("flower-supernode", tmp_path / "nodes" / "home0"),
    }
    counted = []
    with ExitStack() as running:
        for name, (program, home) in started.items():
            process = running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", program],
                    env=os.environ | {"FLWR_HOME": str(home)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            assert process.stdout and process.stdout.readline()  # it has its own command line now
            if soak._is_client_of(deployment, psutil.Process(process.pid)):
                counted.append(name)
    assert counted == ["a client"]
