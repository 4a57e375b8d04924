"""What one client may weigh, and how far it may move the model beside the others."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsplitlora_flwr.lora.limits import SizeLimit, capped_shares, capped_weights, update_norm, update_size

WEIGHTS = st.lists(st.integers(1, 10**12), min_size=1, max_size=8)
CAPS = st.floats(0.01, 1.0)


@pytest.mark.parametrize(
    ("weights", "cap", "shares"),
    [
        ([6, 2, 2], 0.75, [0.6, 0.2, 0.2]),
        ([10**12, 30, 10], 0.75, [0.75, 0.1875, 0.0625]),
        ([10**12, 10**12, 1], 0.4, [0.4, 0.4, 0.2]),
        ([90, 10], 0.5, [0.5, 0.5]),
        ([90, 10], 0.2, [0.5, 0.5]),
        ([7], 0.75, [1.0]),
    ],
)
def test_shares(weights: list[int], cap: float, shares: list[float]) -> None:
    assert capped_shares(weights, cap) == pytest.approx(shares, rel=1e-9)


@given(WEIGHTS, CAPS)
def test_shares_sum_to_one_keep_to_the_cap_and_keep_their_order(weights: list[int], cap: float) -> None:
    shares = capped_shares(weights, cap)
    assert math.fsum(shares) == pytest.approx(1)
    assert max(shares) <= max(cap, 1 / len(weights)) * (1 + 1e-9)
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(shares[one] <= shares[next_] * (1 + 1e-9) for one, next_ in pairwise(order))


def test_nobody_makes_more_than_the_cap_of_an_amount() -> None:
    assert capped_weights([0.5, 0.3, 0.2], [1.0, 1.0, 2.0], 0.75) == [0.5, 0.3, 0.2]
    weights, amounts = capped_weights([0.5, 0.3, 0.2], [1e18, 1.0, 2.0], 0.6), (1e18, 1.0, 2.0)
    parts = [weight * amount for weight, amount in zip(weights, amounts, strict=True)]
    assert parts == pytest.approx([0.6, 0.4 * 3 / 7, 0.4 * 4 / 7])
    assert capped_weights([0.5, 0.5], [0.0, 0.0], 0.75) == [0.5, 0.5]
    assert capped_weights([0.5, 0.5], [0.0, 3.0], 0.75) == [0.5, pytest.approx(1 / 3)]


def test_norm_and_size_are_those_of_the_dense_change() -> None:
    generator = torch.Generator().manual_seed(0)
    update = {
        name: (torch.randn(9, rank, generator=generator), torch.randn(rank, 7, generator=generator))
        for name, rank in (("a", 3), ("b", 5))
    }
    dense = math.sqrt(sum(float((b.double() @ a.double()).square().sum()) for b, a in update.values()))
    assert update_norm(update) == pytest.approx(dense, rel=1e-12)
    assert update_size(update) == pytest.approx(dense / math.sqrt(8), rel=1e-12)
    assert update_size({"a": (torch.zeros(9, 0), torch.zeros(0, 7))}) == 0
    assert update_norm({"a": (torch.full((9, 1), 1e30), torch.full((1, 7), 1e30))}) == pytest.approx(1e60 * 63**0.5)


def test_sizes_of_honest_clients_pass_whatever_they_do_from_round_to_round() -> None:
    limit = SizeLimit(10)
    for scale in (0.01, 1.0, 50.0, 0.02):  # a learning rate that warms up and falls
        assert limit.exceeding({1: scale, 2: 3 * scale, 3: 0.5 * scale}) == {}
        assert limit.exceeding({1: scale, 2: 3 * scale}) == {}
        assert limit.exceeding({1: scale}) == {}


def test_a_size_beyond_the_limit_is_named_and_leaves_no_trace() -> None:
    limit = SizeLimit(10)
    assert limit.exceeding({1: 1.0, 2: 2.0, 3: 1000.0}) == {3: 500.0}
    for _ in range(5):  # the same again: the median is still that of the others
        assert limit.exceeding({1: 1.0, 2: 2.0, 3: 1000.0}).keys() == {3}


def test_with_two_clients_the_round_before_tells_who_lies() -> None:
    limit = SizeLimit(10)
    assert limit.exceeding({1: 1.0, 2: 2.0}) == {}
    assert limit.exceeding({1: 1.0, 2: 1000.0}).keys() == {2}
    assert limit.exceeding({1: 1.0, 2: 1e-9}) == {}, "a small update refuses nobody"


def test_half_of_the_clients_cannot_refuse_the_others() -> None:
    limit = SizeLimit(10)
    assert limit.exceeding({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}) == {}
    assert limit.exceeding({1: 1.0, 2: 1.0, 3: 500.0, 4: 500.0}).keys() == {3, 4}
    assert limit.exceeding({1: 1.0, 2: 1.0, 3: 1e-9, 4: 1e-9}) == {}


def test_without_a_limit_everything_passes() -> None:
    assert SizeLimit(0).exceeding({1: 1.0, 2: 1.0, 3: 1e300}) == {}
