"""What a node keeps on disk: exact, replaced when damaged, gone when the run is over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from hsplitlora_flwr.client.store import NodeStateError, NodeStore
from hsplitlora_flwr.lora import AccumulatedUpdate
from hsplitlora_flwr.lora.update import UpdateError


def context(tmp_path: Path, run: int = 1, node: int = 2) -> Context:
    return Context(run, node, {"state-dir": str(tmp_path)}, RecordDict(), {})


def server_after(rounds: int) -> AccumulatedUpdate:
    accumulated, generator = AccumulatedUpdate(), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        accumulated.add({"q": (torch.randn(40, 2, generator=generator), torch.randn(2, 40, generator=generator))})
    return accumulated


def test_the_update_is_brought_up_to_date_by_other_processes(tmp_path: Path) -> None:
    for rounds in (1, 2, 4):
        server, node = server_after(rounds), NodeStore(context(tmp_path))
        version, held = node.held()
        assert version == rounds // 2
        patch = server.since(held)
        assert patch.layers["q"].start == ("0" if rounds == 1 else held["q"])
        updated = node.update(patch)
        again = NodeStore(context(tmp_path))
        assert again.held() == (rounds, server.held())
        for changes in (updated, again.changes()):
            assert torch.equal(changes["q"].dense(), server.changes()["q"].dense())
    assert NodeStore(context(tmp_path, run=7)).held() == (0, {})
    assert NodeStore(context(tmp_path, run=7)).changes() == {}


def test_layers_that_come_whole_take_the_place_of_the_old_and_others_stay(tmp_path: Path) -> None:
    server, node = AccumulatedUpdate(), NodeStore(context(tmp_path))
    server.add({"q": (torch.ones(4, 1), torch.ones(1, 4)), "v": (torch.ones(4, 1), torch.ones(1, 4))})
    node.update(server.since({}))
    for _ in range(4):  # q becomes dense, v is as it was
        server.add({"q": (torch.randn(4, 1), torch.randn(1, 4))})
    assert server.changes()["q"].matrix is not None
    patch = server.since(node.held()[1])
    assert set(patch.layers) == {"q"}
    node.update(patch)
    assert node.held() == (5, server.held())
    for name, change in server.changes().items():
        assert torch.equal(node.changes()[name].dense(), change.dense())


def test_a_damaged_update_is_replaced(tmp_path: Path) -> None:
    store = NodeStore(context(tmp_path))
    store.update(server_after(2).since({}))
    file = store.folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    patch = server_after(3).since(server_after(2).held())
    with pytest.raises(UpdateError, match="is damaged"):
        store.update(patch)
    assert store.held() == (0, {})
    store.update(server_after(3).since({}))
    assert torch.equal(store.changes()["q"].dense(), server_after(3).changes()["q"].dense())


@pytest.mark.parametrize("damage", [b"", b"\xff" * 16])
def test_an_update_whose_beginning_is_damaged_is_not_held(damage: bytes, tmp_path: Path) -> None:
    store = NodeStore(context(tmp_path))
    store.update(server_after(2).since({}))
    file = store.folder / "delta.safetensors"
    file.write_bytes(damage)
    assert store.held() == (0, {})
    assert not file.exists()


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
