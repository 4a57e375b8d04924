"""What a node may use: one number where its model lies, and on a GPU a second one for its process in the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from hsplitlora_flwr.client.budget import host_memory_budget, is_measured, load_memory_budget
from hsplitlora_flwr.client.handlers import load_own_text
from hsplitlora_flwr.client.node import Means, Node
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.messages import Description
from hsplitlora_flwr.planning import Budget
from hsplitlora_flwr.training.process import OwnProcess
from tests.server.test_strategy import settings


def context(**node: Any) -> Context:
    return Context(1, 11, {"partition-id": 1, "num-partitions": 2} | node, RecordDict(), {})


def config(**changes: Any) -> Config:
    return Config.from_run_config({"clients.count": 2, "model.device": "cuda:0"} | changes)


GPU = "gpu-memory-gb"
BOTH = {"clients.memory_gb": "1,2", "clients.gpu_memory_gb": "10,20"}


@pytest.mark.parametrize(
    ("node", "changes", "there", "host"),
    [
        ({GPU: 24, "memory-gb": 4}, {}, 24, 4),
        ({GPU: 24}, {}, 24, 0),
        ({"memory-gb": 4}, {}, 4, 0),  # one number is of where the model lies
        ({}, BOTH, 20, 2),
        ({}, {"clients.gpu_memory_gb": "10,20"}, 20, 0),
        ({GPU: 24}, BOTH, 24, 2),
        ({"memory-gb": 4}, BOTH, 20, 4),
        ({"memory-gb": 4}, {"model.device": "cpu"}, 4, 0),
    ],
)
def test_memory_of_a_gpu_and_of_the_machine(
    node: dict[str, Any], changes: dict[str, Any], there: float, host: float
) -> None:
    its, settings = context(**node), config(**changes)
    assert load_memory_budget(its, settings) == there * 1e9
    assert host_memory_budget(its, settings) == host * 1e9
    assert not is_measured(its, settings)


def test_memory_of_a_gpu_that_is_not_trained_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpu-memory-gb=24.0 is of a GPU, and model.device=cpu trains on the CPU"):
        load_memory_budget(context(**{GPU: 24}), config(**{"model.device": "cpu"}))


class SmallProcess(OwnProcess):
    """Takes 1 GB by itself."""

    def resting_bytes(self, config: Any) -> int:
        return 10**9


def describe(tiny_folder: Path, tmp_path: Path, device: str, **node: Any) -> Description:
    of_run = settings(tiny_folder, tmp_path, **{"model.device": device})
    made = Node(Means(load_own_text, load_memory_budget, SmallProcess(), None), context(**node))
    made.measure_process(of_run)
    return made.describe(of_run, made.text(of_run))


def test_a_plan_for_a_gpu_does_not_count_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    on_gpu = describe(tiny_folder, tmp_path, "cuda:0", **{GPU: 24, "memory-gb": 4})
    assert on_gpu.budget == Budget(24 * 10**9, 0)
    assert (on_gpu.host_bytes, on_gpu.host_process_bytes) == (4 * 10**9, 10**9)
    assert Description.from_records(on_gpu.to_records()) == on_gpu
    on_cpu = describe(tiny_folder, tmp_path, "cpu", **{"memory-gb": 4})
    assert on_cpu.budget == Budget(4 * 10**9, 10**9)
    assert (on_cpu.host_bytes, on_cpu.host_process_bytes) == (0, 0)


def test_a_process_that_the_machine_does_not_hold_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes 1,000,000,000 bytes .* memory-gb lets it have 500,000,000; raise"):
        describe(tiny_folder, tmp_path, "cuda:0", **{GPU: 24, "memory-gb": 0.5})
