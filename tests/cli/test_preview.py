"""What a run would train on, shown: rows as tokens, lengths, and what clients get."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.preview import run
from hsplitlora_flwr.cli.settings import CONF, register

TEMPLATE = "{% for message in messages %}{{ message.role[0] + '>' + message.content + '\n' }}{% endfor %}"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def shown(folder: Path, *overrides: str, status: int = 0) -> str:
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = [f"model.path={folder / 'model'}", "data=own", "data.eval_rows=1", "clients.memory_gb=[1.0,1.3]"]
        settings += overrides
        composed = compose("config", settings)
    out = io.StringIO()
    assert run(composed, Console(file=out, width=200)) == status
    return out.getvalue()


def test_chats_are_shown_as_they_are_learnt_and_dealt(folder: Path) -> None:
    chats = [
        {"ward": ward, "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b" * length}]}
        for ward, length in (("x", 2), ("x", 2), ("y", 9))
    ]
    held_out = folder / "held_out.txt"
    held_out.write_text("other\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    text = shown(
        folder,
        *(f"data.path={folder / 'rows.jsonl'}", f"data.eval_path={held_out}", "data.group_field=ward"),
        *("data.partition=natural", "data.max_length=12"),
    )
    lines = [line.rstrip() for line in text.splitlines()]
    assert "row 1, client 0: 11 tokens, 4 learnt" in lines
    at = lines.index("row 3, client 1: 12 tokens, 5 learnt, 6 more cut")
    assert lines[at + 1 : at + 3] == ["  read    u·>·a·?·⏎·a·>", "  learnt  b·b·b·b·b"]
    assert (
        "training text: 3 rows, 34 tokens, 38% learnt; lengths: half up to 11, 90 % up to 18, 99 % up to 18, "
        "longest 18; data.max_length=12 cuts 1 of 3 rows, 15.0% of the tokens, 18 would cut none" in lines
    )
    assert "held-out text: 1 rows, 6 tokens, 100% learnt; lengths: half up to 6, 90 % up to 6, 99 % up to 6, " in text
    assert "warning: training rows are of the kind chat, held-out rows of text" in lines
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [["0", "2", "22", "8", "x 2"], ["1", "1", "12", "5", "y 1"]]


def test_text_that_lies_on_the_nodes_is_not_here(folder: Path) -> None:
    (folder / "held_out.txt").write_text("one\n")
    text = shown(folder, f"data.eval_path={folder / 'held_out.txt'}")
    assert "row 1: 4 tokens, 4 learnt\n  learnt  o·n·e·<eos>\n" in text
    assert "training text: on the nodes" in text


def test_what_is_wrong_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.csv").write_text("a,b\nc,d\n")
    shown(folder, f"data.path={folder / 'rows.csv'}", status=2)
    assert capsys.readouterr().err.startswith(f"error: {folder / 'rows.csv'}: row 1: a row must be ")
