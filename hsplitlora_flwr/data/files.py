"""Rows of files, folders and data sets of the hub, as they are stored.

JSON lines and text are read here, so that an error names the line of the file; all else by the library ``datasets``,
which takes seconds to import. It makes a copy of what it reads, which is gone when it is read: what is private stays
out of caches.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hsplitlora_flwr.data.example import DataError

Rows = Iterator[tuple[str, Any]]
"""Each row with where it stands, as an error names it."""

BUILDERS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}
"""Of the library, by suffix."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
_PANDAS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "read_excel"),
    **{".feather": "read_feather", ".orc": "read_orc", ".xml": "read_xml", ".dta": "read_stata", ".sav": "read_spss"},
}
"""What pandas reads besides."""
_HUB_SECONDS = 8.0


@dataclass(frozen=True)
class Stored:
    """Where rows lie.

    Parameters
    ----------
    path : str
        A file, a folder, or the name of a data set of the hub.
    split, subset : str
        Of data that have several.
    """

    path: str
    split: str = "train"
    subset: str = ""

    @property
    def place(self) -> Path:
        """As a path."""
        return Path(self.path).expanduser().absolute()

    @property
    def suffixes(self) -> tuple[str, str]:
        """What the file holds, and how it is packed; each with its dot, in small letters, or ""."""
        *names, last = ["", *self.place.suffixes[-2:]]
        return (names[-1].lower(), last.lower()) if last.lower() in PACKED else (last.lower(), "")

    def rows(self) -> Rows:
        """All rows, in their order.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        if not self.place.exists():
            if is_hub_name(self.path):
                return self._of_hub()
            raise DataError(f"cannot read {self.place}: No such file or directory; check data.path and data.eval_path")
        if self.place.is_dir():
            return self._of_library()
        suffix, packed = self.suffixes
        if not packed and suffix == ".txt":
            return ((where, {"text": line}) for where, line in _lines(self.place))
        if not packed and (suffix in ("", ".jsonl", ".ndjson") or (suffix == ".json" and _starts_with_row(self.place))):
            return _json_lines(self.place)
        return self._of_library()

    @property
    def code(self) -> str:
        """Python that loads them as a data set of the library."""
        if self.place.is_dir():
            if (kind := _saved_kind(self.place)) is None:
                return f"load_dataset({json.dumps(str(self.place))}, split={json.dumps(self.split)})"
            part = f"[{json.dumps(self.split)}]" if kind == "splits" else ""
            return f"load_from_disk({json.dumps(str(self.place))}){part}"
        if self.place.exists():
            builder = BUILDERS.get(self.suffixes[0], "json")
            more = ", keep_default_na=False" if builder == "csv" else ""
            more += ', sep="\\t"' if self.suffixes[0] == ".tsv" else ""
            return f'load_dataset("{builder}", data_files={json.dumps(str(self.place))}{more}, split="train")'
        subset = f", {json.dumps(self.subset)}" if self.subset else ""
        return f"load_dataset({json.dumps(self.path)}{subset}, split={json.dumps(self.split)})"

    def _of_library(self) -> Rows:
        with TemporaryDirectory(prefix="rows-") as copies:
            yield from self._numbered(lambda: self._load(copies))

    def _of_hub(self) -> Rows:
        def load() -> Iterable[Any]:
            from datasets import load_dataset

            _check_reachable(self.path)
            loaded: Iterable[Any] = load_dataset(self.path, self.subset or None, split=self.split)
            return loaded

        return self._numbered(load)

    def _load(self, copies: str) -> Iterable[Any]:
        from datasets import Features, Value, load_dataset, load_from_disk

        place, (suffix, _) = self.place, self.suffixes
        if place.is_dir():
            if kind := _saved_kind(place):
                saved = load_from_disk(str(place))
                return _split(saved, self.split) if kind == "splits" else saved
            return _split(load_dataset(str(place), cache_dir=copies), self.split)
        if suffix not in BUILDERS:
            raise DataError(_unknown_format(place, suffix))
        options: dict[str, Any] = {"data_files": str(place), "split": "train", "cache_dir": copies}
        if BUILDERS[suffix] == "csv":
            options |= {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False}
            # Text as it stands there: pandas would make numbers of it ("007"), and nothing at all of "NA".
            columns: dict[str, Any] = next(iter(load_dataset("csv", streaming=True, **options)), {})
            options["features"] = Features({name: Value("string") for name in columns})
        loaded: Iterable[Any] = load_dataset(BUILDERS[suffix], **options)
        return loaded

    def _numbered(self, load: Callable[[], Iterable[Any]]) -> Rows:
        number = 0
        try:
            with _silent():
                rows = load()
            for number, row in enumerate(rows, start=1):
                kept = {name: value for name, value in row.items() if value is not None}  # not in this row
                yield f"{self.path}: row {number}", kept
        except DataError:
            raise
        except Exception as error:  # each builder of the library raises its own
            after = f" after row {number}" if number else ""
            raise DataError(f"cannot read {self.path}{after}: {_told(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's progress bars, which stay on a terminal."""
    import datasets

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may name a data set of the hub: ``owner/name``, and no file by its suffix."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return False
    return Path(path).suffix.lower() not in {*BUILDERS, *PACKED, *_PANDAS}


def _check_reachable(name: str) -> None:
    """Ask the hub for a data set, once and for seconds: the library goes on asking for half a minute.

    Raises
    ------
    DataError
        If there is no answer, or no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return  # the library looks into its cache alone
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        raise DataError(
            f"data.path={name}: neither a file or folder here nor a data set of the hub that may be read; check the "
            "name, or log in (hf auth login)"
        ) from None
    except Exception as error:  # of whatever lies between here and there
        raise DataError(
            f"data.path={name}: no such file or folder here, and the hub cannot be reached ({_told(error)}). If the "
            "data set is in the cache, set HF_HUB_OFFLINE=1; else save it where there is a connection: "
            f'python -c \'from datasets import *; load_dataset("{name}").save_to_disk("data")\''
        ) from None


def _saved_kind(folder: Path) -> str | None:
    """What ``save_to_disk`` left in a folder: one data set, or several splits."""
    if (folder / "dataset_dict.json").is_file():
        return "splits"
    return "one" if (folder / "state.json").is_file() else None


def _split(saved: Mapping[str, Any], split: str) -> Iterable[Any]:
    if split not in saved:
        raise DataError(f"there is no split '{split}'; data.split and data.eval_split may be {', '.join(saved)}")
    found: Iterable[Any] = saved[split]
    return found


def _unknown_format(place: Path, suffix: str) -> str:
    known = f"{place}: files that end in '{suffix}' are not read; known are {', '.join(BUILDERS)}, packed or not"
    if reader := _PANDAS.get(suffix):
        made = place.with_suffix(".parquet")
        line = f"import pandas; pandas.{reader}({json.dumps(str(place))}).to_parquet({json.dumps(str(made))})"
        return f"{known}. Convert it: python -c '{line}'"
    return f"{known}. If these are JSON lines, call the file .jsonl; docs/extending.md shows a reader of one's own"


def _starts_with_row(path: Path) -> bool:
    """Whether the first line of a .json file is a whole object: then its other lines are, too."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Rows:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from None
        except RecursionError:
            raise DataError(f"{where}: lists or objects inside one another that are too deep; delete the row") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with "file:line"."""
    # Not splitlines: it would also cut at U+2028 and its like, which may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def read_text(path: Path) -> str:
    """The whole file as text; a byte order mark at its start is dropped, line ends stay as they are.

    Raises
    ------
    DataError
        If it cannot be read or is no UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.path and data.eval_path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _told(error: Exception) -> str:
    """An error, and what it comes from, in one line."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split())[:200] for cause in causes)
