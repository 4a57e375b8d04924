"""A process beside a SuperLink that ends it, with all that it started, if the launcher dies.

A launcher that is killed cannot stop what it started. So beside every SuperLink of ours this file runs as a process of
its own (:func:`guarding`), which reads from a pipe that only the launcher writes to. If the pipe closes without a word,
the launcher is dead.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HOME = "FLWR_HOME"
"""The variable that names a SuperLink's private folder, and by which its processes are known."""
_KILLED = "the launcher was killed; everything that it had started is stopped"
_DONE = b"done"


@contextmanager
def guarding(pid: int, home: str, run_folder: Path) -> Iterator[None]:
    """Whatever becomes of this process inside, the SuperLink ``pid`` does not outlive it.

    Parameters
    ----------
    pid, home : int, str
        Of the SuperLink, which leads a session.
    run_folder : Path
        Whose summary is to say how the run ended.
    """
    # A session of its own: what ends the launcher's is not to end it.
    command = [sys.executable, __file__, str(pid), home, str(run_folder)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it was killed, too
            guard.communicate(_DONE)


def end_all(pid: int, home: str) -> None:
    """End a SuperLink and whatever it has started: first by asking it, then by asking all, then by force."""
    sessions = _sessions(pid, home)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    psutil.wait_procs(_members(sessions), timeout=3)
    sessions |= _sessions(pid, home)
    for member in _members(sessions):
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    psutil.wait_procs(_members(sessions), timeout=3)
    while members := _members(sessions):
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=1)


def _sessions(pid: int, home: str) -> set[int]:
    """The sessions of a SuperLink and of what it has started, even if the SuperLink itself is dead.

    Flower and Ray start sessions of their own, and a process whose parent died still belongs to its session. Who leads
    a session has the SuperLink's private home in its environment; others may overwrite theirs with their title.
    """
    sessions = {pid}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(HOME) == home:
                sessions.add(os.getsid(process.pid))
    return sessions - {os.getsid(0)}


def _members(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of some sessions."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    return members


def _watch(pid: int, home: str, run_folder: Path) -> None:
    """Wait for the launcher's word, or its death."""
    if sys.stdin.buffer.read() == _DONE:
        return
    end_all(pid, home)
    shutil.rmtree(home, ignore_errors=True)
    from hsplitlora_flwr.reporting.report import failed_outside

    failed_outside(run_folder, _KILLED)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
