"""The attack as it is typed: a table on the terminal, and a file that plans read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.cli.attack import deal, main
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.lora.export import save_update
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.server.checkpoint import CHECKPOINTS


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


def test_labels_and_membership_are_told_beside_it(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "leakage.json", tmp_path / "run"
    settings = [f"model.path={tiny_folder}", "data=jsonl", f"data.path={rows}", "data.eval_rows=10"]
    options = ["--splits", "1", "--attacks", "nearest", "--out", str(out), *settings, "data.partition=iid"]
    assert main(["--membership", *options]) == 2
    assert "name its folder, --run FOLDER" in capsys.readouterr().err
    delta = AccumulatedUpdate()
    delta.add({"model.layers.1.self_attn.q_proj": (torch.full((32, 1), 0.1), torch.full((1, 32), 0.1))})
    (run / CHECKPOINTS / "round-1").mkdir(parents=True)
    save_update(delta, run / CHECKPOINTS / "round-1")
    assert main(["--labels", "--membership", "--run", str(run), *options]) == 0
    page = json.loads(out.read_text())
    assert page["labels"]["recovered"] > 0.9 and page["labels"]["labels"] < page["labels"]["tokens"]
    assert 0 <= page["membership"]["area"] <= 1 and page["membership"]["others"] == 10
    assert "labels that stay" in capsys.readouterr().out
    assert main(["--rounds", *options]) == 2
    assert "--rounds is told from the updates of a run" in capsys.readouterr().err
    (run / CHECKPOINTS / "round-2").mkdir()
    save_update(delta, run / CHECKPOINTS / "round-2")
    assert main(["--rounds", "--gradients", "--run", str(run), *options]) == 0
    page = json.loads(out.read_text())
    assert page["rounds"] and page["gradients"] and page["attacks"][0]["attack"] == "nearest"


def test_more_crossings_take_noise_out(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    settings = [f"model.path={tiny_folder}", "data=jsonl", f"data.path={rows}", "data.eval_rows=10"]
    noise = ["split.clip=0.5", "split.noise=1.5"]

    def recovered(crossings: int) -> float:
        out = tmp_path / "leakage.json"
        options = ["--splits", "1", "--attacks", "regression", "--out", str(out), "--crossings", str(crossings)]
        assert main([*options, *settings, "data.partition=iid", *noise]) == 0
        return float(json.loads(out.read_text())["recovered"]["1"])

    assert recovered(1) < recovered(8)
