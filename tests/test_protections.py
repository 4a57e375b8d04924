"""Nodes that protect their cut activations, in whole runs: each as it decides itself, known to the plan and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsplitlora_flwr import split_client_app
from hsplitlora_flwr.config import ConfigError
from hsplitlora_flwr.transport.bottleneck import Bottleneck, digest
from tests.grid import LocalGrid
from tests.server.test_strategy import run, settings

RUN = {
    "train.rounds": 1,
    "clients.count": 2,
    "evaluation.client_rows": 4,
    "plan.probe_batches": 1,
    "split.max": 2,
    "train.steps": 2,
}


def directions(file: Path, hidden: int, seed: int = 0, width: int = 6) -> str:
    draws = torch.Generator().manual_seed(seed)
    made = {
        split: Bottleneck(torch.zeros(hidden), *(torch.randn(width, hidden, generator=draws) / hidden**0.5,) * 2)
        for split in (1, 2)
    }
    Bottleneck.write(file, made)
    return str(file)


def protected_run(folder: Path, tmp_path: Path, nodes: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    configs = {10 + i: {"partition-id": i, "num-partitions": 2, "memory-gb": 30.0} | own for i, own in enumerate(nodes)}
    return run(settings(folder, tmp_path, **RUN | changes), tmp_path, LocalGrid(split_client_app(), configs))


@pytest.fixture
def hidden(tiny_folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(tiny_folder).hidden_size)


@pytest.mark.parametrize("kind", ["stream", "messages"])
def test_each_node_has_its_own_width(kind: str, hidden: int, tiny_folder: Path, tmp_path: Path) -> None:
    file = directions(tmp_path / "directions", hidden)
    nodes = [{"cut-width": 2, "cut-clip": 1.0, "cut-noise": 0.5}, {}]
    asked = {"split.bottleneck": file, "split.width": 6, "transport.kind": kind}
    narrow, wide = protected_run(tiny_folder, tmp_path, nodes, **asked)["rounds"][0]["clients"]
    assert [narrow["cut_transform"], wide["cut_transform"]] == ["width 2, clip 1, noise 0.5", "width 6"]
    assert narrow["losses"] and wide["losses"]
    # fp32 up and down; the rest is the attention mask and the labels, and frames' own
    assert narrow["frame_bytes_per_token"] + 4 * 2 * 4 < wide["frame_bytes_per_token"] + 12 < 2 * hidden * 4
    assert narrow["predicted_bytes"] != wide["predicted_bytes"], "the plan counts each one's own"


def test_directions_that_the_server_does_not_have_are_refused(hidden: int, tiny_folder: Path, tmp_path: Path) -> None:
    ours, theirs = (directions(tmp_path / name, hidden, seed) for seed, name in enumerate(("ours", "theirs")))
    nodes = [{"cut-width": 4, "cut-bottleneck": theirs}, {}]
    summary = protected_run(tiny_folder, tmp_path, nodes, **{"split.bottleneck": ours})
    failed = summary["failures"][0]
    assert f"'{digest(theirs)}'" in failed["error"] and digest(ours) in failed["error"]
    assert [row["client"] for row in summary["rounds"][0]["clients"]] == ["1"]


def test_a_split_point_without_directions_is_told_first(hidden: int, tiny_folder: Path, tmp_path: Path) -> None:
    asked = {"split.bottleneck": directions(tmp_path / "directions", hidden), "split.width": 4}
    with pytest.raises(ConfigError, match=r"directions of the split points 1-2, and not of 3"):
        protected_run(tiny_folder, tmp_path, [{}, {}], **asked, **{"split.max": 3})
    with pytest.raises(ConfigError, match=r"split.width=4 needs split.bottleneck"):
        settings(tiny_folder, tmp_path, **{"split.width": 4})
