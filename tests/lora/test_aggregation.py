"""Invariant A1: noise-free aggregation equals the dense weighted sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.lora.aggregation import AggregationError, Factors, aggregate

LAYERS = {"model.layers.0.q": (12, 8), "model.layers.0.k": (4, 8), "model.layers.1.up": (20, 8)}


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[dict[str, Factors]], list[float]]:
    """Clients with any ranks from 1 up, any scales, any holders, and any weights."""
    count = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    updates: list[dict[str, Factors]] = []
    for _ in range(count):
        update = {}
        for name, (rows, columns) in LAYERS.items():
            rank = draw(st.integers(0, 6))
            if rank:
                scale = draw(st.floats(0.01, 100))
                b = torch.randn(rows, rank, generator=generator)
                update[name] = b, scale * torch.randn(rank, columns, generator=generator)
        updates.append(update)
    return updates, draw(st.lists(st.floats(0.001, 1e6), min_size=count, max_size=count))


@settings(max_examples=200, deadline=None)
@given(rounds())
def test_equals_the_dense_weighted_sum(case: tuple[list[dict[str, Factors]], list[float]]) -> None:
    updates, weights = case
    result = aggregate(updates, weights)
    assert result.keys() == {name for update in updates for name in update}
    shares = np.array(weights, dtype=np.float64) / np.sum(weights)
    for name, (b, a) in result.items():
        expected = np.zeros(LAYERS[name])
        for share, update in zip(shares, updates, strict=True):
            if name in update:
                mine = [factor.numpy().astype(np.float64) for factor in update[name]]
                expected += share * mine[0] @ mine[1]
        got = b.numpy().astype(np.float64) @ a.numpy().astype(np.float64)
        # Relative to what is summed: terms may cancel, and then nothing small is left to be relative to.
        size = sum(
            share * np.linalg.norm(update[name][0].double() @ update[name][1].double())
            for share, update in zip(shares, updates, strict=True)
            if name in update
        )
        assert np.linalg.norm(got - expected) <= 1e-6 * size


def test_mean_of_factors_is_another_thing() -> None:
    """The mistake that the method is named after: averaging A and B apart is not averaging their products."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(6, 3, generator=generator), torch.randn(3, 5, generator=generator)) for _ in range(2)]
    b, a = aggregate([{"w": pair} for pair in pairs], [1, 1])["w"]
    means = sum(b for b, _ in pairs) / 2 @ (sum(a for _, a in pairs) / 2)  # type: ignore[operator]
    assert torch.linalg.norm(b @ a - means) > 0.1 * torch.linalg.norm(b @ a)


@pytest.mark.parametrize(
    ("updates", "weights", "says"),
    [
        ([], [], "0 updates"),
        ([{"w": (torch.ones(2, 1), torch.ones(1, 2))}], [1, 2], "one weight per update"),
        ([{"w": (torch.ones(2, 1), torch.ones(1, 2))}], [-1], "not negative"),
        ([{"w": (torch.ones(2, 1), torch.ones(1, 2))}], [0], "not all zero"),
        ([{"w": (torch.ones(2, 1), torch.ones(2, 2))}], [1], "do not share a rank"),
        (
            [{"w": (torch.ones(2, 1), torch.ones(1, 2))}, {"w": (torch.ones(3, 1), torch.ones(1, 2))}],
            [1, 1],
            r"\(3, 2\)",
        ),
    ],
)
def test_refuses_what_cannot_be_summed(updates: list[dict[str, Factors]], weights: list[float], says: str) -> None:
    with pytest.raises(AggregationError, match=says):
        aggregate(updates, weights)


def test_unknown_rule() -> None:
    with pytest.raises(AggregationError, match="choose one of noise_free"):
        aggregate([{"w": (torch.ones(2, 1), torch.ones(1, 2))}], [1], rule="mean")
