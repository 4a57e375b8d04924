"""Files, folders and names of data sets: the same rows from each, and what is said of what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas
import pytest

from hsplitlora_flwr.config import Config, ConfigError, DataConfig
from hsplitlora_flwr.data.example import Turn
from hsplitlora_flwr.data.files import Stored, is_hub_name
from hsplitlora_flwr.data.sources import DataError, Example, load_text, read_rows, register_reader
from hsplitlora_flwr.paths import with_absolute_paths

ROWS = [{"question": "007?", "answer": "3.50"}, {"question": 'a,\n"b"', "answer": "NA"}]
EXAMPLES = [Example("007?\n", "3.50", "all"), Example('a,\n"b"\n', "NA", "all")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pandas.DataFrame(ROWS)


def saved(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def saved_splits(path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(path)


def folder_of_files(path: Path) -> None:
    path.mkdir()
    TABLE.to_parquet(path / "train.parquet")
    TABLE[:1].to_parquet(path / "test.parquet")


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(LINES),
    "a.ndjson": lambda path: path.write_bytes(LINES),
    "rows": lambda path: path.write_bytes(LINES),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "a.csv": lambda path: TABLE.to_csv(path, index=False),
    "a.tsv": lambda path: TABLE.to_csv(path, index=False, sep="\t"),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(TABLE.to_csv(index=False).encode())),
    "a.PARQUET": lambda path: TABLE.to_parquet(path),
    "saved": saved,
    "splits": saved_splits,
    "folder": folder_of_files,
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read_rows(str(tmp_path / name)) == EXAMPLES


@pytest.mark.parametrize("name", ["splits", "folder"])
def test_splits_to_train_and_to_measure_on(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    config = DataConfig("own", path=str(tmp_path / name), partition="iid", eval_split="test")
    found = load_text(config, seed=0)
    assert (list(found.train), list(found.held_out)) == (
        EXAMPLES[1:],
        EXAMPLES[:1],
    )  # what is held out is not trained on
    with pytest.raises(
        DataError, match=r"there is no split 'dev'; data\.split and data\.eval_split may be train, test"
    ):
        load_text(DataConfig("own", path=str(tmp_path / name), split="dev"), seed=0)


def test_text_may_be_packed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert [row.completion for row in read_rows(str(tmp_path / "a.txt.gz"))] == ["one", "two"]


def test_columns_by_name_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body,ward\nt,b,7\n")
    config = DataConfig(prompt="title", completion="body", group_field="ward")
    assert read_rows(str(tmp_path / "a.csv"), config) == [Example("t\n", "b", "7")]
    with pytest.raises(DataError, match=r"a\.csv: row 1: no 'text' here; there are title, body, ward"):
        read_rows(str(tmp_path / "a.csv"), DataConfig(completion="text"))
    with pytest.raises(ConfigError, match=r"data\.completion=COLUMN"):
        Config(data=DataConfig(prompt="title"))


def test_rows_of_several_shapes_may_stand_in_one_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a", "group": "x"}, {"prompt": "b", "completion": "c", "group": 7}]')
    assert read_rows(str(tmp_path / "a.json")) == [Example("", "a", "x"), Example("b", "c", "7")]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_turns_of_several_kinds_of_content_stay_what_they_are(packed: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "b"}]
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": content}] for content in ("b", parts)]
    content = json.dumps(
        [{"messages": turns, "meta": number or {"x": 1}} for number, turns in enumerate(chats)]
    ).encode()
    (tmp_path / f"a.json{packed}").write_bytes(gzip.compress(content) if packed else content)
    one, other = read_rows(str(tmp_path / f"a.json{packed}"))
    assert one == other == Example("a", "b", "all", (Turn("user", "a"), Turn("assistant", "b")))


def test_nothing_is_left_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    WRITERS["array.json"](tmp_path / "array.json")
    assert read_rows(str(tmp_path / "array.json")) == EXAMPLES
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"question,answer\na,\n", r"a\.csv: row 1: 'answer' is empty"),
        ("a.json", b'[{"text": "a"}, {"text":', r"cannot read .*a\.json: "),
        ("a.parquet", b"no table", r"cannot read .*a\.parquet: "),
        ("a.jsonl.gz", b"not packed", r"cannot read .*a\.jsonl\.gz: "),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.xlsx", b"", r"'\.xlsx' are not read; .*python -c 'import pandas; pandas\.read_excel\(\".*a\.xlsx\"\)"),
        ("a.docx", b"", r"'\.docx' are not read; .*call the file \.jsonl"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(str(tmp_path / name))


def test_a_missing_file_is_named_with_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere.csv", "data/nowhere.jsonl"):
        with pytest.raises(DataError, match=re.escape(f"cannot read {tmp_path / name}: No such file or directory")):
            read_rows(name)


def test_a_reader_of_ones_own_goes_before_what_is_known(tmp_path: Path) -> None:
    from hsplitlora_flwr.data.sources import READERS

    before = dict(READERS._items), dict(READERS._names)
    try:
        register_reader(".csv")(lambda path, group_field, grouped_by: [Example("", path.read_text())])
        (tmp_path / "a.csv").write_text("whole")
        assert read_rows(str(tmp_path / "a.csv")) == [Example("", "whole")]
    finally:
        READERS._items, READERS._names = before


# the hub


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", True),
        ("HuggingFaceH4/no_robots", True),
        ("my/rows.csv", False),
        ("/srv/rows", False),
        ("~/rows", False),
        ("rows", False),
        ("a/b/c", False),
        ("../rows", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(path: str, expected: bool) -> None:
    assert is_hub_name(path) is expected


def test_a_name_of_the_hub_stays_where_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").write_text("")
    for path, settled in (("owner/there", "owner/there"), ("owner/here", str(tmp_path / "owner" / "here"))):
        assert with_absolute_paths(Config(data=DataConfig("own", path=path))).data.path == settled


def test_a_data_set_of_the_hub_is_loaded_by_its_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append((name, timeout))
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or ROWS)
    config = DataConfig("own", subset="en", eval_split="validation")
    assert read_rows("owner/name", config) == EXAMPLES
    assert asked == [("owner/name", 8.0), (("owner/name", "en"), {"split": "train"})]
    assert Stored("owner/name", "train", "en").code == 'load_dataset("owner/name", "en", split="train")'


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", nobody)
    said = r"data\.path=owner/name: no such file or folder here, .* cannot be reached .*no route to host.*save_to_disk"
    with pytest.raises(DataError, match=said):
        read_rows("owner/name")
