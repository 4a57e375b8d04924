"""The package as others get it: a wheel, installed elsewhere and used in an empty folder beside a package of somebody
else's that adds to it; and a bundle of Flower."""

from __future__ import annotations

import json
import os
import re
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
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


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


NAMED = {
    "method.name": "hsplitlora-clipped",
    "transport.kind": "local_sockets",
    "transport.up": "four_bits",
    "transport.down": "four_bits",
    "train.optimizer": "adagrad",
    "data.source": "sums",
    "run.listeners": "loss_table",
}
"""Each is known only to what others registered."""


def lay_down_plugins(folder: Path) -> None:
    """The package of docs/extending.md: one module by the entry point of an installed package, ``my_package.others``
    for ``run.plugins``."""
    page = (PROJECT / "docs" / "extending.md").read_text()
    package, facts = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir(parents=True)
    facts.mkdir()
    for path, code in re.findall(r"^```python\n# (my_package/\w+\.py)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        (folder / path).write_text(code)
    others = sorted(file.stem for file in package.glob("*.py") if file.stem not in ("rules", "noisy_app"))
    (package / "others.py").write_text(f"from my_package import {', '.join(others)}\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    [entry] = re.findall(r'entry-points."(.*?)"\]\n *(\w+) = "(.*?)"', page)
    (facts / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*entry))


def test_an_installed_command_plans_and_runs_in_an_empty_folder_by_names_that_others_registered(
    hsplitlora: Installed, tiny_folder: Path, tmp_path: Path
) -> None:
    """What somebody else's package adds is known in every process of the run: launcher, server and clients."""
    plugins, folder = tmp_path / "plugins", tmp_path / "empty"
    lay_down_plugins(plugins)
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"row {row} of the text"}) + "\n" for row in range(12))
    (folder / "text.jsonl").write_text(rows)
    settings = [f"model.path={tiny_folder}", "clients.count=2", "clients.memory_gb=[2.0]"]
    planned = hsplitlora(folder, "plan", *settings, "data=jsonl", "data.path=text.jsonl", "data.eval_rows=4")
    assert planned.returncode == 0 and "4 blocks" in planned.stdout, planned
    settings += ["clients.wait=600", "run.dir=out", "run.plugins=my_package.others", "data.eval_rows=4"]
    settings += ["train.rounds=1", "train.steps=2", "train.batch_size=2", "plan.probe_batches=1"]
    settings += [f"{key}={value}" for key, value in NAMED.items()]
    ran = hsplitlora(folder, "run", *settings, PYTHONPATH=f"{hsplitlora.site}{os.pathsep}{plugins}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {key: summary["config"][key] for key in NAMED} == NAMED
    assert len((folder / "out" / "losses.csv").read_text().splitlines()) == 1 + 2 * 2
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in folder.iterdir()} == {"text.jsonl", "out", "plan.html"}


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
