"""A bounded queue that can be closed: what stands between two threads of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The mailbox takes nothing any more."""


class _End:
    """Stands in the queue behind the last item."""


class Mailbox(Generic[T]):
    """A first-in, first-out queue of at most ``size`` items; iterating takes them out, until it is closed and empty.

    Parameters
    ----------
    size : int
        Items that may wait, at least 1; :meth:`put` blocks while so many do.
    """

    def __init__(self, size: int) -> None:
        # A wake-up through SimpleQueue, written in C, takes a fraction of one through queue.Queue.
        self._items: SimpleQueue[T | _End] = SimpleQueue()
        self._room = Semaphore(size)
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item as soon as there is room.

        Raises
        ------
        Closed
            If the mailbox is closed, also while waiting for room.
        """
        self._room.acquire()
        if self._closed:
            self._room.release()  # for the next one that waits
            raise Closed
        self._items.put(item)

    def close(self, *, discard: bool = False) -> None:
        """Take nothing any more; what waits can still be taken out, unless it is discarded."""
        self._closed = True
        if discard:
            with suppress(Empty):
                while True:
                    self._items.get_nowait()
        self._items.put(_End())
        self._room.release()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._items.get()
        if isinstance(item, _End):
            self._items.put(item)  # for the next one that asks
            raise StopIteration
        self._room.release()
        return item
