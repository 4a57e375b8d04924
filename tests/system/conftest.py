"""Whole runs of the tiny model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.Popen[str]"]


def start_in(folder: Path, model: Path, **settings: Any) -> subprocess.Popen[str]:
    """Start ``python -m simulations.run`` on a tiny model, as a user does; ``run.dir`` is ``folder``."""
    wanted = {
        "model.path": model,
        "clients.memory_gb": "'2.0,2.5,3.0'",
        "clients.wait": 600,
        "data.eval_rows": 40,
        "train.steps": 3,
        "train.batch_size": 4,
        "train.lr": 0.01,
        "run.dir": folder,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    command = [sys.executable, "-m", "simulations.run", *(f"{key}={value}" for key, value in wanted.items())]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def start_run(tiny_folder: Path, tmp_path: Path) -> Run:
    """Starts a run of the tiny model in ``tmp_path / "run"``."""
    return partial(start_in, tmp_path / "run", tiny_folder)
