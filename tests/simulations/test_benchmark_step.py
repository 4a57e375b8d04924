"""Split training against a plain loop."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.data.collate import Batch, Tokens
from simulations.benchmarks import common
from simulations.benchmarks import step as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.step import SHAPE, PlainLoop, equal_batch, plain_batches, step


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in their place: importing torch once more takes longer than all the rest."""
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda _, mp_context, **how: ThreadPoolExecutor(1, **how))


ROWS = [Tokens(array("i", range(1, 1 + length)), masked=2) for length in (5, 9, 7, 4)]


def test_rows_compare_every_split_with_every_plain_loop(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SPLITS", (1, 3)), ("EPOCH_ROWS", 8), ("TURNS", 1), ("EPOCH_TURNS", 1)):
        monkeypatch.setattr(module, name, value)
    rows = list(step(Setup(str(tiny_folder))))
    longest, full = "padded to the longest of a batch", "padded to 128"
    sides = [(split, budget) for split in (1, 3) for budget in ("tight", "ample")]
    assert [(row["batches"], row["split"], row["budget"], row["plain"]) for row in rows] == [
        *(("equal", *side, "the same") for side in sides),
        *(("real", *side, plain) for side in sides for plain in (full, longest)),
    ]
    for row in rows:
        ours, theirs = float(row["split_tokens_per_s"]), float(row["plain_tokens_per_s"])
        assert 1 < theirs < 1e7
        assert row["split / plain"] == pytest.approx(ours / theirs)


def test_plain_batches_label_every_real_token() -> None:
    for padding in ("max_length", "longest"):
        batches = list(islice(plain_batches(ROWS, 2, padding, 12), 2 * 5))
        for epoch in range(5):
            pair = batches[2 * epoch : 2 * epoch + 2]
            texts = [ids[mask == 1].tolist() for b in pair for ids, mask in zip(*_columns(b), strict=True)]
            assert sorted(texts) == sorted(row.input_ids for row in ROWS)
        for batch in batches:
            longest = int(batch.attention_mask.sum(1).max())
            assert batch.input_ids.shape == (2, 12 if padding == "max_length" else longest)
            assert torch.equal(batch.labels, torch.where(batch.attention_mask == 1, batch.input_ids, -100))


def _columns(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.input_ids, batch.attention_mask


def test_the_plain_loop_starts_from_the_loss_of_the_base(tiny_folder: Path) -> None:
    batch = equal_batch(str(tiny_folder), *SHAPE)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        logits = model(batch.input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten())
    loop = PlainLoop(str(tiny_folder), ROWS * 2)
    assert loop.first_loss() == pytest.approx(float(expected), rel=1e-5)
    assert loop.train("real", "max_length") > 0
