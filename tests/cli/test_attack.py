"""The attack as it is typed: a table on the terminal, and a file that plans read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hsplitlora_flwr.cli.attack import deal, main
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.planning.leakage import LeakageTable


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator = random.Random(0)
    file = tmp_path / "rows.jsonl"
    texts = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=20)) for _ in range(120)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_it_writes_what_plans_read(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "leakage.json"
    settings = [f"model.path={tiny_folder}", "data=jsonl", f"data.path={rows}", "data.eval_rows=10"]
    options = ["--splits", "3,1", "--attacks", "nearest,regression", "--seeds", "0,1", "--out", str(out)]
    assert main([*options, *settings, "data.partition=iid"]) == 0
    page = json.loads(out.read_text())
    assert [(row["seed"], row["split"], row["attack"]) for row in page["attacks"]] == [
        (seed, split, attack) for seed in (0, 1) for split in (1, 3) for attack in ("nearest", "regression")
    ]
    of_split_1 = [row["recovered"] for row in page["attacks"] if row["split"] == 1 and row["attack"] == "regression"]
    table = LeakageTable.of(Config.from_run_config({"split.leakage": str(out)}))
    assert table and table.at(1) == pytest.approx(sum(of_split_1) / 2) and table.at(1) > 0.9
    assert "regression" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model.pth=x"], "model.path"),
        (["x"], "is no setting; write key=value"),
        (["--splits", "4", "MODEL"], "split=4"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], told: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("MODEL", f"model.path={tiny_folder}") for argument in arguments]) == 2
    assert told in capsys.readouterr().err


def test_groups_are_dealt_whole() -> None:
    examples = [Example("", str(number), f"group {number % 5}") for number in range(50)]
    public, private = deal(examples, 3)
    assert not {row.group for row in public} & {row.group for row in private}
    assert len({row.group for row in public}) == 2 and len(public) + len(private) == 50
    assert deal(examples, 3) == (public, private) != deal(examples, 4)
