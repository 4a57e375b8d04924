"""A run as a process of its own beside whoever wants it: one that is killed, as for lack of memory, costs itself alone.

Whoever starts it needs nothing that it needs, and so imports neither torch nor Flower here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import lru_cache
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import TracebackType
from typing import Self

from hsplitlora_flwr.config import Config, Scalar
from hsplitlora_flwr.registry import import_plugins


class RunProcess:
    """A run that goes on in a process of its own.

    Parameters
    ----------
    config : Config
        The settings, with ``run.dir`` absolute.
    log : Path
        What it says.
    cores, threads : int
        As for :func:`hsplitlora_flwr.cli.in_process.run_here`.
    """

    def __init__(self, config: Config, log: Path, *, cores: int = 0, threads: int = 1) -> None:
        self._process = _context().Process(target=_run, args=(config.to_run_config(), log, cores, threads), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()

    def ended(self, seconds: float) -> bool:
        """Whether it is over, waiting for so long."""
        self._process.join(seconds)
        return not self._process.is_alive()

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, and not it itself."""
        return (self._process.exitcode or 0) < 0

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self._process.exitcode != 0


_PATIENCE = 5.0  # seconds for a process that was asked to end


@lru_cache(maxsize=1)
def _context() -> SpawnContext | ForkServerContext:
    """Where processes come from: copies of one that has imported everything, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # OpenMP threads that spin while they wait make several processes on one machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        # a worker of joblib starts processes in a way of its own, and what it starts would have to know it
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hsplitlora_flwr.cli.in_process", "transformers.modeling_utils"])
    return context


def _run(settings: dict[str, Scalar], log: Path, cores: int, threads: int) -> None:
    """The main program of a run's process."""
    with log.open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits for the run says when it is to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_plugins(settings)
    from hsplitlora_flwr.cli.in_process import run_here

    run_here(Config.from_run_config(settings), cores=cores, threads=threads)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
