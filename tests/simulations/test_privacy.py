"""The study of leakage: what it trains and measures, and that nothing is measured twice."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from hsplitlora_flwr.config import Config, SplitConfig
from simulations import privacy
from simulations.privacy import PLAIN_CUT, Cell, Deal, perplexity, priced, told_apart


@pytest.fixture
def deal(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deal:
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"{number} " + "abc" * (3 + number % 5), "group": str(number % 4)} for number in range(60)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    monkeypatch.setattr(privacy, "STEPS", 6)
    monkeypatch.setattr(privacy, "WIDTH", 8)
    settings = {"model.path": str(tiny_folder), "data.source": "jsonl", "data.path": str(rows), "data.eval_rows": 8}
    return Deal(Config.from_run_config(settings), 0, tmp_path / "work", [2], read=5)


@pytest.mark.parametrize(("protect", "weight"), [(PLAIN_CUT, None), (SplitConfig(width=8), None), (PLAIN_CUT, 1.0)])
def test_training_behind_a_protection_is_priced_and_leaves_the_base(
    deal: Deal, protect: SplitConfig, weight: float | None
) -> None:
    before = perplexity(deal.base, deal.held_out)
    found = priced(deal, 2, protect, weight, "regression" if weight else "")
    assert found["perplexity_before"] == pytest.approx(before) and found["perplexity"] < before
    assert ("recovered" in found) == bool(weight)
    assert perplexity(deal.base, deal.held_out) == pytest.approx(before)


def test_the_right_token_is_told_by_what_came_unless_noise_is_large(
    deal: Deal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "SPLIT", 2)
    monkeypatch.setattr(privacy, "CANDIDATES", 20)
    noisy = SplitConfig(width=8, clip=1.5, noise=40.0)
    right = [told_apart(deal, protect)["right"] for protect in (PLAIN_CUT, SplitConfig(width=8), noisy)]
    assert right[0] > 0.8 and right[1] > 0.8 and right[2] < 0.4  # by chance one of twenty


def test_a_row_that_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(attack: str) -> dict[str, float]:
        measured.append(attack)
        return {"recovered": 0.5}

    def part(of: object, attack: str) -> list[Cell]:
        return [Cell({"split": split}, partial(measure, attack)) for split in (1, 2)]

    monkeypatch.setattr(privacy, "PARTS", {"part": part})
    monkeypatch.setattr(privacy, "Deal", lambda *_: None)
    for seeds in ("0", "0,1"):
        assert privacy.main(["--seeds", seeds, "--out", str(tmp_path)]) == 0
    assert len(measured) == 4
    rows = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert [(row["seed"], row["split"], row["recovered"]) for row in rows] == [
        (seed, split, 0.5) for seed in (0, 1) for split in (1, 2)
    ]
