"""Directions as they are learnt on the command line, and what an attack finds behind them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hsplitlora_flwr.cli.attack import main as attack
from hsplitlora_flwr.cli.bottleneck import main
from hsplitlora_flwr.transport.bottleneck import widths


def test_it_writes_what_runs_and_attacks_read(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=20)) for _ in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "new" / "directions"
    rows = [f"model.path={tiny_folder}", "data=own", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_rows=5"]
    rows.append("data.partition=iid")
    assert main(["--splits", "3,1", "--width", "7", "--deal", "0", "--out", str(out), *rows]) == 0
    assert widths(str(out)) == {1: 7, 3: 7}
    assert "7 of 32 directions at the split points 1, 3" in capsys.readouterr().out

    def recovered(width: int) -> float:
        page, asked = tmp_path / "leakage.json", [f"split.bottleneck={out}", f"split.width={width}"]
        options = ["--splits", "1", "--attacks", "regression", "--out", str(page)]
        assert attack([*options, *rows, *asked]) == 0
        return float(json.loads(page.read_text())["recovered"]["1"])

    assert recovered(1) < recovered(7) < recovered(0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--width", "33", "MODEL"], "--width 33 must be from 1 to the 32 of the hidden size"),
        (["--splits", "4", "MODEL"], "split=4"),
        (["model.pth=x"], "model.path"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], told: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("MODEL", f"model.path={tiny_folder}") for argument in arguments]) == 2
    assert told in capsys.readouterr().err
