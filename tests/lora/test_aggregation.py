"""Every aggregation rule against a few lines of NumPy in fp64, and what a rule must refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.lora.aggregation import (
    RULES,
    AggregationError,
    Factors,
    SharedUpdate,
    aggregate,
    directions,
    pad,
    residual,
    truncate,
)

Array = npt.NDArray[np.float64]
Update = dict[str, Factors]

# The third is square: there B and A of rank 6 cannot be told apart by their shapes.
LAYERS = {"model.layers.0.q": (12, 8), "model.layers.0.k": (4, 8), "model.layers.0.o": (6, 6), "lm.up": (20, 8)}


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Update], list[float]]:
    """Clients with any ranks from 1 up, any scales, any holders, and any weights."""
    count = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    updates: list[Update] = []
    for _ in range(count):
        update = {}
        for name, (rows, columns) in LAYERS.items():
            rank = draw(st.integers(0, 6))
            if rank:
                scale = draw(st.floats(0.01, 100))
                update[name] = random_factors(generator, rows, rank, columns, scale)
        updates.append(update)
    return updates, draw(st.lists(st.floats(0.001, 1e6), min_size=count, max_size=count))


def random_factors(generator: torch.Generator, rows: int, rank: int, columns: int, scale: float = 1.0) -> Factors:
    b = torch.randn(rows, rank, generator=generator)
    return b, scale * torch.randn(rank, columns, generator=generator)


def one_rank_round() -> tuple[list[Update], list[float]]:
    """Three clients of rank 6 on every layer, with uneven weights."""
    generator = torch.Generator().manual_seed(0)
    updates = [{name: random_factors(generator, out, 6, cols) for name, (out, cols) in LAYERS.items()} for _ in "abc"]
    return updates, [1.0, 2.0, 5.0]


def mixed_round() -> tuple[list[Update], list[float]]:
    """Ranks 1, 4 and 6, where the last client holds half of the layers, with uneven weights."""
    generator = torch.Generator().manual_seed(1)
    updates = [
        {name: random_factors(generator, out, rank, cols) for name, (out, cols) in list(LAYERS.items())[first:]}
        for rank, first in ((1, 0), (4, 0), (6, 2))
    ]
    return updates, [3.0, 1.0, 6.0]


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.numpy().astype(np.float64)


def product(factors: Factors) -> Array:
    return numbers(factors[0]) @ numbers(factors[1])


def dense_sum(updates: list[Update], weights: list[float], name: str) -> tuple[Array, float]:
    """``sum_i p_i B_i A_i``, and the sum of the norms of its terms.

    Errors are relative to the latter: terms may cancel, and then nothing small is left to be relative to.
    """
    terms = [
        weight / sum(weights) * product(update[name])
        for weight, update in zip(weights, updates, strict=True)
        if name in update
    ]
    return np.sum(terms, axis=0), float(sum(np.linalg.norm(term) for term in terms))


def padded_means(updates: list[Update], weights: list[float], name: str, by_norm: bool = False) -> tuple[Array, Array]:
    """Zero padding entry by entry: a client adds what it has to the corner that it covers."""
    rows, columns = LAYERS[name]
    rank = max(update[name][0].shape[1] for update in updates if name in update)
    if by_norm:
        weights = [float(np.linalg.norm(product(update[name]))) if name in update else 0.0 for update in updates]
    b, a = np.zeros((rows, rank)), np.zeros((rank, columns))
    for weight, update in zip(weights, updates, strict=True):
        if name in update:
            mine_b, mine_a = (numbers(part) for part in update[name])
            b[:, : mine_b.shape[1]] += weight / sum(weights) * mine_b
            a[: mine_a.shape[0]] += weight / sum(weights) * mine_a
    return b, a


# ---------------------------------------------------------------------- rules that keep the sum of the products


@pytest.mark.parametrize("rule", ["noise_free", "svd"])
@settings(max_examples=150, deadline=None)
@given(case=rounds())
def test_equals_the_dense_weighted_sum(rule: str, case: tuple[list[Update], list[float]]) -> None:
    updates, weights = case
    result = aggregate(updates, weights, rule)
    assert result.keys() == {name for update in updates for name in update}
    for name, factors in result.items():
        expected, size = dense_sum(updates, weights, name)
        assert np.linalg.norm(product(factors) - expected) <= 1e-6 * size


@settings(max_examples=100, deadline=None)
@given(rounds())
def test_svd_truncates_to_the_best_approximation_of_every_rank(case: tuple[list[Update], list[float]]) -> None:
    updates, weights = case
    for name, factors in aggregate(updates, weights, "svd").items():
        expected, size = dense_sum(updates, weights, name)
        sigma = np.linalg.svd(expected, compute_uv=False)
        assert 1 <= factors[0].shape[1] <= len(sigma)
        for rank in range(len(sigma) + 1):
            error = np.linalg.norm(product(truncate(factors, rank)) - expected)
            assert abs(error - np.linalg.norm(sigma[rank:])) <= 2e-6 * size  # Eckart-Young


def test_svd_balances_both_factors_and_orders_them_by_singular_value() -> None:
    updates, weights = mixed_round()
    for name, (b, a) in aggregate(updates, weights, "svd").items():
        sigma = np.linalg.svd(dense_sum(updates, weights, name)[0], compute_uv=False)[: b.shape[1]]
        np.testing.assert_allclose(numbers(b).T @ numbers(b), np.diag(sigma), atol=1e-5 * sigma[0])
        np.testing.assert_allclose(numbers(a) @ numbers(a).T, np.diag(sigma), atol=1e-5 * sigma[0])
        assert b.is_contiguous()
        assert a.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_drops_what_is_numerically_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (part.to(dtype) for part in random_factors(generator, 30, 3, 20))
    other = random_factors(generator, 30, 3, 20)[1].to(dtype)
    updates = [{"w": (b, a)}, {"w": (torch.cat([b, b], dim=1), torch.cat([a, other]))}]  # rank 9 on paper, 3 in truth
    factors = aggregate(updates, [1, 2], "svd")["w"]
    assert factors[0].shape == (30, 3)
    expected = numbers(b) @ (numbers(a) + 2 / 3 * numbers(other))
    assert np.linalg.norm(product(factors) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_svd_of_zero_has_rank_1() -> None:
    b, a = aggregate([{"w": (torch.zeros(5, 3), torch.ones(3, 4))}], [1], "svd")["w"]
    assert (b.shape, a.shape) == ((5, 1), (1, 4))
    assert not (b @ a).any()


def test_mean_b_over_a_shared_a_is_the_mean_and_free_of_noise() -> None:
    updates, weights = one_rank_round()
    frozen = {name: a for name, (_, a) in updates[0].items()}
    updates = [{name: (b, frozen[name]) for name, (b, _) in update.items()} for update in updates]
    for name, (b, a) in aggregate(updates, weights, "mean_b").items():
        assert torch.equal(a, frozen[name])
        expected = (1 * numbers(updates[0][name][0]) + 2 * numbers(updates[1][name][0])) / 8
        np.testing.assert_allclose(numbers(b), expected + 5 / 8 * numbers(updates[2][name][0]), rtol=1e-6, atol=1e-6)
        dense, size = dense_sum(updates, weights, name)
        assert np.linalg.norm(product((b, a)) - dense) <= 1e-6 * size


# ---------------------------------------------------------------------------------- rules that mean the factors


def test_mean_is_the_weighted_mean_of_each_factor() -> None:
    updates, weights = one_rank_round()
    for name, (b, a) in aggregate(updates, weights, "mean").items():
        shares = np.array([1, 2, 5]) / 8
        expected_b = np.einsum("i,ior->or", shares, np.stack([numbers(update[name][0]) for update in updates]))
        expected_a = np.einsum("i,irc->rc", shares, np.stack([numbers(update[name][1]) for update in updates]))
        np.testing.assert_allclose(numbers(b), expected_b, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(numbers(a), expected_a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rule", "by_norm"), [("zero_pad", False), ("zero_pad_by_norm", True)])
def test_zero_padding_is_the_mean_over_the_corners(rule: str, by_norm: bool) -> None:
    updates, weights = mixed_round()
    for name, (b, a) in aggregate(updates, weights, rule).items():
        expected_b, expected_a = padded_means(updates, weights, name, by_norm)
        assert (b.shape, a.shape) == (expected_b.shape, expected_a.shape)
        np.testing.assert_allclose(numbers(b), expected_b, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(numbers(a), expected_a, rtol=1e-6, atol=1e-6)


def test_weights_by_norm_follow_the_product_and_not_the_examples() -> None:
    """A large ``B`` that meets a small ``A`` counts by the product; the numbers of examples do not count."""
    loud = torch.tensor([[100.0], [0.0]]), torch.tensor([[0.03, 0.04]])  # norm of the product: 5
    quiet = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0, 4.0]])  # 5 too
    for weights in ([1.0, 1.0], [1.0, 99.0]):
        b, a = aggregate([{"w": loud}, {"w": quiet}], weights, "zero_pad_by_norm")["w"]
        torch.testing.assert_close(b, torch.tensor([[50.0], [0.5]]))
        torch.testing.assert_close(a, torch.tensor([[1.515, 2.02]]))


def test_weights_by_norm_are_the_shares_when_every_norm_is_zero() -> None:
    updates = [{"w": (torch.zeros(3, rank), torch.full((rank, 2), float(rank)))} for rank in (1, 2)]
    _, a = aggregate(updates, [3, 1], "zero_pad_by_norm")["w"]
    torch.testing.assert_close(a, torch.tensor([[0.75 * 1 + 0.25 * 2] * 2, [0.25 * 2] * 2]))


@pytest.mark.parametrize("rule", ["mean", "zero_pad", "zero_pad_by_norm"])
def test_means_of_the_factors_are_noisy(rule: str) -> None:
    """The mistake that the noise-free rule is named after: one client's B meets another client's A."""
    updates, weights = one_rank_round()
    noisy, exact = aggregate(updates, weights, rule), aggregate(updates, weights)
    for name in LAYERS:
        error = np.linalg.norm(product(noisy[name]) - product(exact[name]))
        assert error > 0.1 * np.linalg.norm(product(exact[name]))


# ------------------------------------------------------------------------------------------------ every rule


@pytest.mark.parametrize("rule", RULES)
def test_clients_that_agree_are_left_as_they_are(rule: str) -> None:
    """Fails where weights do not sum to 1 or are applied to both factors of one product."""
    (update, *_), _ = one_rank_round()
    for name, factors in aggregate([update] * 4, [1, 2, 3, 10], rule).items():
        expected = product(update[name])
        assert np.linalg.norm(product(factors) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("rule", RULES)
def test_one_client_is_its_own_sum(rule: str) -> None:
    updates, _ = mixed_round()
    for update in updates:
        for name, factors in aggregate([update], [7], rule).items():
            np.testing.assert_allclose(product(factors), product(update[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("given_dtypes", "expected"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_result_has_the_dtype_of_the_clients_and_fp32_at_least(
    rule: str, given_dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    factors = torch.ones(3, 2), torch.full((2, 4), 0.5)
    updates = [{"w": (factors[0].to(dtype), factors[1].to(dtype))} for dtype in given_dtypes]
    b, a = aggregate(updates, [1, 2], rule)["w"]
    assert (b.dtype, a.dtype) == (expected, expected)
    torch.testing.assert_close(b @ a, torch.ones(3, 4, dtype=expected))  # 1/3 in bf16 would be off by 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_rank_0_everywhere_stays_rank_0(rule: str) -> None:
    b, a = aggregate([{"w": (torch.zeros(3, 0), torch.zeros(0, 4))}] * 2, [1, 2], rule)["w"]
    assert (b.shape, a.shape) == ((3, 0), (0, 4))


@pytest.mark.parametrize("rule", ["noise_free", "svd", "zero_pad", "zero_pad_by_norm"])
def test_a_client_without_the_layer_counts_as_an_adapter_of_zero(rule: str) -> None:
    factors = random_factors(torch.Generator().manual_seed(0), 5, 2, 4)
    absent = aggregate([{"w": factors}, {}], [1, 3], rule)["w"]
    zero = aggregate([{"w": factors}, {"w": (torch.zeros(5, 2), torch.zeros(2, 4))}], [1, 3], rule)["w"]
    np.testing.assert_allclose(product(absent), product(zero), rtol=1e-5, atol=1e-6)
    share = {"zero_pad": 1 / 16, "zero_pad_by_norm": 1}.get(rule, 1 / 4)
    np.testing.assert_allclose(product(absent), share * product(factors), rtol=1e-5, atol=1e-6)


def test_directions_are_those_in_which_an_update_is_largest() -> None:
    updates, weights = mixed_round()
    for name, factors in aggregate(updates, weights).items():
        _, sigma, right = np.linalg.svd(dense_sum(updates, weights, name)[0], full_matrices=False)
        rank = int((sigma > 1e-6 * sigma[0]).sum())
        for wanted in (0, 2, 64):
            b, a = directions(factors, wanted)
            assert (b.shape, a.dtype) == ((len(factors[0]), 0), factors[1].dtype)
            kept = min(wanted, rank)
            assert a.shape == (kept, right.shape[1])
            np.testing.assert_allclose(np.abs(numbers(a) @ right[:kept].T), np.eye(kept), atol=1e-5)


# ------------------------------------------------------------------------------------------ truncate and pad


def test_truncate_keeps_the_first_ranks_as_copies_that_are_contiguous() -> None:
    a, b = (part.T for part in random_factors(torch.Generator().manual_seed(0), 3, 4, 5))  # transposed storage
    for rank, kept in ((0, 0), (1, 1), (3, 3), (4, 4), (9, 4)):
        short_b, short_a = truncate((b, a), rank)
        assert torch.equal(short_b, torch.stack([b[:, k] for k in range(kept)], dim=1) if kept else torch.empty(5, 0))
        assert torch.equal(short_a, torch.stack([a[k] for k in range(kept)]) if kept else torch.empty(0, 3))
        for part in (short_b, short_a):
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.nbytes


def test_pad_adds_ranks_of_zero_behind_the_others() -> None:
    b, a = random_factors(torch.Generator().manual_seed(0), 5, 2, 3)
    long_b, long_a = pad((b, a), 4)
    assert torch.equal(long_b, torch.cat([b, torch.zeros(5, 2)], dim=1))
    assert torch.equal(long_a, torch.cat([a, torch.zeros(2, 3)]))
    back = truncate((long_b, long_a), 2)
    assert torch.equal(back[0], b)
    assert torch.equal(back[1], a)


@pytest.mark.parametrize(
    ("function", "rank", "says"), [(truncate, -1, "rank -1 is negative"), (pad, 1, "rank 2 cannot be padded to rank 1")]
)
def test_truncate_and_pad_refuse_ranks(function: Callable[[Factors, int], Factors], rank: int, says: str) -> None:
    with pytest.raises(AggregationError, match=says):
        function((torch.ones(3, 2), torch.ones(2, 3)), rank)


# -------------------------------------------------------------------------------------------- what is refused

ONE = (torch.ones(2, 1), torch.ones(1, 2))
FOUR = (torch.ones(2, 4), torch.ones(4, 2))


@pytest.mark.parametrize("rule", ["mean", "mean_b"])
@pytest.mark.parametrize(
    ("updates", "ranks"),
    [
        ([{"w": FOUR}, {"w": ONE}], r"\[4, 1\]"),  # rank 1 would broadcast
        ([{"w": FOUR}, {"v": FOUR, "w": FOUR}], r"\[0, 4\]"),
    ],
)
def test_means_refuse_uneven_ranks_and_holders(rule: str, updates: list[Update], ranks: str) -> None:
    with pytest.raises(AggregationError, match=rf"layer '[vw]': the clients' ranks are {ranks}.*same rank.*zero_pad"):
        aggregate(updates, [1, 1], rule)


def test_mean_b_refuses_an_a_that_was_trained() -> None:
    moved = FOUR[0], FOUR[1] + 0.25
    with pytest.raises(AggregationError, match=r"layer 'w': A of updates\[1\] differs .* 0\.25; .* train B alone"):
        aggregate([{"w": FOUR}, {"w": moved}], [1, 1], "mean_b")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("updates", "weights", "says"),
    [
        ([], [], "0 updates"),
        ([{"w": ONE}], [1, 2], "one weight per update"),
        ([{"w": ONE}, {"w": ONE}], [-1, 2], "not negative"),
        ([{"w": ONE}], [0], "not all zero"),
        ([{"w": ONE}], [float("nan")], "finite"),
        ([{"w": ONE}, {"w": ONE}], [1, float("inf")], "finite"),
        ([{"w": (ONE[0], torch.ones(2, 2))}], [1], r"layer 'w': B \(2, 1\) and A \(2, 2\) of updates\[0\]"),
        ([{"w": (ONE[0], torch.ones(2))}], [1], r"\(r, in\) are needed"),
        ([{"w": ONE}, {"w": (torch.ones(3, 1), ONE[1])}], [1, 1], r"layer 'w'.*\(3, 2\)"),
        ([{"w": ONE}, {"w": (ONE[0], ONE[1] * float("nan"))}], [1, 1], r"layer 'w'.*updates\[1\] is not finite"),
    ],
)
def test_refuses_what_cannot_be_summed(rule: str, updates: list[Update], weights: list[float], says: str) -> None:
    with pytest.raises(AggregationError, match=says):
        aggregate(updates, weights, rule)


def test_unknown_rule() -> None:
    with pytest.raises(AggregationError, match="rule 'median' is unknown; choose one of noise_free, mean, mean_b, "):
        aggregate([{"w": ONE}], [1], rule="median")


@st.composite
def shared_rounds(draw: st.DrawFn) -> tuple[list[Update], list[float], SharedUpdate]:
    """A round whose clients trained some adapters together, another set of them on every layer."""
    updates, weights = draw(rounds())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    together: Update = {}
    trained_by: dict[str, list[int]] = {}
    for name, (rows, columns) in LAYERS.items():
        if rank := draw(st.integers(0, 4)):
            together[name] = random_factors(generator, rows, rank, columns)
            trained_by[name] = sorted(draw(st.sets(st.integers(0, len(updates) - 1))))
            for index in trained_by[name]:
                updates[index].pop(name, None)
    return updates, weights, SharedUpdate(together, trained_by)


@settings(max_examples=100, deadline=None)
@given(shared_rounds())
def test_a_shared_adapter_has_the_weights_of_all_that_trained_it(
    instance: tuple[list[Update], list[float], SharedUpdate],
) -> None:
    updates, weights, shared = instance
    found = aggregate(updates, weights, shared=shared)
    for name in LAYERS:
        copies = [dict(update) for update in updates]
        for index in shared.trained_by.get(name, ()):  # as if each of them had it as its own
            copies[index][name] = shared.adapters[name]
        expected, size = dense_sum(copies, weights, name)
        assert (name in found) == any(name in copy for copy in copies)
        if name in found:
            assert np.linalg.norm(product(found[name]) - expected) <= 1e-6 * size
            own = sum(update[name][0].shape[1] for update in updates if name in update)
            once = shared.adapters[name][0].shape[1] if shared.trained_by.get(name) else 0
            assert found[name][0].shape[1] == own + once, "it stands in the sum once"


def test_means_of_factors_take_a_shared_adapter_as_one_client_with_the_weights_of_all() -> None:
    updates, weights = mixed_round()
    name = next(iter(LAYERS))
    generator = torch.Generator().manual_seed(2)
    together = random_factors(generator, *(LAYERS[name][0], 3, LAYERS[name][1]))
    for index in (0, 2):
        updates[index].pop(name, None)
    b, a = aggregate(updates, weights, "zero_pad", SharedUpdate({name: together}, {name: [0, 2]}))[name]
    (own_b, own_a), p = updates[1][name], np.array(weights) / sum(weights)
    pads = ((0, 0), (0, 1)), ((0, 1), (0, 0))  # rank 3 beside rank 4
    expected_b = p[1] * numbers(own_b) + (p[0] + p[2]) * np.pad(numbers(together[0]), pads[0])
    expected_a = p[1] * numbers(own_a) + (p[0] + p[2]) * np.pad(numbers(together[1]), pads[1])
    np.testing.assert_allclose(numbers(b), expected_b, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(numbers(a), expected_a, rtol=1e-6, atol=1e-7)


def test_a_client_does_not_count_twice_on_a_layer() -> None:
    updates, weights = one_rank_round()
    name = next(iter(LAYERS))
    shared = SharedUpdate({name: updates[0][name]}, {name: [1]})
    with pytest.raises(AggregationError, match=r"layer 'model.layers.0.q': updates\[1\] hold an adapter of their own"):
        aggregate(updates, weights, shared=shared)


def test_means_and_their_residual_are_the_exact_sum() -> None:
    """FedEx-LoRA: ``sum p_i B_i A_i - (sum p_i B_i)(sum p_i A_i)`` goes into the weights, the means go on."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(6, 3)), rng.normal(size=(3, 5))) for _ in range(4)]
    weights = [1.0, 2.0, 3.0, 10.0]
    updates = [{"a": (torch.from_numpy(b), torch.from_numpy(a))} for b, a in pairs]
    adapter = aggregate(updates, weights, "mean")
    b, a = (factor.numpy() for factor in residual(updates, weights, adapter)["a"])
    shares = np.array(weights) / 16
    exact = np.sum([p * left @ right for p, (left, right) in zip(shares, pairs, strict=True)], axis=0)
    means = [np.sum([p * pair[i] for p, pair in zip(shares, pairs, strict=True)], axis=0) for i in (0, 1)]
    for found, mean in zip(adapter["a"], means, strict=True):
        np.testing.assert_allclose(found.numpy(), mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(b @ a, exact - means[0] @ means[1], rtol=0, atol=1e-12)
    assert np.abs(exact - means[0] @ means[1]).max() > 0.1
