"""What plans of several files are made from: a tiny model's configuration, and a process that nobody measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.own_memory import OwnMemory
from tests.tiny import tiny_model

PROCESS_BYTES = 250_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds a configuration and nothing else."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return path


@pytest.fixture
def known_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client's process takes is remembered, so no other is measured."""
    known = OwnMemory(PROCESS_BYTES, "<the last run here>", in_run=True)
    monkeypatch.setattr(own_memory, "remembered", lambda config: known)
