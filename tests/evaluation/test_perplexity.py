"""An interval of the perplexity against the accumulated method, and rows against a plain sum."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hsplitlora_flwr.evaluation.perplexity import Evaluation, evaluate
from hsplitlora_flwr.lora.base import SharedBase
from tests.tiny import random_batches, tiny_model


def test_rows_have_their_own_sums(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    batch = next(random_batches(3, rows=5))
    found = evaluate(SharedBase(str(tmp_path), "float64").whole(), [batch])
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    targets = batch.labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert [nll for nll, _ in found.rows] == pytest.approx(losses.sum(dim=1).tolist())
    assert [tokens for _, tokens in found.rows] == (targets != -100).sum(dim=1).tolist()
    assert found.nll == pytest.approx(float(losses.sum().detach()))


def test_the_interval_is_that_of_the_normal_approximation_where_rows_are_many() -> None:
    chance = np.random.default_rng(1)
    tokens = chance.integers(1, 30, 2000)
    nll = tokens * chance.normal(1.4, 0.4, 2000)
    mean = nll.sum() / tokens.sum()
    # of a ratio of sums, to first order
    spread = math.sqrt(float(((nll - mean * tokens) ** 2).sum())) / tokens.sum()
    found = Evaluation(float(nll.sum()), int(tokens.sum()), list(zip(nll.tolist(), tokens.tolist(), strict=True)))
    low, high = found.interval()
    assert low == pytest.approx(math.exp(mean - 1.96 * spread), abs=0.2 * math.exp(mean) * spread)
    assert high == pytest.approx(math.exp(mean + 1.96 * spread), abs=0.2 * math.exp(mean) * spread)
    assert found.interval() == (low, high), "the same in every run"
    assert found.interval(share=0.5)[0] > low
