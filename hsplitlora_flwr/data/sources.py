"""Text to train on and text to measure with, from sources by name.

Every source becomes the same two lists of :class:`~hsplitlora_flwr.data.example.Example`. ``dialogues`` and
``chitchat`` come with installed packages, ``e2e`` is the E2E NLG challenge, ``own`` is one's own data: what
:mod:`~hsplitlora_flwr.data.files` reads, in one of the shapes of :mod:`~hsplitlora_flwr.data.shapes`, or what a reader
of a suffix is registered for. Nothing of a file is guessed or passed over in silence: a malformed row stops the run
with its file and line.
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
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.config.names import KNOWN_SOURCES
from hsplitlora_flwr.data.example import DataError as DataError
from hsplitlora_flwr.data.example import Example as Example
from hsplitlora_flwr.data.files import Stored, read_text
from hsplitlora_flwr.data.shapes import Row, refusal, shape_of
from hsplitlora_flwr.registry import Registry


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
READERS: Registry[Reader] = Registry("reader of files")
"""Readers of others by suffix, in small letters. They go before what is read without them."""


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
    ``data.path`` and ``data.eval_path`` with ``data.source=own``, and ``data-path`` of a node.

    Raises
    ------
    PluginError
        If there is one already.
    """
    return lambda reader: READERS.register(suffix, reader)


def load_text(config: DataConfig, seed: int) -> TextData:
    """Read the text of ``config.source``; the same settings and seed give the same text, in the same order.

    Held-out text is ``config.eval_rows`` rows, spread evenly over the groups and drawn by ``seed``. Two sources bring
    their own: ``e2e`` takes rows of devset.csv in order, and ``own`` with ``config.eval_path`` or ``config.eval_split``
    draws from there or takes all of it when it has no more rows; without ``config.path`` there is no training text,
    which then lies on the nodes alone. Training text never repeats a held-out one.

    Raises
    ------
    DataError
        If a file is missing or malformed, or there are fewer rows than the settings ask for.
    """
    if config.is_own and not config.path:  # nodes have text of their own, see read_rows
        return TextData((), tuple(_held_out_rows(config, seed)))
    if config.source in _PACKAGED and (config.path or config.eval_path):
        raise DataError(
            f"data.path={config.path or config.eval_path} is not read by data.source={config.source}, which comes with "
            "a package; for data of your own add data=own"
        )
    pool, held_out = SOURCES[config.source](config, seed)
    reserved = {example.text for example in held_out}
    train = [example for example in pool if example.text not in reserved]
    if not train:
        raise DataError("every training row is also a held-out row; bring more text or lower data.eval_rows")
    if config.train_rows > len(train):
        raise DataError(
            f"data.train_rows={config.train_rows} but there are {len(train)} training rows; lower it, or 0 uses all"
        )
    if config.train_rows:
        train = [train[row] for row in sorted(random.Random(seed).sample(range(len(train)), config.train_rows))]
    return TextData(tuple(train), tuple(held_out))


_PACKAGED = {
    "dialogues": ("chatterbot_corpus", "chatterbot-corpus", "hsplitlora_flwr[demo]"),
    "chitchat": ("chitchat_dataset", "chitchat-dataset", "hsplitlora_flwr[chitchat]"),
}
"""Sources that come with a package: its module, its name, and what installs it."""


def _package(source: str) -> Path:
    """The folder of the package that a source comes with."""
    module, name, extra = _PACKAGED[source]
    package = importlib.util.find_spec(module)
    if package is None or not package.submodule_search_locations:
        raise DataError(f"data.source={source} needs the package {name}: pip install '{extra}'")
    return Path(package.submodule_search_locations[0])


@register_source("dialogues")
def _dialogues(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """English dialogues of the package ``chatterbot-corpus``, one file a topic; every turn answers the one before."""
    folder = _package("dialogues") / "data" / "english"
    # libyaml is ten times as fast; a PyYAML built without it has only the other loader.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Some topics repeat a few pairs a hundred times (tech_support: 10 pairs in 1,050 rows). Each is kept once, under
    # its first topic: otherwise the held-out text would hold every pair of such a topic and leave training none.
    pairs: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.load(read_text(path), loader)["conversations"]:
            # one in trivia is a single line of text, whose letters are no turns
            for utterance, answer in itertools.pairwise(turns if isinstance(turns, list) else ()):
                pairs.setdefault((utterance, answer), path.stem)
    if not pairs:
        raise DataError(f"no dialogues in {folder}; reinstall them: pip install 'hsplitlora_flwr[demo]'")
    examples = [Example(utterance + "\n", answer, topic) for (utterance, answer), topic in pairs.items()]
    return examples, hold_out(examples, config.eval_rows, seed)


@register_source("chitchat")
def _chitchat(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Chats of students in pairs (the Chit-Chat Challenge), grouped by who says the answer: some say much, most little.

    What one says in a row is one turn, a line an utterance.
    """
    file = _package("chitchat") / "dataset.json"
    examples = []
    for chat in json.loads(read_text(file)).values():
        turns = [("\n".join(part["text"] for part in turn), turn[0]["sender"]) for turn in chat["messages"] if turn]
        for (said, _), (answer, speaker) in itertools.pairwise(turns):
            if said.strip() and answer.strip():
                examples.append(Example(said + "\n", answer, speaker))
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
@register_source("own")
def _own(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """One's own data."""
    grouped_by = config.partition if config.partition in ("dirichlet", "natural") else ""
    examples = _examples(_stored(config), config, grouped_by)
    if not (config.eval_path or config.eval_split):
        return examples, hold_out(examples, config.eval_rows, seed)
    return examples, _held_out_rows(config, seed)


def _held_out_rows(config: DataConfig, seed: int) -> list[Example]:
    # Held-out text is not dealt to clients, so it needs no groups.
    rows = _examples(_stored(config, held_out=True), config, grouped_by="")
    return rows if len(rows) <= config.eval_rows else hold_out(rows, config.eval_rows, seed)


def _stored(config: DataConfig, *, held_out: bool = False) -> Stored:
    if not held_out:
        return Stored(config.path, config.split, config.subset)
    return Stored(config.eval_path or config.path, config.eval_split or config.split, config.subset)


def read_rows(path: str, config: DataConfig | None = None) -> list[Example]:
    """All examples of a node's own file or folder, or of a data set of the hub.

    Parameters
    ----------
    path : str
    config : DataConfig, optional
        What its columns and its split are called.

    Raises
    ------
    DataError
        If it is missing or malformed.
    """
    config = replace(config or DataConfig(), path=path)
    return _examples(_stored(config), config, grouped_by="")


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
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
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


def _examples(stored: Stored, config: DataConfig, grouped_by: str) -> list[Example]:
    """All examples, in their order; ``grouped_by`` names the partition that needs a group in every row, or ''."""
    if read := READERS.get(stored.place.suffix.lower()):
        return _read_by(read, stored.place, config.group_field, grouped_by)
    if grouped_by and stored.suffixes[0] == ".txt":
        raise DataError(f"{stored.place}: a .txt file has no groups for data.partition={grouped_by}; use iid or linear")
    if not (examples := list(_made(stored, config, grouped_by))):
        raise DataError(f"{stored.path} has no rows")
    return examples


def _made(stored: Stored, config: DataConfig, grouped_by: str) -> Iterator[Example]:
    for where, row in stored.rows():
        columns = {name: value for name, value in row.items() if name != config.group_field} if _is_row(row) else {}
        shape = shape_of(columns, config.prompt, config.completion)
        if shape is None:
            raise DataError(f"{where}: {refusal(columns if _is_row(row) else row, stored.code)}")
        if missing := [name for name in shape.needed if name not in row]:
            raise DataError(f"{where}: no '{missing[0]}' here; there are {', '.join(row) or 'no columns'}")
        try:
            yield shape.example(columns | {name: row[name] for name in shape.needed}, _group(row, config, grouped_by))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _is_row(row: object) -> bool:
    return isinstance(row, dict)


def _read_by(read: Reader, path: Path, group_field: str, grouped_by: str) -> list[Example]:
    """By a reader of others, whose examples are checked here."""
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


def _group(row: Row, config: DataConfig, grouped_by: str) -> str:
    value = row.get(config.group_field)
    if value is None:
        if grouped_by:
            raise DataError(
                f"no field '{config.group_field}', by which data.partition={grouped_by} deals rows; add it, name "
                "another in data.group_field, or use data.partition=iid"
            )
        return "all"
    if not isinstance(value, str | int):
        raise DataError(
            f"'{config.group_field}' must be a string or a whole number, not {json.dumps(value, default=str)[:40]}"
        )
    return str(value)
