"""The queue between two threads of a stream: bounded, closable, and keeping what a broken connection may lose."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Lock, Semaphore
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The backlog is closed."""


class Backlog(Generic[T]):
    """A first-in, first-out queue that keeps items after they were taken, until they are known to have arrived.

    They are numbered from 0. One connection at a time takes them (:meth:`since`); the next one begins wherever the
    other side asks for it, and ends the one before.

    Parameters
    ----------
    size : int
        Items that may stay, at least 1; :meth:`put` blocks while so many do.
    keep : bool
        Keep items after they were taken. Without it an item counts as arrived when it is taken, as between threads.
    """

    def __init__(self, size: int, *, keep: bool = True) -> None:
        self._room = Semaphore(size)
        self._items: deque[T] = deque()
        self._first = 0  # number of the first that stays
        self._taken = 0  # how many have been taken, at least once
        self._arrived = 0 if keep else math.inf  # how many the other side has, as it says
        self._closed = False
        self._lock = Lock()
        # Of the connection that takes. A wake-up through SimpleQueue, written in C, takes a fraction of one through
        # queue.Queue.
        self._bell: SimpleQueue[None] = SimpleQueue()

    def put(self, item: T) -> None:
        """Add an item as soon as there is room.

        Raises
        ------
        Closed
            If the backlog is closed, also while waiting for room.
        """
        self._room.acquire()
        with self._lock:
            if self._closed:
                self._room.release()  # for the next one that waits
                raise Closed
            self._items.append(item)
            self._bell.put(None)

    def arrived(self, count: int) -> None:
        """The other side has the first ``count`` of all items; those never taken stay until they are."""
        with self._lock:
            self._arrived = max(self._arrived, count)
            self._let_go()

    def since(self, number: int) -> Iterator[T]:
        """Take the items from ``number`` on as they come, until the backlog is closed or another call takes them.

        Raises
        ------
        LookupError
            If that item is gone, or one before it has not come yet.
        """
        with self._lock:
            end = self._first + len(self._items)
            if not self._first <= number <= end:
                raise LookupError(f"number {number} is asked for, where those from {self._first} to {end} are kept")
            self._ring()
            return self._take(number, self._bell)

    def hang_up(self) -> None:
        """End the current taker; items stay for the next one."""
        with self._lock:
            self._ring()

    def _let_go(self) -> None:
        while self._first < min(self._arrived, self._taken) and self._items:
            self._items.popleft()
            self._first += 1
            self._room.release()

    def _ring(self) -> None:
        before, self._bell = self._bell, SimpleQueue()
        before.put(None)

    def close(self, *, discard: bool = False) -> None:
        """Accept no more items; those that are there can still be taken, unless they are discarded."""
        with self._lock:
            self._closed = True
            if discard:
                self._first += len(self._items)
                self._items.clear()
            self._bell.put(None)
        self._room.release()

    def _take(self, number: int, bell: SimpleQueue[None]) -> Iterator[T]:
        while True:
            with self._lock:
                place = number - self._first
                if self._bell is not bell or place < 0:  # another one takes them, or they are discarded
                    return
                there = place < len(self._items)
                if there:
                    item, number = self._items[place], number + 1
                    self._taken = max(self._taken, number)
                    self._let_go()
                elif self._closed:
                    return
            if there:
                yield item
            else:
                bell.get()
