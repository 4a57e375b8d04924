"""What a run would train on, without training: ``hsplitlora preview [overrides]``.

Reads the text and the tokenizer, and deals the rows as a run does. Shows three rows as tokens, with what of them is
read and what is learnt; how long rows are, and what ``data.max_length`` cuts; and what every client gets. The exit
status is 0, or 2 if the settings or the data are wrong.

::

    hsplitlora preview                                                # dialogues, three clients
    hsplitlora preview data=own data.path=chats.parquet data.max_length=512
    hsplitlora preview data=own data.path=my.csv data.prompt=title data.completion=body
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import start
from hsplitlora_flwr.cli.settings import CONF, composed_config
from hsplitlora_flwr.cli.terminal import table_console
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import IGNORED, Tokens, prompts_inside_tokens
from hsplitlora_flwr.data.fit import Cut, beyond_training, fit_text
from hsplitlora_flwr.data.partition import cached_partition
from hsplitlora_flwr.data.shapes import kind_of
from hsplitlora_flwr.data.sources import TextData, load_text
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.demo import DemoModelError
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.paths import with_absolute_paths

SHOWN = 3
"""Rows that are shown as tokens."""
_LONGEST = 120  # tokens of a stretch that are shown; of more, the first and the last
_CLIENTS = 20  # with a row of their own
_GROUPS = 3  # of a client that are named
_STYLES = {"read": "dim", "learnt": "green"}


@dataclass(frozen=True)
class Preview:
    """What a run would train on.

    Parameters
    ----------
    config : Config
    text : TextData
    train, held_out : Sequence[Tokens]
        The rows of the text, as tokens.
    parts : Sequence[Sequence[int]]
        The training rows of every client; empty where nothing is dealt.
    tokenizer : Any
    """

    config: Config
    text: TextData
    train: Sequence[Tokens]
    held_out: Sequence[Tokens]
    parts: Sequence[Sequence[int]]
    tokenizer: Any


def preview(config: Config) -> Preview:
    """Read the text as a run does.

    Raises
    ------
    ValueError
        ``DataError``, ``ConfigError`` or ``ModelFilesError``, with what is wrong and what to do.
    """
    text = load_text(config.data, config.run.seed)
    train, held_out = fit_text(text.train, config), fit_text(text.held_out, config)
    dealt = bool(text.train) and not METHODS[config.method.name].central
    parts = cached_partition(text.train, config.data, config.clients.count, config.run.seed) if dealt else []
    return Preview(config, text, train, held_out, parts, load_tokenizer(config.model.path))


def show(found: Preview, console: Console) -> None:
    """Print what was found."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    config, rows = found.config, found.train or found.held_out
    named = config.data.path or config.data.eval_path
    say(f"{config.data.source}{f' {named}' if named else ''}, tokens of {config.model.path}")
    owners = {row: client for client, part in enumerate(found.parts) for row in part}
    for row in sorted(random.Random(config.run.seed).sample(range(len(rows)), min(SHOWN, len(rows)))):
        client = f", client {owners[row]}" if row in owners else ""
        say(f"\nrow {row + 1}{client}: {_size(rows[row])}")
        for kind, pieces in stretches(rows[row], found.tokenizer):
            console.print(Text(f"  {kind:<7}"), Text(pieces, _STYLES[kind]), soft_wrap=True)
    say("")
    for name, part in (("training", found.train), ("held-out", found.held_out)):
        if part:
            say(f"{name} text: {_lengths(part, config.data.max_length)}")
    for warning in _warnings(found):
        say(f"warning: {warning}")
    if found.parts:
        console.print(_dealt(found))
    elif not found.train:
        say("training text: on the nodes, each of which has its own (data-path)")


def stretches(row: Tokens, tokenizer: Any) -> list[tuple[str, str]]:
    """A row's tokens as text, a dot between two of them: in turn what is read alone, and what is learnt."""
    # what a token adds to the text before it: alone, some have no text, or lose a space
    texts = [tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False) for end in range(len(row) + 1)]
    pieces = [text[len(before) :] for before, text in pairwise(texts)]
    marked = zip(pieces, (label != IGNORED for label in row.labels), strict=True)
    return [
        ("learnt" if learnt else "read", _joined([piece for piece, _ in part]))
        for learnt, part in groupby(marked, key=lambda pair: pair[1])
    ]


_SHARES = {"half up to": 0.5, "90 % up to": 0.9, "99 % up to": 0.99, "longest": 1.0}


def _joined(pieces: Sequence[str]) -> str:
    if len(pieces) > _LONGEST:
        half = _LONGEST // 2
        pieces = [*pieces[:half], f" ({len(pieces) - 2 * half} more) ", *pieces[-half:]]
    return "·".join(pieces).replace("\n", "⏎").replace("\t", "⇥")


def _size(row: Tokens) -> str:
    cut = f", {row.cut} more cut" if row.cut else ""
    return f"{len(row)} tokens, {_learnt([row])} learnt{cut}"


def _learnt(rows: Sequence[Tokens]) -> int:
    return sum(label != IGNORED for row in rows for label in row.labels)


def _lengths(rows: Sequence[Tokens], max_length: int) -> str:
    lengths, cut = sorted(len(row) + row.cut for row in rows), Cut.of(rows)
    total = sum(map(len, rows))
    at = {name: lengths[min(int(share * len(lengths)), len(lengths) - 1)] for name, share in _SHARES.items()}
    spread = ", ".join(f"{name} {length}" for name, length in at.items())
    said = f"{len(rows):,} rows, {total:,} tokens, {_learnt(rows) / total:.0%} learnt; lengths: {spread}"
    if not cut.cut_rows:
        return f"{said}; nothing is cut"
    return f"{said}; data.max_length={max_length} cuts {cut}, {lengths[-1]} would cut none"


def _warnings(found: Preview) -> list[str]:
    examples = found.text.train or found.text.held_out
    inside = prompts_inside_tokens(examples, found.tokenizer)
    kinds = [kind_of(part) for part in (found.text.train, found.text.held_out) if part]
    told = [
        f"the prompts of {inside} of {len(examples)} rows end inside a token of theirs: a text is written after other "
        "tokens than the completion is learnt after; end prompts where tokens end, as at a line break"
    ]
    return [
        *(told if inside else []),
        *([f"training rows are of the kind {kinds[0]}, held-out rows of {kinds[1]}"] if len(set(kinds)) > 1 else []),
        *filter(None, [beyond_training(found.config)]),
    ]


def _dealt(found: Preview) -> Table:
    config = found.config
    table = Table(title=f"rows by client, data.partition={config.data.partition}", title_justify="left")
    for name in ("client", "rows", "tokens", "learnt", "groups"):
        table.add_column(name, justify="left" if name == "groups" else "right")
    for client, part in list(enumerate(found.parts))[:_CLIENTS]:
        rows = [found.train[row] for row in part]
        groups = Counter(found.text.train[row].group for row in part)
        named = ", ".join(f"{group} {count}" for group, count in groups.most_common(_GROUPS))
        more = f" and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
        tokens = sum(map(len, rows))
        table.add_row(str(client), f"{len(rows):,}", f"{tokens:,}", f"{_learnt(rows):,}", named + more)
    if len(found.parts) > _CLIENTS:
        sizes = sorted(map(len, found.parts))
        table.caption = f"and {len(sizes) - _CLIENTS} more; of all, {sizes[0]} to {sizes[-1]} rows"
    return table


def run(composed: DictConfig, console: Console) -> int:
    """Read the composed settings, and show; returns the exit status."""
    try:
        show(preview(with_absolute_paths(composed_config(composed))), console)
    except (ValueError, DemoModelError, OmegaConfBaseException) as error:  # what settings, data and models raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Hydra's entry point."""
    console = table_console()
    if status := run(composed, console):
        sys.exit(status)


def command() -> None:
    """The command line."""
    sys.exit(start(main, Launcher, __doc__ or ""))
