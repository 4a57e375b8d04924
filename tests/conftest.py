"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def e2e_folder() -> Path:
    """The folder of the E2E NLG challenge: ``HSPLITLORA_E2E``, else ``shared/data/e2e`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "e2e"
    folder = Path(os.environ.get("HSPLITLORA_E2E", beside))
    if not (folder / "devset.csv").is_file():
        pytest.skip(f"no E2E data in {folder}; put trainset.csv and devset.csv there, or set HSPLITLORA_E2E")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost seconds."""
    torch.set_num_threads(1)
