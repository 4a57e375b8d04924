"""Adapters that go on from round to round: the same model to rounding, and to the last bit where all trained it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplitlora_flwr.lora.aggregation import Factors, Update, aggregate
from hsplitlora_flwr.lora.kept import KeptHalf
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.lora.update import AccumulatedUpdate, with_adapter

OUT, IN = 24, 20
SCALE = 1.5
NOTHING = torch.zeros(OUT, IN, dtype=torch.float64)
NOTHING = torch.zeros(OUT, IN, dtype=torch.float64)
BLOCKS = {f"block{number}": number for number in range(5)}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec(rank: int) -> AdapterSpec:
    return AdapterSpec(rank, SCALE * rank)


def tensors_of(raw: dict[str, Factors]) -> dict[str, Tensor]:
    """As a half gives them: ``(B, A)`` without their scale, and something of an optimizer."""
    named = {}
    for name, (b, a) in raw.items():
        named |= {f"{name}:A/adapter": a, f"{name}:B/adapter": b, f"{name}:A/step": torch.tensor(3.0)}
    return named


def scaled(raw: dict[str, Factors]) -> dict[str, Factors]:
    return {name: (b, a * SCALE) for name, (b, a) in raw.items()}


def dense(factors: Factors) -> Tensor:
    return factors[0].double() @ factors[1].double()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * (1 + float(expected.norm())))


class Rounds:
    """Rounds whose half is kept, beside their dense sums."""

    def __init__(self) -> None:
        self.half, self.accumulated = KeptHalf(), AccumulatedUpdate()
        self.total = dict.fromkeys(BLOCKS, NOTHING)
        self.raw: dict[str, Factors] = {}

    @property
    def adapters(self) -> dict[str, Factors]:
        """The half as the last round left it."""
        return scaled(self.raw)

    def take(self, number: int, splits: list[int], weights: list[float], ranks: dict[str, int]) -> None:
        """A round in which adapters of these ranks move at random, of clients with these split points and weights."""
        shares = [weight / sum(weights) for weight in weights]
        specs = {name: spec(rank) for name, rank in ranks.items() if BLOCKS[name] >= min(splits)}
        self.half.begin(specs)
        going_on = {key.partition(":")[0] for key in self.half.tensors}
        assert going_on == {name for name, (_, a) in self.raw.items() if name in specs and len(a) == ranks[name]}
        before = {name: dense(self.adapters[name]) if name in going_on else NOTHING for name in BLOCKS}
        beside = self.half.beside(self.accumulated)
        for name, total in self.total.items():  # W_0 + accumulated is what everybody starts from
            close((beside[name].dense().double() if name in beside else NOTHING) + before[name], total)
        seed, raw = 1000 * number, dict[str, Factors]()
        for name, each in specs.items():
            seed += 2
            fresh = torch.zeros(OUT, each.rank), randn(seed, each.rank, IN)
            b, a = self.raw[name] if name in going_on else fresh
            raw[name] = b + randn(seed, OUT, each.rank), a + 0.1 * randn(seed + 1, each.rank, IN)
        half = scaled(raw)
        own: list[Update] = [
            {
                name: (randn(seed + 7 * i, OUT, i + 1), randn(seed + 7 * i + 1, i + 1, IN))
                for name, block in BLOCKS.items()
                if block < split
            }
            for i, split in enumerate(splits)
        ]
        trained_by = {name: [i for i, split in enumerate(splits) if split <= BLOCKS[name]] for name in half}
        update = aggregate(own, shares, shared=self.half.update(half, trained_by))
        for name in BLOCKS:
            change = NOTHING
            for i, each in enumerate(own):
                if name in each:
                    change = change + shares[i] * dense(each[name])
                elif name in half:
                    change = change + shares[i] * (dense(half[name]) - before[name])
            self.total[name] = self.total[name] + change
            close(dense(update[name]) if name in update else NOTHING, change)
        settled = [name for name, by in trained_by.items() if len(by) == len(splits)]
        self.accumulated.add(update, self.half.end(tensors_of(raw), half, settled))
        self.raw = raw

    def check(self) -> None:
        changes = self.accumulated.changes()
        for name, total in self.total.items():
            close(changes[name].dense().double() if name in changes else NOTHING, total)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 9)), min_size=1, max_size=3),
            st.sampled_from([1, 2, 3]),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_the_model_is_the_dense_sum_of_all_rounds(rounds: list[tuple[list[tuple[int, float]], int]]) -> None:
    """Whatever cuts, weights and ranks each round has: clients come and go, and so do layers of the half."""
    run = Rounds()
    for number, (clients, rank) in enumerate(rounds):
        splits, weights = [split for split, _ in clients], [weight for _, weight in clients]
        run.take(number, splits, weights, {name: 2 if block % 2 else rank for name, block in BLOCKS.items()})
        run.check()


def test_where_all_trained_it_the_change_is_the_adapter_to_the_last_bit() -> None:
    run = Rounds()
    for number in range(20):
        run.take(number, [1, 2, 4], [1, 2, 3.3], dict.fromkeys(BLOCKS, 2))
        change, (b, a) = run.accumulated.changes()["block4"], run.adapters["block4"]
        assert change.factors is not None
        assert torch.equal(change.factors[0], b) and torch.equal(change.factors[1], a)
    run.check()


def test_an_adapter_of_another_rank_starts_anew_over_what_it_had_become() -> None:
    run, splits = Rounds(), [1, 2]
    run.take(0, splits, [1, 1], dict.fromkeys(BLOCKS, 2))
    old_b, old_a = run.adapters["block4"]
    for number in (1, 2, 3):
        run.take(number, splits, [1, 1], dict.fromkeys(BLOCKS, 3))
        change, (b, a) = run.accumulated.changes()["block4"], run.adapters["block4"]
        assert change.factors is not None
        assert torch.equal(change.factors[0], torch.cat([old_b, b], dim=1))
        assert torch.equal(change.factors[1], torch.cat([old_a, a]))
    run.check()


def test_the_bytes_of_the_change_are_bounded() -> None:
    """Under a plan that never rests, and with blocks in both worlds."""
    run, most = Rounds(), 4 * OUT * IN
    for number in range(30):
        ranks = {name: 1 + (number + block) % 3 for name, block in BLOCKS.items()}
        run.take(number, [1, 2, 3 + number % 2], [1, 2, 3], ranks)
        assert all(change.nbytes <= most for change in run.accumulated.changes().values())
    run.check()


def test_a_layer_that_only_clients_that_failed_have_trained_stays_as_it_was() -> None:
    run = Rounds()
    run.take(0, [1, 3], [1, 1], dict.fromkeys(BLOCKS, 2))
    before = run.accumulated.changes()["block1"].dense()
    specs = {name: spec(2) for name, block in BLOCKS.items() if block >= 1}
    run.half.begin(specs)
    beside = run.half.beside(run.accumulated)["block1"].dense()
    raw = {name: (b + 1, a) for name, (b, a) in run.raw.items()}
    moved = scaled(raw)
    own: Update = {name: (randn(5, OUT, 1), randn(6, 1, IN)) for name, block in BLOCKS.items() if block in (0, 2)}
    trained_by = {name: [0] if BLOCKS[name] >= 3 else [] for name in moved}  # the client with split 1 failed
    update = aggregate([own], [1.0], shared=run.half.update(moved, trained_by))
    run.accumulated.add(update, run.half.end(tensors_of(raw), moved, ["block3", "block4"]))
    assert torch.equal(run.accumulated.changes()["block1"].dense(), before)
    run.half.begin(specs)
    b, a = moved["block1"]
    found = run.half.beside(run.accumulated)["block1"].dense().double() + dense((b, a))
    assert not torch.allclose(beside.double() + dense((b, a)), before.double(), atol=0.1), "the adapter has moved"
    torch.testing.assert_close(found, before.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 2, 15])
def test_an_adapter_is_taken_off_again_as_it_was_put_on(rank: int) -> None:
    """A change without ranks, in factors, and one that is dense with the adapter or before."""
    before, adapter = AccumulatedUpdate(), (randn(1, OUT, 2), randn(2, 2, IN))
    before.add({"a": (randn(3, OUT, rank), randn(4, rank, IN))})
    change = before.changes().get("a")
    after = AccumulatedUpdate()
    after.add({"a": adapter}, {"a": with_adapter(change, adapter)})
    left = after.without({"a": adapter})["a"].dense()
    expected = change.dense() if change else torch.zeros(OUT, IN)
    assert torch.equal(left, expected) or (rank == 15 and torch.allclose(left, expected, atol=1e-5))
    total = after.changes()["a"].dense()
    torch.testing.assert_close(total, expected + dense(adapter).float(), rtol=1e-5, atol=1e-5)
    stranger = after.without({"b": adapter})
    assert torch.equal(stranger["a"].dense(), total)
    torch.testing.assert_close(stranger["b"].dense(), -dense(adapter).float())
    assert math.prod(stranger["b"].shape) == OUT * IN
