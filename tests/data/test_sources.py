"""Text sources: what they read, what they hold out, and what they say about broken files."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.data.sources import DataError, Example, TextData, load_text

GOOD_E2E = 'mr,ref\n"name[A], food[Thai]","One, two."\nname[B],Three.\n'


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_e2e(folder: Path, train: str | bytes = GOOD_E2E, dev: str = GOOD_E2E.replace("One", "Uno")) -> DataConfig:
    (folder / "trainset.csv").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "devset.csv").write_bytes(dev.encode())
    return DataConfig(source="e2e", path=str(folder), eval_rows=1)


def texts(examples: tuple[Example, ...]) -> set[tuple[str, str]]:
    return {(example.prompt, example.completion) for example in examples}


@pytest.fixture(scope="module")
def dialogues() -> TextData:
    return load_text(DataConfig(eval_rows=200), seed=3)


# dialogues


def test_dialogues_are_all_consecutive_pairs_of_the_package(dialogues: TextData) -> None:
    package = importlib.util.find_spec("chatterbot_corpus")
    assert package is not None and package.origin is not None
    expected = set()
    for path in (Path(package.origin).parent / "data" / "english").iterdir():
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            assert isinstance(turns, list) or "two little ducks" in turns, "the one that is no list of turns"
            expected |= {(turns[i] + "\n", turns[i + 1]) for i in range(len(turns) - 1) if isinstance(turns, list)}
    assert texts(dialogues.train + dialogues.held_out) == expected
    assert len(dialogues.train) + len(dialogues.held_out) == len(expected) > 1150
    assert len({example.group for example in dialogues.train}) == 21


def test_dialogues_hold_out_every_topic_in_proportion(dialogues: TextData) -> None:
    held = Counter(example.group for example in dialogues.held_out)
    total = held + Counter(example.group for example in dialogues.train)
    assert sum(held.values()) == 200
    for topic, rows in total.items():
        assert abs(held[topic] - rows * 200 / sum(total.values())) < 1, topic


def test_held_out_text_depends_on_the_seed_alone(dialogues: TextData) -> None:
    assert load_text(DataConfig(eval_rows=200), seed=3) == dialogues
    assert texts(load_text(DataConfig(eval_rows=200), seed=4).held_out) != texts(dialogues.held_out)


def test_missing_dialogues_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=re.escape("pip install 'hsplitlora_flwr[demo]'")):
        load_text(DataConfig(), seed=0)


# e2e


def test_e2e_reads_the_challenge(e2e_folder: Path) -> None:
    data = load_text(DataConfig(source="e2e", path=str(e2e_folder), eval_rows=200), seed=0)
    assert (len(data.train), len(data.held_out)) == (42061, 200)
    assert data.held_out[0] == Example(
        "name[Alimentum], area[city centre], familyFriendly[no]\n",
        "There is a place in the city centre, Alimentum, that is not family-friendly.",
        "none",
    )
    # Counted in the file with grep -o 'food\[[^]]*\]' trainset.csv | sort | uniq -c
    groups = Counter(example.group for example in data.train)
    assert groups["Fast food"] == 5891 and groups["Chinese"] == 2929 and len(groups) == 8


def test_e2e_quotes_line_ends_and_byte_order_marks(tmp_path: Path) -> None:
    train = b'\xef\xbb\xbfmr,ref\r\n"name[A], food[Thai]","He said ""hi"",\nthen \xc2\xa35."\r\nname[B],Three.\r\n'
    data = load_text(write_e2e(tmp_path, train), seed=0)
    assert data.train == (
        Example("name[A], food[Thai]\n", 'He said "hi",\nthen £5.', "Thai"),
        Example("name[B]\n", "Three.", "none"),
    )


@pytest.mark.parametrize(
    ("train", "line", "message"),
    [
        ("mr,text\na,b\n", 1, "no column 'ref'"),
        ("", 1, "no column 'mr'"),
        (GOOD_E2E + "name[C],\n", 4, "'ref' is empty"),
        (GOOD_E2E + "name[C], food[Thai],Four.\n", 4, "3 fields where the header has 2"),
        (GOOD_E2E + "name[C]\n", 4, "1 fields where the header has 2"),
        ('mr,ref\n"two\nlines",a\nb,\n', 4, "'ref' is empty"),
        (GOOD_E2E + 'name[C],"no end\nname[D],Four.\n', 4, "mend the quotes"),
        (GOOD_E2E.encode() + b"name[C],caf\xe9 there\n", 4, "not UTF-8"),
    ],
)
def test_malformed_e2e_names_file_and_line(tmp_path: Path, train: str | bytes, line: int, message: str) -> None:
    config = write_e2e(tmp_path, train)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'trainset.csv'}:{line}: ") + ".*" + message):
        load_text(config, seed=0)


def test_missing_e2e_file_names_the_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "here" / "trainset.csv"))):
        load_text(DataConfig(source="e2e", path="here"), seed=0)


def test_e2e_with_too_few_development_rows(tmp_path: Path) -> None:
    write_e2e(tmp_path)
    with pytest.raises(DataError, match=r"data\.eval_rows=3 ask for 3 rows, .* has 2"):
        load_text(DataConfig(source="e2e", path=str(tmp_path), eval_rows=3), seed=0)


# jsonl


def test_jsonl_rows_with_prompt_text_and_group(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": "Q: ", "completion": "A", "ward": "x"},
            {"text": "a line\u2028that goes on", "ward": 7},
            {"prompt": "", "completion": " B", "ward": "x"},
        ],
    )
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "held"}, {"text": "out"}])
    config = DataConfig(source="jsonl", path=path, eval_path=other, group_field="ward", partition="natural")
    data = load_text(config, seed=0)
    assert data.train == (
        Example("Q: ", "A", "x"),
        Example("", "a line\u2028that goes on", "7"),
        Example("", " B", "x"),
    )
    assert data.held_out == (Example("", "held", "all"), Example("", "out", "all"))


def test_text_file_is_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n two \nthree")
    config = DataConfig(source="jsonl", path=str(tmp_path / "a.txt"), partition="iid", eval_rows=1)
    data = load_text(config, seed=0)
    assert texts(data.train + data.held_out) == {("", "one"), ("", " two "), ("", "three")}
    with pytest.raises(DataError, match=r"no groups for data\.partition=natural"):
        load_text(DataConfig(source="jsonl", path=str(tmp_path / "a.txt"), eval_rows=1), seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "lists or objects inside one another that are too deep"),
        ("[1]", "a row must be"),
        ('{"prompt": "a"}', "a row must be"),
        ('{"completion": "a"}', "a row must be"),
        ('{"prompt": null, "completion": "a"}', "'prompt' must be a string, not null"),
        ('{"prompt": "a", "text": "b"}', "a row must be .* has 'prompt', 'text'; name its columns, data.prompt=COLUMN"),
        ('{"prompt": "a", "completion": "b", "text": "ab"}', "a row must be .* has 'prompt', 'text', 'completion'"),
        ('{"prompt": "a", "completion": "b", "context": "c"}', "a row must be"),
        (
            '{"instruction": "a", "output": "b", "context": "c"}',
            "a row must be .* has 'context', 'instruction', 'output'",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the role 'assistant'"),
        ('{"messages": "hello"}', "'messages' must be a list of turns"),
        (
            '{"messages": [{"role": "judge", "content": "a"}]}',
            "turn 1 of 'messages' has 'role': \"judge\", which is no",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}',
            "turn 1 .* has 'tool_calls', which is no",
        ),
        ('{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "turn 1 .* which is no text"),
        (
            '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "\\ud83d"}]}]}',
            "turn 1 of 'messages': 'text' holds half of a surrogate pair",
        ),
        ('{"messages": [{"role": "assistant", "content": 5}]}', "turn 1 of 'messages': 'content' must be a string"),
        ('{"body": "a"}', "a row must be .* has 'body'"),
        ("{}", "a row must be .* has nothing"),
        ('{"text": 5}', "'text' must be a string, not 5"),
        ('{"text": " "}', "'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"text": "\\ud83d"}', "'text' holds half of a surrogate pair"),
        ('{"text": "a", "group": [1]}', "'group' must be a string"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{path}:3: ") + "(.* )?" + message):
        load_text(DataConfig(source="jsonl", path=str(path), partition="iid", eval_rows=1), seed=0)


@pytest.mark.parametrize("rule", ["natural", "dirichlet"])
def test_jsonl_without_the_group_that_the_partition_needs(tmp_path: Path, rule: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "group": "g"}, {"text": "b"}])
    with pytest.raises(DataError, match=f"a.jsonl:2: no field 'group', by which data.partition={rule}"):
        load_text(DataConfig(source="jsonl", path=path, partition=rule, eval_rows=1), seed=0)


def test_held_out_rows_need_one_more_for_training(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(row)} for row in range(4)])
    data = load_text(DataConfig(source="jsonl", path=path, partition="iid", eval_rows=3), seed=0)
    assert (len(data.train), len(data.held_out)) == (1, 3)
    with pytest.raises(DataError, match=r"data\.eval_rows=4 .* there are 4"):
        load_text(DataConfig(source="jsonl", path=path, partition="iid", eval_rows=4), seed=0)


def test_text_that_is_only_repeated_cannot_be_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}] * 5)
    with pytest.raises(DataError, match="every training row is also a held-out row"):
        load_text(DataConfig(source="jsonl", path=path, partition="iid", eval_rows=1), seed=0)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=2, max_size=40), data=st.data())
def test_held_out_text_is_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    count, seed = data.draw(st.integers(1, len(rows) - 1)), data.draw(st.integers(0, 5))
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    write_jsonl(path, [{"text": f"text {text}", "group": group} for text, group in rows])
    try:
        split = load_text(DataConfig(source="jsonl", path=str(path), eval_rows=count), seed)
    except DataError:
        # Refused only where training would be empty: at most ``count`` distinct texts.
        assert len({text for text, _ in rows}) <= count
        return
    assert len(split.held_out) == count
    assert not texts(split.train) & texts(split.held_out)
    # Only repeats of held-out text may be missing.
    assert texts(split.train + split.held_out) == {("", f"text {text}") for text, _ in rows}
    sizes, held = Counter(str(group) for _, group in rows), Counter(example.group for example in split.held_out)
    for group, size in sizes.items():
        assert abs(held[group] - size * count / len(rows)) < 1


def test_train_rows_are_drawn_by_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(row)} for row in range(30)])
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"text": "other"}])

    def draw(rows: int, seed: int) -> list[int]:
        config = DataConfig(source="jsonl", path=path, eval_path=held_out, partition="iid", train_rows=rows)
        return [int(example.completion) for example in load_text(config, seed).train]

    assert draw(0, seed=1) == list(range(30))
    assert len(set(draw(10, seed=1))) == 10
    assert draw(10, seed=1) == draw(10, seed=1) != draw(10, seed=2)
    with pytest.raises(DataError, match=r"data\.train_rows=31 but there are 30"):
        draw(31, seed=1)


# chitchat


def test_chats_are_dealt_by_who_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(sender: str, *said: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender, "timestamp": "2018-05-02"} for text in said]

    chats = {
        "1": {"messages": [turn("ann", "Hi", "How are you?"), turn("bob", "Fine."), turn("ann", "Good.")]},
        "2": {"messages": [turn("bob", "Hello"), turn("eve", " "), turn("bob", "Are you there?")], "rating": 1},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(chats))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"chitchat_dataset": found}.get)
    data = load_text(DataConfig(source="chitchat", eval_rows=1), seed=0)
    assert set(data.train + data.held_out) == {
        Example("Hi\nHow are you?\n", "Fine.", "bob"),
        Example("Fine.\n", "Good.", "ann"),
    }
    with pytest.raises(DataError, match=r"data\.source=dialogues needs the package chatterbot-corpus"):
        load_text(DataConfig(), seed=0)


def test_a_path_beside_data_of_a_package_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.path=my\.csv is not read by data\.source=dialogues.*add data=own"):
        load_text(DataConfig(path="my.csv"), seed=0)
