"""Rows that were trained on are told from others where training left a trace, and not where it left none."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
import torch
from scipy.stats import mannwhitneyu

from hsplitlora_flwr.data.collate import Tokens, collate
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.privacy.membership import measure_membership, row_losses, tell_apart


def rows_of(count: int, seed: int) -> list[Tokens]:
    generator = random.Random(seed)
    lengths = [generator.randrange(5, 14) for _ in range(count)]
    return [Tokens(array("i", [generator.randrange(1, 90) for _ in range(length)]), 2) for length in lengths]


def test_losses_are_those_of_each_row_alone(tiny_folder: Path) -> None:
    base, rows = SharedBase(str(tiny_folder)), rows_of(20, 0)
    for row, found in zip(rows, row_losses(base, rows), strict=True):
        alone = collate([row], 0)
        loss = base.whole().eval()(alone.input_ids, alone.attention_mask, alone.labels).loss
        assert float(found) == pytest.approx(float(loss), rel=1e-4)


def test_what_was_learnt_by_heart_is_told(tiny_folder: Path) -> None:
    base, members, others = SharedBase(str(tiny_folder)), rows_of(16, 1), rows_of(40, 2)
    part = SharedBase(str(tiny_folder)).whole()
    parameters = inject(part, {name: AdapterSpec(8, 16.0) for name, _ in part.linears()}, "seed")
    optimizer, batch = torch.optim.AdamW(parameters, lr=3e-2), collate(members, 0)
    for _ in range(40):
        part(batch.input_ids, batch.attention_mask, batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = AccumulatedUpdate()
    delta.add(extract(part))
    found = measure_membership(base, delta.changes(), members, others)
    assert found.area > 0.9 and found.found > 0.5 and (found.members, found.others) == (16, 40)
    guessed = measure_membership(SharedBase(str(tiny_folder)), {}, members, others)
    assert guessed.area == 0.5 and guessed.found == 0


def test_the_area_is_that_of_the_rank_test() -> None:
    draws = torch.Generator().manual_seed(3)
    members, others = (torch.randn(count, generator=draws).round(decimals=1) for count in (50, 70))
    members += 0.4
    expected = mannwhitneyu(members.numpy(), others.numpy()).statistic / (50 * 70)
    found = tell_apart(members, others)
    assert found.area == pytest.approx(expected)
    assert found.found == pytest.approx(sum(float(m) > sorted(others.tolist())[-1] for m in members) / 50, abs=0.05)
