"""What a node keeps on disk: exact, replaced when damaged, gone when the run is over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from hsplitlora_flwr.lora import Delta
from hsplitlora_flwr.lora.delta import DeltaError
from hsplitlora_flwr.node import NodeStateError, NodeStore


def context(tmp_path: Path, run: int = 1, node: int = 2) -> Context:
    return Context(run, node, {"state-dir": str(tmp_path)}, RecordDict(), {})


def server_after(rounds: int) -> Delta:
    delta, generator = Delta(), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        delta.add({"q": (torch.randn(40, 2, generator=generator), torch.randn(2, 40, generator=generator))})
    return delta


def test_the_update_is_brought_up_to_date_by_other_processes(tmp_path: Path) -> None:
    for rounds in (1, 2, 4):
        server, node = server_after(rounds), NodeStore(context(tmp_path))
        held = node.delta()
        patch = server.since(held.held())
        assert patch.layers["q"].start == ("0" if rounds == 1 else held.held()["q"])
        node.update(patch)
        again = NodeStore(context(tmp_path)).delta()
        assert again.held() == server.held()
        assert torch.equal(again.changes()["q"].dense(), server.changes()["q"].dense())
    assert NodeStore(context(tmp_path, run=7)).delta().held() == {}


def test_a_damaged_update_is_replaced(tmp_path: Path) -> None:
    store = NodeStore(context(tmp_path))
    store.update(server_after(2).since({}))
    file = store.folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    patch = server_after(3).since(server_after(2).held())
    with pytest.raises(DeltaError, match="continues state"):
        store.update(patch)
    store.update(server_after(3).since(store.delta().held()))
    assert torch.equal(store.delta().changes()["q"].dense(), server_after(3).changes()["q"].dense())


def test_training_under_way(tmp_path: Path) -> None:
    here = context(tmp_path)
    with pytest.raises(NodeStateError, match="no training under way"):
        NodeStore(here).load_training()
    tensors = {"0/adapter": torch.randn(3, 4).T, "0/step": torch.tensor(2.0)}
    NodeStore(here).save_training(tensors, {"step": 5, "losses": [0.1]})
    found, text = NodeStore(here).load_training()
    assert text == {"step": 5, "losses": [0.1]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    file = NodeStore(here).folder / "training.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(NodeStateError, match=r"training\.safetensors.*cannot be read"):
        NodeStore(here).load_training()
    NodeStore(here).end_training()
    assert not here.state and not file.exists()


def test_a_measurement_is_kept_until_it_moves_by_a_tenth(tmp_path: Path) -> None:
    store = NodeStore(context(tmp_path))
    assert store.number("flops") == 0
    assert [store.steady("flops", value) for value in (100.0, 109.0, 92.0, 111.0, 105.0)] == [100, 100, 100, 111, 111]
    store.note(up=3.0)
    assert (NodeStore(context(tmp_path)).number("up"), store.number("flops")) == (3.0, 111.0)


def test_the_end_of_a_run_removes_it_and_what_was_forgotten(tmp_path: Path) -> None:
    mine, other, old = (NodeStore(context(tmp_path, *ids)) for ids in ((1, 2), (1, 3), (9, 2)))
    for store in (mine, other, old):
        store.note(up=1.0)
    week = time.time() - 8 * 24 * 3600
    os.utime(old.folder, (week, week))
    mine.forget()
    assert not mine.folder.exists() and other.folder.exists()
    assert not old.folder.parent.exists()
