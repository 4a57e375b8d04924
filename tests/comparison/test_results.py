"""The numbers of a comparison against hand-calculated ones."""

import math
from typing import Any

import numpy as np
import pytest

from hsplitlora_flwr.comparison.plots import AXES, curve
from hsplitlora_flwr.comparison.results import (
    CENTRAL,
    Comparison,
    Result,
    Spread,
    amount_by,
    measurements,
    rounds_to,
    spread,
)
from hsplitlora_flwr.comparison.table import Tuning, cell, render


def result(method: str, seed: int, perplexities: list[float], *, setting: str = "uneven", **fields: Any) -> Result:
    """100 tokens and 4 MB a round."""
    rounds = len(perplexities) - 1
    sent: dict[str, Any] = {"tokens": [100] * rounds, "bytes_up": [3_000_000] * rounds, "bytes_down": [10**6] * rounds}
    return Result(setting, method, seed, 1e-3, {}, perplexities=perplexities, **sent | fields)


def comparison(*results: Result, target: float | str = "hetlora") -> Comparison:
    return Comparison(["uneven"], ["hsplitlora", "hetlora", "cenlora"], [1, 2], results, target)


def test_rounds_are_interpolated_up_to_the_first_round_at_or_below_the_target():
    curve = [15.0, 7.0, 5.0, 6.0, 4.0]
    assert rounds_to(curve, 11.0) == 0.5
    assert rounds_to(curve, 5.5) == 1.75  # though round 3 is above it again
    assert rounds_to(curve, 5.0) == 2.0
    assert rounds_to(curve, 4.5) == 3.75
    assert rounds_to(curve, 3.9) == math.inf
    assert rounds_to(curve, 20.0) == 0.0


def test_amounts_follow_the_rounds():
    assert amount_by([10, 20, 40], 0.0) == 0
    assert amount_by([10, 20, 40], 1.75) == 25
    assert amount_by([10, 20, 40], 3.0) == 70
    assert amount_by([10, 20, 40], math.inf) == math.inf


def test_a_spread_is_over_those_that_reach_the_target():
    assert spread([1.0, 2.0, 4.0, None]) == Spread(7 / 3, pytest.approx(math.sqrt(7 / 3)), 3)  # type: ignore[arg-type]
    assert spread([2.0, math.inf]) == Spread(2.0, None, 1, 1)
    assert spread([math.inf, math.inf]) == Spread(None, None, 0, 2)
    assert spread([None]) == Spread(None, None, 0)


def test_measurements_add_up_clients_and_take_the_worst_memory():
    def row(parameters: int, measured: int, budget: int | None) -> dict[str, int]:
        numbers = {"trainable_parameters": parameters, "measured_bytes": measured, "tokens": 10, "bytes_up": 5}
        return (
            numbers
            | {"bytes_down": 7, "predicted_bytes": measured - 50}
            | ({} if budget is None else {"budget_bytes": budget})
        )

    summary = {
        "status": "finished",
        "versions": {"torch": "2.13"},
        "perplexity_before": 15.0,
        "seconds": 60.0,
        "rounds": [
            {"perplexity": 6.0, "clients": [row(100, 900, 1000), row(300, 3000, 2000)]},
            {"perplexity": 5.0, "clients": [row(200, 1100, 1000)]},
            {"perplexity": 4.0, "clients": [row(200, 4000, None)]},
        ],
    }
    assert measurements(summary) == {
        "versions": {"torch": "2.13"},
        "perplexities": [15.0, 6.0, 5.0, 4.0],
        "tokens": [20, 10, 10],
        "bytes_up": [10, 5, 5],
        "bytes_down": [14, 7, 7],
        "trainable_parameters": 200,
        "predicted_bytes": 3950,
        "peak_bytes": 4000,
        "peak_share": 1.5,
        "seconds": 60.0,
    }
    with pytest.raises(ValueError, match="says 'failed' after 3 rounds"):
        measurements(summary | {"status": "failed"})


PAIRS = (
    result("hsplitlora", 1, [16.0, 8.0, 4.0]),
    result("hsplitlora", 2, [16.0, 6.0, 3.0]),
    result("hetlora", 1, [16.0, 10.0, 6.0]),
    result("hetlora", 2, [16.0, 11.0, 6.0]),
)


def test_the_target_of_a_method_is_its_final_perplexity_with_the_same_seed():
    # hetlora ends at 6 after 2 rounds; hsplitlora falls from 8 to 4 in round 2 (1.5), and to 6 in round 1 (1).
    found = comparison(*PAIRS)
    assert found.spread("rounds_to_target", "uneven", "hsplitlora") == Spread(1.25, pytest.approx(0.125**0.5), 2)  # type: ignore[arg-type]
    assert found.spread("rounds_to_target", "uneven", "hetlora") == Spread(2.0, 0.0, 2)
    assert found.spread("bytes_to_target", "uneven", "hsplitlora").mean == 5_000_000
    assert found.spread("tokens_to_target", "uneven", "hsplitlora").mean == 125


def test_ratios_are_taken_seed_by_seed():
    found = comparison(*PAIRS)
    # 6/4 and 6/3, not 6/3.5
    assert found.ratio("final_perplexity", "uneven", "hetlora") == Spread(1.75, pytest.approx(0.125**0.5), 2)  # type: ignore[arg-type]
    # 2/1.5 and 2/1
    assert found.ratio("rounds_to_target", "uneven", "hetlora").mean == pytest.approx(5 / 3)


def test_the_verdict_compares_with_central_training_and_with_what_rivals_need():
    central = [result("cenlora", 1, [16.0, 3.2], setting=CENTRAL), result("cenlora", 2, [16.0, 3.0], setting=CENTRAL)]
    over_central, rounds_of_hetlora, rounds_of_splitlora, *times = (
        comparison(*PAIRS, *central).verdict("uneven").values()
    )
    assert over_central.mean == pytest.approx((4 / 3.2 + 3 / 3) / 2)
    assert rounds_of_hetlora.mean == pytest.approx((1.5 / 2 + 1 / 2) / 2)
    assert rounds_of_splitlora.n == 0
    assert [time.n for time in times] == [0] * 4  # no speeds are stated


def test_a_rival_that_needed_fewer_rounds_than_it_ran_is_taken_at_its_best():
    rival = result("hetlora", 1, [16.0, 4.0, 8.0])  # it ends at 8, where it was after 2/3 of a round
    ours = result("hsplitlora", 1, [16.0, 8.0, 4.0])
    assert list(comparison(ours, rival).verdict("uneven").values())[1].mean == pytest.approx(1 / (2 / 3))


def test_failed_and_missing_runs_count_for_nothing():
    failed = Result("uneven", "hetlora", 2, 1e-3, {}, cause="Flower says finished:failed\nValueError: too hot")
    found = comparison(*PAIRS[:3], failed)
    assert found.spread("final_perplexity", "uneven", "hetlora") == Spread(6.0, None, 1)
    assert found.spread("rounds_to_target", "uneven", "hsplitlora") == Spread(1.5, None, 1)
    page = render(found, {"uneven": "about it"}, [])
    assert "- uneven, hetlora, seed 2: ValueError: too hot" in page


def test_cells():
    assert cell(Spread(5.0216, 0.0449, 3)) == "5.022 ± 0.045"
    assert cell(Spread(1.5, None, 1, 2)) == "1.500 (1 of 3)"
    assert cell(Spread(None, None, 0, 3)) == "not reached"
    assert cell(Spread(None, None, 0)) == "-"


def test_the_page_has_the_numbers_in_their_units():
    fields: dict[str, Any] = {
        "trainable_parameters": 2_500_000,
        "simulated": [20.0, 30.0],
        "predicted_bytes": 1_300_000_000,
        "peak_bytes": 1_230_000_000,
        "peak_share": 1.0333,
        "seconds": 61.4,
    }
    runs = [result("hsplitlora", seed, [16.0, 8.0, 4.0], **fields) for seed in (1, 2)]
    page = render(comparison(*runs, target=6.0), {"uneven": "about it"}, [])
    row = next(line for line in page.splitlines() if line.startswith("| hsplitlora |"))
    assert [part.strip() for part in row.strip("|").split("|")] == [
        "hsplitlora",
        "0.001",
        "2",
        "4.000 ± 0.000",
        "1.50 ± 0.00",
        "0.1 ± 0.0",  # 150 tokens
        "6.0 ± 0.0",
        "35.0 ± 0.0",
        "2.50 ± 0.00",
        "1.30 ± 0.00",
        "1.23 ± 0.00",
        "1.03 ± 0.00",
        "61 ± 0",
    ]
    assert "a perplexity of 6" in page


def test_the_page_has_the_verdict_as_far_as_the_runs_tell():
    page = render(comparison(*PAIRS), {"uneven": "about it"}, [])
    assert "final perplexity of hetlora / rounds of hetlora to it: **0.625 ± 0.177**" in page
    assert "| hetlora | 1.750 ± 0.354 | 1.667 ± 0.471 | - |" in page
    assert "of cenlora" not in page


def test_methods_that_send_nothing_have_no_bytes_to_a_target():
    central = result("cenlora", 1, [16.0, 3.0], setting=CENTRAL, bytes_up=[0], bytes_down=[0])
    assert comparison(central, target=4.0).spread("bytes_to_target", "uneven", "cenlora") == Spread(None, None, 0)


def test_the_choice_is_the_lowest_perplexity_and_says_when_it_is_an_end_of_the_grid():
    assert Tuning("uneven", "ffa", {1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0}).choice == 3e-3
    assert not Tuning("uneven", "ffa", {1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0}).at_edge
    assert Tuning("uneven", "ffa", {1e-3: 5.0, 3e-3: 4.0, 1e-2: None}).choice == 3e-3
    assert Tuning("uneven", "ffa", {1e-3: 4.0, 3e-3: 4.0}).choice == 1e-3
    assert Tuning("uneven", "ffa", {1e-3: 4.0, 3e-3: 5.0}).at_edge
    assert Tuning("uneven", "ffa", {1e-3: None}).choice is None


@pytest.mark.parametrize(
    ("trials", "beyond"),
    [
        ({1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0}, None),
        ({1e-3: 5.0, 3e-3: 4.0, 4e-3: None}, None),
        ({1e-3: 5.0, 2e-3: 4.5, 1e-2: 4.0}, 5e-2),
        ({1e-3: 4.0, 4e-3: 5.0}, 2.5e-4),
        ({1e-3: 4.0}, None),
        ({1e-3: None, 2e-3: None}, None),
    ],
)
def test_beyond_an_end_that_is_best_lies_the_next_rate(trials, beyond):
    assert Tuning("uneven", "ffa", trials).beyond == beyond


def test_curves_are_means_with_a_deviation():
    _, megabytes = AXES["bytes"]
    traffic, mean, sd = curve([result("ffa", 1, [16.0, 8.0, 4.0]), result("ffa", 2, [16.0, 6.0, 6.0])], megabytes)
    np.testing.assert_allclose(traffic, [0, 4, 8])
    np.testing.assert_allclose(mean, [16, 7, 5])
    np.testing.assert_allclose(sd, [0, math.sqrt(2), math.sqrt(2)])
    assert not curve([result("ffa", 1, [16.0, 8.0])], megabytes)[2].any()


def test_simulated_time_follows_the_rounds():
    ours = result("hsplitlora", 1, [16.0, 8.0, 4.0], simulated=[10.0, 20.0])
    rival = result("hetlora", 1, [16.0, 10.0, 6.0], simulated=[30.0, 40.0])
    central = result("cenlora", 1, [16.0, 8.0], setting=CENTRAL, simulated=[6.0], bytes_up=[0], bytes_down=[0])
    found = comparison(ours, rival, central)
    assert found.spread("simulated_to_target", "uneven", "hsplitlora").mean == 10 + 0.5 * 20  # 6 lies between 8 and 4
    assert found.spread("simulated_to_target", "uneven", "hetlora").mean == 70
    verdict = found.verdict("uneven")
    time = "simulated time of hsplitlora to the final perplexity of {} / of {} to it"
    assert verdict[time.format("hetlora", "hetlora")].mean == pytest.approx(20 / 70)
    assert verdict[time.format("cenlora", "cenlora")].mean == pytest.approx(10 / 6)
    assert verdict[time.format("splitlora", "splitlora")] == Spread(None, None, 0)


def test_an_interval_is_over_rows_which_are_the_same_in_all_runs():
    chance, rows = np.random.default_rng(7), 400
    tokens = chance.integers(1, 40, rows)
    nll = {method: [tokens * chance.normal(mean, 0.5, rows) for _ in range(2)] for method, mean in LOSSES.items()}
    runs = [
        result(method, seed, [16.0, 4.0], row_nll=own.tolist(), row_tokens=tokens.tolist())
        for method, per_seed in nll.items()
        for seed, own in enumerate(per_seed, start=1)
    ]
    found = comparison(*runs)
    # the accumulated method: a row moves the mean loss by its tokens times what its own mean lies above it
    perplexities, moves = [], []
    for own in nll["hsplitlora"]:
        perplexity = math.exp(own.sum() / tokens.sum())
        perplexities.append(perplexity)
        moves.append(perplexity * (own - tokens * own.sum() / tokens.sum()) / tokens.sum())
    centre, width = np.mean(perplexities), 1.96 * math.sqrt(float((np.mean(moves, axis=0) ** 2).sum()))
    low, high = found.interval("uneven", "hsplitlora") or (0.0, 0.0)
    assert (low, high) == pytest.approx((centre - width, centre + width), abs=0.15 * width)
    low, high = found.interval("uneven", "hetlora", "hsplitlora") or (0.0, 0.0)
    expected = np.mean([math.exp(own.sum() / tokens.sum()) for own in nll["hetlora"]]) / centre
    assert low < expected < high and low > 1.0
    assert found.interval("uneven", "cenlora") is None
    other = result("hetlora", 1, [16.0, 4.0], row_nll=[1.0], row_tokens=[1])
    assert comparison(runs[0], other).interval("uneven", "hetlora", "hsplitlora") is None
    assert f"[{found.interval('uneven', 'hsplitlora')[0]:.3f}, " in render(found, {"uneven": ""}, [])  # type: ignore[index]


LOSSES = {"hsplitlora": 1.3, "hetlora": 1.6}
