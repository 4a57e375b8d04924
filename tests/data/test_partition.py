"""Partitions: every row goes to one client, and each rule keeps its promise."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.data import partition as partition_module
from hsplitlora_flwr.data.partition import cached_partition, partition
from hsplitlora_flwr.data.sources import DataError, Example, load_text


def examples_of(groups: list[str]) -> list[Example]:
    return [Example("", f"text {row}", group) for row, group in enumerate(groups)]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.sampled_from(["a", "b", "é", "", "z"]), min_size=1, max_size=40),
    rule=st.sampled_from(["iid", "linear", "dirichlet", "natural"]),
    clients=st.integers(1, 8),
    seed=st.integers(0, 3),
)
# "a" and "a\0" are one to numpy's fixed-width strings, two to everyone else.
@example(groups=["a", "a\0"] * 10, rule="dirichlet", clients=2, seed=0)
@example(groups=["a", "a\0"] * 10, rule="natural", clients=2, seed=0)
def test_every_row_goes_to_exactly_one_client(groups: list[str], rule: str, clients: int, seed: int) -> None:
    examples, config = examples_of(groups), DataConfig(partition=rule, alpha=0.5)
    rows = len(groups)
    try:
        parts = partition(examples, config, clients, seed)
    except DataError:
        # Refused only for a reason that can be seen here; a Dirichlet draw may also leave a client empty by chance.
        assert (
            rows < clients
            or (rule == "natural" and len(set(groups)) < clients)
            or (rule == "linear" and rows < clients * (clients + 1) / 2 + 1e-6)
            or rule == "dirichlet"
        )
        return
    assert len(parts) == clients and all(parts)
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert partition(examples, config, clients, seed) == parts
    if rule == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if rule == "natural":
        homes = {(group, client) for client, part in enumerate(parts) for group in {groups[row] for row in part}}
        assert len(homes) == len(set(groups))


def test_linear_shares_grow_with_the_client() -> None:
    parts = partition(examples_of(["g"] * 100), DataConfig(partition="linear"), 4, seed=0)
    assert [len(part) for part in parts] == [10, 20, 30, 40]


@pytest.mark.parametrize("rule", ["iid", "linear"])
def test_seed_shuffles_rows(rule: str) -> None:
    examples, config = examples_of(["g"] * 60), DataConfig(partition=rule)
    first, second = (partition(examples, config, 3, seed) for seed in (0, 1))
    assert first != second
    assert first[0] != sorted(first[0])


def test_dirichlet_is_uneven_for_small_alpha_and_even_for_large() -> None:
    groups = [group for group in "abcdefgh" for _ in range(100)]

    def unevenness(alpha: float) -> float:
        """Mean over groups of the largest client's share of the group; 1/4 when even, 1 when on one client."""
        parts = partition(examples_of(groups), DataConfig(partition="dirichlet", alpha=alpha), 4, seed=0)
        counts = np.array([[Counter(groups[row] for row in part)[group] for part in parts] for group in "abcdefgh"])
        assert (counts.sum(axis=1) == 100).all()
        return float((counts.max(axis=1) / 100).mean())

    assert unevenness(1e4) < 0.3
    assert unevenness(0.1) > 0.7


def test_natural_deals_groups_in_turn() -> None:
    groups = list("ddaaaaabbbbccc")
    parts = partition(examples_of(groups), DataConfig(partition="natural"), 2, seed=0)
    assert [{groups[row] for row in part} for part in parts] == [{"a", "c"}, {"b", "d"}]


def test_natural_serves_up_to_one_client_a_topic_of_the_dialogues() -> None:
    config = DataConfig()
    train = load_text(config, seed=0).train
    assert [len(partition(train, config, clients, 0)) for clients in (1, 3, 21)] == [1, 3, 21]
    with pytest.raises(DataError, match="21 groups cannot serve 22 clients"):
        partition(train, config, 22, 0)


def test_a_client_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="2 training rows cannot be dealt to 3 clients"):
        partition(examples_of(["g"] * 2), DataConfig(partition="iid"), 3, seed=0)
    with pytest.raises(DataError, match=r"data\.partition=linear leaves one of 4 clients"):
        partition(examples_of(["g"] * 5), DataConfig(partition="linear"), 4, seed=0)
    with pytest.raises(DataError, match=r"use fewer clients, more rows or a data\.alpha above 0\.001"):
        partition(examples_of(["g"] * 5), DataConfig(partition="dirichlet", alpha=1e-3), 4, seed=0)


def test_partition_calls_nobody_and_leaves_the_hub_usable() -> None:
    code = """
import os, sys
calls = []
sys.addaudithook(lambda name, args: calls.append(args) if name in ("socket.connect", "socket.getaddrinfo") else None)
from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.data.partition import cached_partition, partition
from hsplitlora_flwr.data.sources import Example
assert "flwr_datasets" not in sys.modules
before = dict(os.environ)
examples = [Example("", "a", group) for group in "aabb" * 10]
for rule in ("iid", "linear", "dirichlet", "natural"):
    assert len(partition(examples, DataConfig(partition=rule), 2, 0)) == 2
import huggingface_hub.constants
assert not huggingface_hub.constants.HF_HUB_OFFLINE
assert dict(os.environ) == before
assert calls == [], calls
"""
    environment_offline = (
        "import os; os.environ.pop('HF_HUB_OFFLINE', None); os.environ.pop('TRANSFORMERS_OFFLINE', None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", environment_offline + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_what_was_dealt_before_is_not_dealt_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("", str(i), str(i % 3)) for i in range(30)]
    configs = [DataConfig(partition=rule) for rule in ("iid", "linear", "dirichlet", "natural")]
    expected = [partition(examples, config, 3, 1) for config in configs]
    assert [cached_partition(examples, config, 3, 1, tmp_path) for config in configs] == expected
    [damaged, *_] = tmp_path.iterdir()
    damaged.write_text("[[0, 1")
    assert [cached_partition(examples, config, 3, 1, tmp_path) for config in configs] == expected
    monkeypatch.setattr(partition_module, "partition", None)  # nobody may call it any more
    assert [cached_partition(examples, config, 3, 1, tmp_path) for config in configs] == expected
    assert len(list(tmp_path.iterdir())) == len(configs)
    other = [Example("", str(i), str(i % 2)) for i in range(30)]
    with pytest.raises(TypeError):
        cached_partition(other, configs[2], 3, 1, tmp_path)
