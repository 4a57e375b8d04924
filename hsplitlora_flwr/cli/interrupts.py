"""Signals that ask a command to end: obeyed at once while nothing was started, otherwise where it can be stopped.

An exception from a signal handler may arrive between any two instructions, for instance between the start of a process
and the note that it must be stopped. So while processes run, signals are only noted (:func:`held`), and loops that wait
check for them (:func:`obey`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, and the end of the terminal."""


class Interrupted(SystemExit):
    """A signal asked for the end; the exit status is the one that shells expect.

    Parameters
    ----------
    number : int
        The signal's.

    Attributes
    ----------
    told : bool
        The user knows already what was stopped and how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.told = False


def interruptible() -> None:
    """Let signals raise :class:`Interrupted`; those that the process was told to ignore, as by ``nohup``, stay so."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextmanager
def held() -> Iterator[None]:
    """Note signals instead of being interrupted; :func:`obey`, and at last the end of this, obeys them.

    Inside another ``held``, and outside the main thread, which alone gets signals, it does nothing.
    """
    if _noted.held or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    _noted.number, _noted.held = None, True
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _note)
    try:
        yield
    finally:
        _noted.held = False
        for number, handler in before.items():
            signal.signal(number, handler)
    obey()


def obey() -> None:
    """Raise :class:`Interrupted` if a signal has come since it was last obeyed."""
    number, _noted.number = _noted.number, None
    if number is not None:
        raise Interrupted(number)


class _Noted:
    """Of this process, as its signal handlers are."""

    held = False
    number: int | None = None


_noted = _Noted()


def _note(number: int, frame: FrameType | None) -> None:
    _noted.number = number


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
