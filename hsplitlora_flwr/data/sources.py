"""Text to train on and text to measure with, from sources by name and files by suffix.

Every source becomes the same two lists of :class:`Example`, a prompt and the completion that a model learns to write
after it. ``dialogues`` comes with an installed package, ``e2e`` is the E2E NLG challenge, ``jsonl`` is one's own file:
JSON lines, text, or what a reader of its suffix is registered for. Nothing of a file is guessed or passed over in
silence: a malformed row stops the run with its file and line.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hsplitlora_flwr.config import KNOWN_SOURCES, DataConfig
from hsplitlora_flwr.registry import Registry


class DataError(ValueError):
    """Data are missing, malformed or too few. The text names the file and line, or the setting, and the remedy."""


@dataclass(frozen=True)
class Example:
    """One text: the model reads ``prompt`` and learns ``completion``; ``group`` is what non-IID partitions deal by."""

    prompt: str
    completion: str
    group: str = ""


@dataclass(frozen=True)
class TextData:
    """The training text of all clients together, and the held-out text, which shares no example with it."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


Source = Callable[[DataConfig, int], tuple[Sequence[Example], Sequence[Example]]]
"""From the settings and the seed: text to train on, and held-out text. What stands in both is not trained on."""
Reader = Callable[[Path, str, str], Iterable[Example]]
"""Reads a file, in its order. The second argument names the field of a row's group (``data.group_field``), the third
the partition that needs a group in every row, or ""."""

SOURCES: Registry[Source] = KNOWN_SOURCES
"""Sources of text by name."""
READERS: Registry[Reader] = Registry("reader of files", ".jsonl", ".txt")
"""Readers by suffix, in small letters; files of other suffixes are read as JSON lines."""


def register_source(name: str) -> Callable[[Source], Source]:
    """Make a function known as a source of text, ``data.source=<name>``; :func:`hold_out` draws held-out text for it.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return lambda source: SOURCES.register(name, source)


def register_reader(suffix: str) -> Callable[[Reader], Reader]:
    """Make a function known as the reader of files with this suffix, such as ``.csv``, wherever a file is named:
    ``data.path`` and ``data.eval_path`` with ``data.source=jsonl``, and ``data-path`` of a node.

    Raises
    ------
    PluginError
        If there is one already.
    """
    return lambda reader: READERS.register(suffix, reader)


def load_text(config: DataConfig, seed: int) -> TextData:
    """Read the text of ``config.source``; the same settings and seed give the same text, in the same order.

    Held-out text is ``config.eval_rows`` rows, spread evenly over the groups and drawn by ``seed``. Two sources bring
    their own: ``e2e`` takes rows of devset.csv in order, and ``jsonl`` with ``config.eval_path`` draws from that file
    or takes all of it when it has no more rows; without ``config.path`` there is no training text, which then lies on
    the nodes alone. Training text never repeats a held-out prompt and completion.

    Raises
    ------
    DataError
        If a file is missing or malformed, or there are fewer rows than the settings ask for.
    """
    if config.source == "jsonl" and not config.path:  # nodes have text of their own, see read_rows
        return TextData((), tuple(_held_out_rows(config, seed)))
    pool, held_out = SOURCES[config.source](config, seed)
    reserved = {(example.prompt, example.completion) for example in held_out}
    train = [example for example in pool if (example.prompt, example.completion) not in reserved]
    if not train:
        raise DataError("every training row is also a held-out row; bring more text or lower data.eval_rows")
    if config.train_rows > len(train):
        raise DataError(
            f"data.train_rows={config.train_rows} but there are {len(train)} training rows; lower it, or 0 uses all"
        )
    if config.train_rows:
        train = [train[row] for row in sorted(random.Random(seed).sample(range(len(train)), config.train_rows))]
    return TextData(tuple(train), tuple(held_out))


def as_prompt(source: str, text: str) -> str:
    """A text as prompts of a source end, so that a trained model knows what it is: as it is where the source is one's
    own."""
    ends_line = source in ("dialogues", "e2e") and not text.endswith("\n")
    return text + "\n" if ends_line else text


@register_source("dialogues")
def _dialogues(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """English dialogues of the package ``chatterbot-corpus``, one file a topic; every turn answers the one before."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data.source=dialogues needs the package chatterbot-corpus: pip install 'hsplitlora_flwr[demo]'"
        )
    folder = Path(package.submodule_search_locations[0]) / "data" / "english"
    # libyaml is ten times as fast; a PyYAML built without it has only the other loader.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Some topics repeat a few pairs a hundred times (tech_support: 10 pairs in 1,050 rows). Each is kept once, under
    # its first topic: otherwise the held-out text would hold every pair of such a topic and leave training none.
    pairs: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.load(_read(path), loader)["conversations"]:
            # one in trivia is a single line of text, whose letters are no turns
            for utterance, answer in itertools.pairwise(turns if isinstance(turns, list) else ()):
                pairs.setdefault((utterance, answer), path.stem)
    if not pairs:
        raise DataError(f"no dialogues in {folder}; reinstall them: pip install 'hsplitlora_flwr[demo]'")
    examples = [Example(utterance + "\n", answer, topic) for (utterance, answer), topic in pairs.items()]
    return examples, hold_out(examples, config.eval_rows, seed)


@register_source("e2e")
def _e2e(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """The E2E NLG challenge (https://aclanthology.org/W17-5525), grouped by the kind of food, or "none"."""
    folder = Path(config.path).expanduser().absolute()
    train, dev = _read_e2e(folder / "trainset.csv"), _read_e2e(folder / "devset.csv")
    first, last = config.eval_skip, config.eval_skip + config.eval_rows
    if last > len(dev):
        raise DataError(
            f"data.eval_skip={first} and data.eval_rows={config.eval_rows} ask for {last} rows, but "
            f"{folder / 'devset.csv'} has {len(dev)}; lower them"
        )
    return train, dev[first:last]


@register_source("jsonl")
def _jsonl(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """One's own text: a ``.txt`` file with one text a line, JSON objects, one a line, or what else has a reader."""
    grouped_by = config.partition if config.partition in ("dirichlet", "natural") else ""
    examples = _read_rows(Path(config.path), config.group_field, grouped_by)
    if not config.eval_path:
        return examples, hold_out(examples, config.eval_rows, seed)
    return examples, _held_out_rows(config, seed)


def _held_out_rows(config: DataConfig, seed: int) -> list[Example]:
    # Held-out text is not dealt to clients, so it needs no groups.
    rows = _read_rows(Path(config.eval_path), config.group_field, grouped_by="")
    return rows if len(rows) <= config.eval_rows else hold_out(rows, config.eval_rows, seed)


def read_rows(path: str) -> list[Example]:
    """All examples of a file, as ``data.source=jsonl`` reads them.

    Raises
    ------
    DataError
        If the file is missing or malformed.
    """
    return _read_rows(Path(path), group_field="group", grouped_by="")


_TEXT_FIELDS = {
    *("prompt", "completion", "text"),
    *("messages", "conversations", "conversation", "chosen", "rejected"),
    *("instruction", "input", "output", "system", "context", "query", "question", "answer", "response"),
}
"""Fields that hold text in the data sets that are about."""


def hold_out(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` examples to be held out, at least one fewer than there are; every group gives its share to within one.

    Systematic sampling: rows in random order are sorted by group, and every (total / count)-th is taken from a random
    start. Each row is as likely as any other, also where groups are smaller than the step.
    """
    total = len(examples)
    if total < count + 1:
        raise DataError(
            f"data.eval_rows={count} holds out {count} rows and training needs one more, but there are {total}; "
            "lower data.eval_rows or bring more text"
        )
    rng = random.Random(seed)
    order = list(range(total))
    rng.shuffle(order)
    order.sort(key=lambda row: examples[row].group)
    start = rng.randrange(total)
    return [examples[row] for row in sorted(order[(pick * total + start) // count] for pick in range(count))]


def _read_e2e(path: Path) -> list[Example]:
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    examples = []
    line = 1
    try:
        header = next(reader, [])
        for column in ("mr", "ref"):
            if column not in header:
                raise DataError(f"{path}:1: no column '{column}'; the first line of an E2E file is 'mr,ref'")
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                examples.append(_e2e_example(f"{path}:{line}", dict(zip(header, fields, strict=False)), fields, header))
            # A quoted field may run over several lines; a row is named by the line where it starts.
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: {error}; mend the quotes of the row that starts here") from None
    return examples


def _e2e_example(where: str, row: dict[str, str], fields: list[str], header: list[str]) -> Example:
    if len(fields) != len(header):
        raise DataError(
            f"{where}: {len(fields)} fields where the header has {len(header)}; "
            "put a field that holds commas, quotes or line ends in double quotes"
        )
    if not row["ref"].strip():
        raise DataError(f"{where}: 'ref' is empty; give the text or delete the row")
    food = re.search(r"\bfood\[([^\]]*)\]", row["mr"])
    return Example(row["mr"] + "\n", row["ref"], food[1] if food else "none")


def _read_rows(path: Path, group_field: str, grouped_by: str) -> list[Example]:
    """Rows of a file by its suffix; ``grouped_by`` names the partition that needs a group in every row, or ''."""
    path = path.expanduser().absolute()
    suffix = path.suffix.lower()
    read = READERS.get(suffix, _json_lines)
    try:
        examples = list(read(path, group_field, grouped_by))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.path and data.eval_path") from None
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, Example) or not example.completion.strip():
            raise DataError(f"{path}: example {number} has no completion; give text or delete it")
        if grouped_by and not example.group:
            raise DataError(f"{path}: example {number} has no group, by which data.partition={grouped_by} deals them")
    return examples


@register_reader(".txt")
def _text_lines(path: Path, group_field: str, grouped_by: str) -> list[Example]:
    """A text a line."""
    if grouped_by:
        raise DataError(f"{path}: a .txt file has no groups for data.partition={grouped_by}; use iid or linear")
    return [Example("", line, "all") for _, line in _lines(path)]


@register_reader(".jsonl")
def _json_lines(path: Path, group_field: str, grouped_by: str) -> list[Example]:
    """A JSON object a line."""
    examples = []
    for where, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from None
        has_prompt = _has_prompt(where, row, group_field)
        prompt = _field(where, row, "prompt") if has_prompt else ""
        completion = _field(where, row, "completion" if has_prompt else "text")
        if not completion.strip():
            raise DataError(
                f"{where}: '{'completion' if has_prompt else 'text'}' is empty; give text or delete the row"
            )
        examples.append(Example(prompt, completion, _group(where, row, group_field, grouped_by)))
    return examples


def _has_prompt(where: str, row: Any, group_field: str) -> bool:
    """Whether a row is a prompt with its completion, rather than one text; other shapes are refused.

    What a row says besides, such as an id or its group, is passed over; but not what others train on, as half of a
    text would go unnoticed.
    """
    accepted = 'a row must be {"prompt": ..., "completion": ...} or {"text": ...}'
    if not isinstance(row, dict):
        raise DataError(f"{where}: {accepted}")
    found = sorted(_TEXT_FIELDS & row.keys() - {group_field})
    if found not in (["completion", "prompt"], ["text"]):
        named = ", ".join(f"'{name}'" for name in found or list(row)[:5]) or "nothing"
        raise DataError(f"{where}: {accepted}, and this one has {named}; write its text into those fields alone")
    return "prompt" in row


def _field(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' must be a string, not {json.dumps(value)[:40]}")
    # JSON can escape half of a character ("\ud83d"), on which tokenizers fail much later.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: '{name}' holds half of a surrogate pair, which is no text; mend or delete the row")
    return value


def _group(where: str, row: dict[str, Any], group_field: str, grouped_by: str) -> str:
    value = row.get(group_field)
    if value is None:
        if grouped_by:
            raise DataError(
                f"{where}: no field '{group_field}', by which data.partition={grouped_by} deals rows; add it, "
                "name another in data.group_field, or use data.partition=iid"
            )
        return "all"
    if not isinstance(value, str | int):
        raise DataError(f"{where}: '{group_field}' must be a string or a whole number, not {json.dumps(value)[:40]}")
    return str(value)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with "file:line"."""
    # Not splitlines: it would also cut at U+2028 and its like, which may stand inside a JSON string.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _read(path: Path) -> str:
    """The whole file as text; a byte order mark at its start is dropped, line ends stay as they are."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.path and data.eval_path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
