"""The picture of a forecast, and what other budgets would gain."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from hsplitlora_flwr.cli.forecast import Forecast, over_budgets, usual_budgets
from hsplitlora_flwr.cli.plan import Options, run
from hsplitlora_flwr.cli.plan_page import gains, plan_page
from tests.cli.conftest import PROCESS_BYTES
from tests.cli.test_plan import composed, planned
from tests.tiny import BLOCKS

pytestmark = pytest.mark.usefixtures("known_process")

SPEEDS = ("clients.gflops=[1,2,4]", "plan.server_gflops=8")


def test_every_client_has_its_blocks_its_memory_and_its_seconds(folder: Path) -> None:
    result = planned(folder, "clients.memory_gb=[1,2,3]", *SPEEDS)
    text = plan_page(result, {})
    splits = [client.split for client in result.plan.clients.values()]
    assert text.count(": client</title>") == sum(splits)
    assert text.count(": server</title>") == 3 * BLOCKS - sum(splits)
    assert text.count("<title>budget</title>") == 3
    assert f"<title>process: {PROCESS_BYTES / 1e9:.2f} GB</title>" in text
    assert "Seconds of a round" in text
    assert f"A round takes {result.plan.seconds:.3g} s" in text
    assert "Other budgets" not in text
    assert "Seconds of a round" not in plan_page(planned(folder, "clients.memory_gb=[1]"), {})


def test_the_page_escapes_what_it_is_told_and_needs_nothing_from_elsewhere(folder: Path) -> None:
    text = plan_page(planned(folder, "clients.memory_gb=[1]"), {0.1: "<b>no plan</b>"})
    assert "&lt;b&gt;no plan" in text
    assert "&lt;the last run here&gt;" in text
    assert not re.findall(r'(?:src|href)="', text)


def test_other_budgets_are_those_of_a_client_alone(folder: Path) -> None:
    base = planned(folder, "clients.memory_gb=[1,2,3]", *SPEEDS).config
    least = PROCESS_BYTES / 1e9
    found = over_budgets(base, [2.0, least, 1.0])
    assert list(found) == [least, 1.0, 2.0]
    assert "no client can hold" in str(found[least])
    alone = planned(folder, "clients.memory_gb=[2]", "clients.count=1", "clients.gflops=[1]", "plan.server_gflops=8")
    assert isinstance(found[2.0], Forecast)
    assert found[2.0].plan == alone.plan


def test_a_step_up_says_what_it_gains(folder: Path) -> None:
    """From memory for the weights alone, where a client computes forward, to enough for all that a plan wants."""
    base = planned(folder, "clients.memory_gb=[1]").config
    found = over_budgets(
        base, [(PROCESS_BYTES + extra) / 1e9 for extra in (270_000, 350_000, 450_000, 10**9, 2 * 10**9)]
    )
    plans = {gb: each for gb, each in found.items() if isinstance(each, Forecast)}
    assert len(plans) == 5
    assert next(iter(plans.values())).plan.clients["0"].forward_only
    told = gains(plans)
    worth = [each.plan.objective for each in plans.values()]
    for text, before, after in zip(told, worth, worth[1:], strict=False):
        assert ("a plan worth" in text) == (before > 0 and after / before >= 1.001)
    assert "you gain a client that trains, a plan worth" in told[0]
    assert told[-1] == "With 2.25 GB instead of 1.25 you gain nothing."


def test_the_usual_budgets_lie_around_those_that_are_stated(folder: Path) -> None:
    config = planned(folder, "clients.memory_gb=[6,8,6]").config
    assert usual_budgets(config) == [3.0, 4.5, 6.0, 8.0, 12.0, 16.0]


def test_options_stand_among_settings() -> None:
    options, rest = Options.take(["train.rounds=2", "--budgets", "6,8", "-m", "--page", "x.html"])
    assert (options.page, options.budgets, rest) == ("x.html", (6.0, 8.0), ["train.rounds=2", "-m"])
    assert Options.take([])[0] == Options("plan.html", ())


def test_the_command_writes_the_page(folder: Path, tmp_path: Path) -> None:
    out, page = io.StringIO(), tmp_path / "plan.html"
    settings = composed(folder, "clients.memory_gb=[1]")
    assert run(settings, Console(file=out, width=200), Options(str(page), (1.0, 2.0))) == 0
    assert "With 2 GB instead of 1 you gain" in page.read_text()
    assert "With 2 GB instead of 1 you gain" in out.getvalue()
    assert str(page) in out.getvalue()
