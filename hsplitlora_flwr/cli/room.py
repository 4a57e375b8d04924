"""Memory of a machine that the jobs of a sweep share: one begins when what it is planned to take is there.

A job that runs has a file in a folder of the sweep, whose name says how much it takes and which it keeps locked. The
system drops the lock of a process that ends, however it ends, so nothing has to be cleared up after one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hsplitlora_flwr.cli.interrupts import obey
from hsplitlora_flwr.reporting.events import format_bytes

SHARE_OF_MEMORY = 0.8
"""How much of the free memory what is started side by side may take."""
_AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Room:
    """What the jobs of a sweep may take together.

    Parameters
    ----------
    folder : Path
        Of this sweep, and of nobody else.
    bytes : int
    """

    folder: Path
    bytes: int

    @contextmanager
    def taken(self, wanted: int, tell: Callable[[str], None]) -> Iterator[None]:
        """Wait until there is room for a job, and keep it; a job that is too large for all of it runs alone.

        Parameters
        ----------
        wanted : int
            Bytes that the job is planned to take.
        tell : Callable[[str], None]
            Is told, once, what it waits for.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if wanted > self.bytes:
            tell(f"it is planned to take {format_bytes(wanted)} of the {format_bytes(self.bytes)} there are: alone")
        waited = False
        while (mine := self._take(wanted)) is None:
            if not waited:
                others = format_bytes(sum(self._of_others()))
                tell(f"waits for memory: {format_bytes(wanted)} planned, {others} of {format_bytes(self.bytes)} taken")
                waited = True
            obey()
            time.sleep(_AGAIN_SECONDS)
        try:
            yield
        finally:
            mine.release()
            Path(mine.lock_file).unlink(missing_ok=True)

    def _take(self, wanted: int) -> FileLock | None:
        """The lock of a job that may begin; None while there is no room for it."""
        with FileLock(self.folder / "one-at-a-time"):
            others = list(self._of_others())
            if others and sum(others) + wanted > self.bytes:
                return None
            mine = FileLock(self.folder / f"{secrets.token_hex(4)}-{wanted}.job")
            mine.acquire()
            return mine

    def _of_others(self) -> Iterator[int]:
        """What each running job takes."""
        for file in self.folder.glob("*.job"):
            try:
                with FileLock(file, timeout=0):
                    pass
            except Timeout:
                yield int(file.stem.partition("-")[2])
            else:
                file.unlink(missing_ok=True)  # of a process that has ended
