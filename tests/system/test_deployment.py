"""Whole runs on a real SuperLink with TLS and node authentication, and SuperNodes in processes of their own.

The third node is behind a proxy that lets Flower through and nothing else, as firewalls of hospitals do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simulations.deployment import CONNECTION, Deployment, deploy, free_port
from tests.system.conftest import PROJECT
from tests.test_strategy import GB, grid_of, run, settings
from tests.test_transports import adapter, assert_same

SETTINGS = {"plan.probe_every": 0, "train.steps": 2, "transport.bind": "127.0.0.1"}
ONE_STEP = {"train.rounds": 1, "method.name": "hsplitlora-no-armsc", "train.steps": 1}
OPEN, BEHIND_A_PROXY = "127.0.0.1", "localhost"
"""Names of the server: one that every node reaches, and one that the third node looks for behind its proxy."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    proxy = {"grpc_proxy": f"http://127.0.0.1:{free_port()}", "no_grpc_proxy": "127.0.0.1"}
    configs = [f"partition-id={index} num-partitions=3 memory-gb={gb}" for index, gb in GB.items()]
    nodes = list(zip(configs, ({}, {}, proxy), strict=True))
    with deploy(tmp_path_factory.mktemp("deployment"), nodes) as running:
        yield running


def launch(deployment: Deployment, tiny_folder: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run on the deployment, with the launcher; returns the summary."""
    wanted = settings(tiny_folder, folder, **SETTINGS | changes).to_run_config()
    command = [sys.executable, "-m", "simulations.run", f"launcher.superlink={CONNECTION}"]
    command += [f"{key}={json.dumps(value)}" for key, value in wanted.items()]
    done = subprocess.run(command, cwd=PROJECT, env=dict(deployment.env), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{deployment.logs()}"
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def here(tiny_folder: Path, folder: Path, **changes: Any) -> None:
    """The same run with the nodes in this process, over the stream."""
    run(settings(tiny_folder, folder, **SETTINGS | changes | {"transport.address": OPEN}), folder, grid_of())


@pytest.fixture(scope="module")
def one_step_here(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one step of every client gives."""
    folder = tmp_path_factory.mktemp("here")
    here(tiny_folder, folder, **ONE_STEP)
    return adapter(folder)


def test_a_deployment_trains_what_a_simulation_does(deployment: Deployment, tiny_folder: Path, tmp_path: Path) -> None:
    summary = launch(deployment, tiny_folder, tmp_path / "run", **{"transport.address": OPEN})
    assert summary["status"] == "finished"
    assert [len(each["clients"]) for each in summary["rounds"]] == [3, 3]
    here(tiny_folder, tmp_path / "here")
    assert_same(adapter(tmp_path / "run"), adapter(tmp_path / "here"))
    secrets = re.compile(r"PRIVATE KEY|BEGIN CERTIFICATE|hsplitlora-token|[\"\']token[\"\']")
    for file in (tmp_path / "run").glob("*.*"):
        assert not secrets.search(file.read_text(errors="replace")), file
    assert not secrets.search(deployment.logs())
    assert not list(deployment.folder.glob("node*/**/*.safetensors")), "nodes keep nothing of a run that is over"


def test_a_node_that_cannot_reach_the_port_goes_on_over_messages(
    deployment: Deployment, tiny_folder: Path, tmp_path: Path, one_step_here: dict[str, torch.Tensor]
) -> None:
    auto = {"transport.kind": "auto", "transport.address": BEHIND_A_PROXY}
    summary = launch(deployment, tiny_folder, tmp_path / "run", **auto | ONE_STEP)
    assert [client["client"] for client in summary["rounds"][0]["clients"]] == ["0", "1", "2"]
    assert "going on over messages: " in (deployment.folder / "node2.log").read_text()
    assert "going on over messages: " not in (deployment.folder / "node0.log").read_text()
    assert_same(adapter(tmp_path / "run"), one_step_here)


def test_messages_alone_need_no_port(
    deployment: Deployment, tiny_folder: Path, tmp_path: Path, one_step_here: dict[str, torch.Tensor]
) -> None:
    launch(deployment, tiny_folder, tmp_path / "run", **{"transport.kind": "messages"} | ONE_STEP)
    assert_same(adapter(tmp_path / "run"), one_step_here)
