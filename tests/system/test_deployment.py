"""A whole run on a real SuperLink with TLS and node authentication, and SuperNodes in processes of their own.

The third node is behind a proxy that lets Flower through and nothing else, as firewalls of hospitals do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.deployment import CONNECTION, Deployment, deploy, free_port
from tests.server.test_strategy import GB, grid_of, run, settings
from tests.system.conftest import PROJECT
from tests.test_transports import adapter, assert_same, train_at_once

SETTINGS = {"plan.probe_every": 0, "train.steps": 1, "transport.bind": "127.0.0.1"}
SETTINGS |= {"server.order": "fixed", "server.patience": 600.0}  # however long a node takes to start
OPEN, BEHIND_A_PROXY = "127.0.0.1", "localhost"
"""Names of the server: one that every node reaches, and one that the third node looks for behind its proxy."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    proxy = {"grpc_proxy": f"http://127.0.0.1:{free_port()}", "no_grpc_proxy": "127.0.0.1"}
    configs = [f"partition-id={index} num-partitions=3 memory-gb={gb}" for index, gb in GB.items()]
    configs[2] += " proxy=true"
    nodes = list(zip(configs, ({}, {}, proxy), strict=True))
    with deploy(tmp_path_factory.mktemp("deployment"), nodes) as running:
        yield running


def test_a_deployment_trains_what_a_simulation_does(deployment: Deployment, tiny_folder: Path, tmp_path: Path) -> None:
    there = {"transport.kind": "auto", "transport.address": BEHIND_A_PROXY, "train.rounds_per_message": 0}
    wanted = settings(tiny_folder, tmp_path / "run", **SETTINGS | there).to_run_config()
    command = [sys.executable, "-m", "simulations.run", f"launcher.superlink={CONNECTION}"]
    command += [f"{key}={json.dumps(value)}" for key, value in wanted.items()]
    done = subprocess.run(command, cwd=PROJECT, env=dict(deployment.env), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{deployment.logs()}"

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [[client["client"] for client in each["clients"]] for each in summary["rounds"]] == 2 * [["0", "1", "2"]]
    goes_on = "going on over messages: "
    assert [goes_on in (deployment.folder / f"node{i}.log").read_text() for i in GB] == [False, False, True]

    here, grid = settings(tiny_folder, tmp_path / "here", **SETTINGS | {"transport.address": OPEN}), grid_of()
    with pytest.MonkeyPatch.context() as patch:
        train_at_once(grid, patch)
        run(here, tmp_path / "here", grid)
    assert_same(adapter(tmp_path / "run"), adapter(tmp_path / "here"))
    secrets = re.compile(r"PRIVATE KEY|BEGIN CERTIFICATE|hsplitlora-token|[\"\']token[\"\']")
    for file in (tmp_path / "run").glob("*.*"):
        assert not secrets.search(file.read_text(errors="replace")), file
    assert not secrets.search(deployment.logs())
    assert not list(deployment.folder.glob("node*/**/*.safetensors")), "nodes keep nothing of a run that is over"
