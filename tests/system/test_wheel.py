"""The package as others get it: a wheel, installed elsewhere and used in an empty folder; and a bundle of Flower."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.conftest import PROJECT


@dataclass(frozen=True)
class Installed:
    """A wheel, installed beside the dependencies of this environment and away from the checkout."""

    wheel: Path
    site: Path

    def __call__(self, folder: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``hsplitlora`` in a folder; whatever it imports of the package is the wheel's."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), **env}
        command = [sys.executable, str(self.site / "bin" / "hsplitlora"), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


NOT_IN_A_CLONE = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "*venv", "runs")


def cloned(folder: Path) -> Path:
    """The checkout without what git does not know."""
    return shutil.copytree(PROJECT, folder, ignore=NOT_IN_A_CLONE)


@pytest.fixture(scope="module")
def hsplitlora(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    clone, site = cloned(folder / "clone"), folder / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, clone], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return Installed(wheel, site)


def test_an_installed_command_plans_and_runs_in_an_empty_folder(
    hsplitlora: Installed, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = [f"model.path={tiny_folder}", "clients.count=1", "clients.memory_gb=[2.0]"]
    planned = hsplitlora(tmp_path, "plan", *settings)
    assert planned.returncode == 0 and "4 blocks" in planned.stdout, planned
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {row} of the text"}) + "\n" for row in range(12)))
    settings += ["data=jsonl", "data.path=text.jsonl", "data.partition=iid", "data.eval_rows=4", "run.dir=out"]
    settings += ["train.rounds=1", "train.steps=1", "train.batch_size=2", "plan.probe_batches=1"]
    ran = hsplitlora(tmp_path, "run", *settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "finished"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl", "out", "plan.html"}


def test_what_is_missing_is_named_in_one_line(hsplitlora: Installed, tmp_path: Path) -> None:
    """Without Hydra, as on a hospital's node."""
    hidden = "import importlib.util as u, sys; find = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *more: None if name == 'hydra' else find(name, *more)\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    told = hsplitlora(tmp_path, "run", PYTHONPATH=f"{tmp_path}{os.pathsep}{hsplitlora.site}")
    assert told.returncode == 2 and not told.stdout
    assert told.stderr == "error: this command needs hydra: pip install 'hsplitlora-flwr[simulation]'\n"


def test_a_node_needs_neither_ray_nor_hydra(hsplitlora: Installed) -> None:
    with zipfile.ZipFile(hsplitlora.wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    always = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("flwr<") for line in always)
    assert not [line for line in always if line.startswith(("hydra", "ray", "flwr["))]
    assert [line for line in required if line.startswith("flwr[simulation]") and "extra == 'simulation'" in line]


def test_flower_builds_an_app_of_a_clone(tmp_path: Path) -> None:
    clone = cloned(tmp_path / "hsplitlora-flwr")
    env: Mapping[str, str] = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    built = subprocess.run(["flwr", "build"], cwd=clone, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [bundle] = clone.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names, sizes = archive.namelist(), [file.file_size for file in archive.infolist()]
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    assert project["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert {"LICENSE", "README.md", "hsplitlora_flwr/server_app.py", "hsplitlora_flwr/client_app.py"} <= set(names)
    assert (
        len(names) <= 1000 and max(sizes) <= 1_000_000 and bundle.stat().st_size <= 10_000_000
    )  # what Flower's hub takes
