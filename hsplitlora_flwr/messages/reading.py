"""Reading what another machine wrote: every flaw of a reply is one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class ReplyError(ValueError):
    """A client's reply is not what it should be."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any exception inside the block into a flaw of the reply that is read there.

    A reply is bytes from another machine, on which parsers may raise any exception, also for deep nesting or lack of
    memory. None of them may end the run of the other clients.

    Raises
    ------
    ReplyError
        In place of every exception.
    """
    try:
        yield
    except ReplyError:
        raise
    except Exception as error:
        raise ReplyError(f"{what} cannot be read ({type(error).__name__}: {printable(error, 200)})") from error


def printable(text: object, limit: int = 500) -> str:
    """A client's text as one line for logs: no control, escape or direction characters, and cut to ``limit``."""
    start = str(text)[:limit]
    return "".join(character if character.isprintable() else " " for character in start)


def record(records: RecordDict, name: str, kind: type[R]) -> R:
    """A record of a reply.

    Raises
    ------
    ReplyError
        If it is not there or of another kind.
    """
    found = records.get(name)
    if not isinstance(found, kind):
        raise ReplyError(f"its reply holds no {kind.__name__} '{name}'")
    return found
