"""Rows as people have them: each shape against the example written out, and the line that converts others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest

from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.data.example import Turn
from hsplitlora_flwr.data.shapes import asked, kind_of, refusal, shape_of
from hsplitlora_flwr.data.sources import DataError, Example, load_text, read_rows

BELOW = "Below is an instruction that describes a task"
WRITE = " Write a response that appropriately completes the request.\n\n"
TURNS = (Turn("user", "Who?"), Turn("assistant", "Me."))


def example_of(row: dict[str, Any], **columns: str) -> Example:
    shape = shape_of(row, **columns)
    assert shape is not None
    return shape.example(row, "")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"text": "all of it"}, "", "all of it"),
        ({"prompt": "a", "completion": "b", "id": 7}, "a", "b"),  # as they are
        ({"prompt": "a", "response": "b"}, "a\n", "b"),
        ({"question": "a?", "answer": " b"}, "a?", " b"),
        ({"question": "a?\n", "answer": "b"}, "a?\n", "b"),
        ({"query": "a", "response": "b", "context": ""}, "a\n", "b"),
        ({"input": "a", "output": "b"}, "a\n", "b"),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            f"{BELOW}.{WRITE}### Instruction:\nAdd.\n\n### Response:\n",
            "3",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            f"{BELOW}, paired with an input that provides further context.{WRITE}"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "3",
        ),
        (
            {"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"},  # Dolly
            f"{BELOW}, paired with an input that provides further context.{WRITE}"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "3",
        ),
    ],
)
def test_plain_rows(row: dict[str, Any], prompt: str, completion: str) -> None:
    assert example_of(row) == Example(prompt, completion)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}], "id": "x"},
        {"conversation": [{"role": "User", "content": "Who?"}, {"role": "assistant", "content": "Me."}], "system": ""},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "Me.", "tool_calls": None}]},
        {"messages": [*map(vars, TURNS), {"role": "user", "content": "!"}]},
    ],
)  # fmt: skip
def test_chats(row: dict[str, Any]) -> None:
    assert example_of(row) == Example("Who?", "Me.", "", TURNS)


def test_a_system_text_beside_the_turns_stands_before_them() -> None:
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}],
    }
    assert example_of(row).turns == (Turn("system", "Be brief."), *TURNS)


def test_turns_of_weight_zero_are_not_learnt() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    example = example_of(
        {"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    )
    assert [turn.learnt for turn in example.turns] == [True, False, True, True]
    with pytest.raises(DataError, match="no turn of the role 'assistant' with something to learn"):
        example_of({"messages": turns})


def test_columns_by_name_go_before_what_is_known() -> None:
    row = {"title": "t", "text": "body", "dialog": [{"role": "assistant", "content": "Me."}]}
    assert example_of(row, prompt="title", completion="text") == Example("t\n", "body")
    assert example_of(row, completion="title") == Example("", "t")
    assert example_of(row, completion="dialog").turns == (TURNS[1],)
    with pytest.raises(DataError, match=r"leave data\.prompt empty"):
        example_of(row, prompt="title", completion="dialog")


@pytest.mark.parametrize(
    ("examples", "kind", "prompt"),
    [
        ([Example("", "a")], "text", "Who?"),
        ([Example("a\n", "b"), Example("c\n", "d")], "line", "Who?\n"),
        ([Example("a\n", "b"), Example("c: ", "d")], "pair", "Who?"),
        ([example_of({"instruction": "a", "input": i, "output": "b"}) for i in ("", "x")], "alpaca", None),
    ],
)
def test_what_a_user_asks_is_made_a_prompt_of_the_same_kind(
    examples: list[Example], kind: str, prompt: str | None
) -> None:
    assert kind_of(examples) == kind
    wanted = prompt or f"{BELOW}.{WRITE}### Instruction:\nWho?\n\n### Response:\n"
    assert asked(kind, "Who?").prompt == wanted
    if kind == "line":
        assert asked(kind, "Who?\n").prompt == "Who?\n"


def test_what_a_user_asks_of_chats_is_a_turn() -> None:
    assert kind_of([Example.chat(TURNS)]) == "chat"
    assert asked("chat", "Who?").asked == Example("Who?", "", "", TURNS[:1])


@pytest.mark.parametrize(
    ("name", "content", "examples"),
    [
        ("a.jsonl", '{"context": "c", "question": "q", "answer": "it\'s a"}\n', [("c\nq\n", "it's a")]),
        ("b.json", '[{"prompt": "p", "chosen": "good", "rejected": "bad"}]', [("p\n", "good")]),
        ("c.csv", "title,body\nt,NA\n", [("t\n", "NA")]),
        ("d.json", '{"version": 1, "data": [{"text": "one"},\n {"text": "two"}]}', [("", "one"), ("", "two")]),
    ],
)
def test_what_is_not_known_is_refused_with_the_line_that_converts_it(
    name: str, content: str, examples: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    config = DataConfig("own", path=str(tmp_path / name), partition="iid")
    with pytest.raises(DataError, match=r"a row must be .* for example: python -c ") as refused:
        load_text(config, seed=0)
    python, option, code = shlex.split(str(refused.value).partition("for example: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exec(code, {})
    assert [(row.prompt, row.completion) for row in read_rows("rows.jsonl")] == examples


def test_what_is_no_row_is_refused() -> None:
    assert refusal([1], "").startswith("a row must be") and refusal({}, "").endswith("has nothing")
