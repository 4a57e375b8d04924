"""Whole runs of the tiny model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_run(tiny_folder: Path, tmp_path: Path) -> Run:
    """Starts ``python -m simulations.run`` on the tiny model, as a user does."""

    def start(**settings: Any) -> subprocess.Popen[str]:
        wanted = {
            "model.path": tiny_folder,
            "clients.memory_gb": "2.0,2.5,3.0",
            "data.eval_rows": 40,
            "train.steps": 3,
            "train.batch_size": 4,
            "train.lr": 0.01,
            "run.dir": tmp_path / "run",
        } | {key.replace("__", "."): value for key, value in settings.items()}
        command = [sys.executable, "-m", "simulations.run", *(f"{key}={value}" for key, value in wanted.items())]
        command = [part.replace("2.0,2.5,3.0", "'2.0,2.5,3.0'") for part in command]
        return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
