"""What somebody else's package adds is known in every process of a run: launcher, server and clients."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.system.conftest import PROJECT, Run

NAMED = {
    "method.name": "hsplitlora-clipped",
    "transport.kind": "local_sockets",
    "transport.up": "four_bits",
    "transport.down": "four_bits",
    "train.optimizer": "adagrad",
    "data.source": "sums",
    "run.listeners": "loss_table",
}


def test_a_run_of_names_that_others_registered(start_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One module by the entry point of an installed package, the others by ``run.plugins``."""
    page = (PROJECT / "docs" / "extending.md").read_text()
    package, facts = tmp_path / "my_package", tmp_path / "my_package-1.0.dist-info"
    package.mkdir()
    facts.mkdir()
    for path, code in re.findall(r"^```python\n# (my_package/\w+\.py)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        (tmp_path / path).write_text(code)
    others = sorted(file.stem for file in package.glob("*.py") if file.stem not in ("rules", "noisy_app"))
    (package / "others.py").write_text(f"from my_package import {', '.join(others)}\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    [entry] = re.findall(r'entry-points."(.*?)"\]\n *(\w+) = "(.*?)"', page)
    (facts / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*entry))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    settings = {key.replace(".", "__"): value for key, value in NAMED.items()}
    process = start_run(**settings, run__plugins="my_package.others", train__rounds=1)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {key: summary["config"][key] for key in NAMED} == NAMED
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == 1 + 3 * 3
