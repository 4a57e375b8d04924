"""A run in one process: server and clients in threads, without an engine that starts processes for them.

The apps are those that Flower runs, and they talk as they do there: messages hold records of bytes, and the tensors of
a step travel over the stream, or in messages. Nothing is passed by reference, so the bits are those of a run on Flower;
what a run takes is its training. What cannot be told here, the memory that one client takes, is not reported.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config, Scalar
from hsplitlora_flwr.methods import shares_half, with_room_for_messages
from hsplitlora_flwr.models.cores import all_cores, limit_cores
from hsplitlora_flwr.server_app import make_strategy
from hsplitlora_flwr.training.process import SharedProcess

log = logging.getLogger(__name__)

_APP_FAILED = 2
"""Flower's number of an error for an exception in a ``ClientApp``."""


class InProcessGrid(Grid):
    """A Flower grid whose nodes are threads of this process.

    Parameters
    ----------
    app : ClientApp
        The clients' app.
    nodes : Mapping[int, Mapping[str, Scalar]]
        The configuration of every node, by its id.
    at_once : int
        Nodes that work at the same time; 0 = all.
    threads : int
        Threads of one operation of a node.
    """

    def __init__(
        self, app: ClientApp, nodes: Mapping[int, Mapping[str, Scalar]], *, at_once: int = 0, threads: int = 1
    ) -> None:
        self._app = app
        self.contexts = {node: Context(1, node, dict(config), RecordDict(), {}) for node, config in nodes.items()}
        self.numbers = map(str, itertools.count())
        self._threads = ThreadPoolExecutor(
            at_once or max(len(nodes), 1), "client", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._replies: dict[str, Future[Message]] = {}
        # Whoever writes a message is a task, says Flower; an engine says which, and there is no public way to.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._threads.shutdown(wait=error is None, cancel_futures=True)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        """Let a node begin with a message; returns the message's id."""
        message_id = next(self.numbers)
        self._replies[message_id] = self._threads.submit(self.respond, message)
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [each for each in message_ids if each in self._replies and self._replies[each].done()]
        return [self._replies.pop(message_id).result() for message_id in done]

    def wait(self, seconds: float) -> None:
        """Return when a node has answered, or after so many seconds."""
        if not wait(self._replies.values(), seconds, FIRST_COMPLETED).done:
            time.sleep(0 if self._replies else seconds)

    def respond(self, message: Message) -> Message:
        """What is done with a message, in a thread of its node."""
        return self.answer(message)

    def answer(self, message: Message) -> Message:
        """One node's reply; what its app raises becomes an error, as on an engine of Flower."""
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            log.warning("node %d: %s", message.metadata.dst_node_id, error, exc_info=True)
            return Message(Error(_APP_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("write Message(content, node, message_type)")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        deadline, waiting = time.monotonic() + (timeout or float("inf")), set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            self.wait(1.0)
            done = {each for each in waiting if self._replies[each].done()}
            replies += self.pull_messages(done)
            waiting -= done
        return replies


def run_here(config: Config, *, cores: int = 0, threads: int = 1) -> None:
    """One run in this process, from start to end; whatever ends it early is raised, and told in its summary.

    Parameters
    ----------
    config : Config
        The settings, with ``run.dir``.
    cores : int
        That the run takes; 0 = all that there are.
    threads : int
        Of one operation of a client.
    """
    limit_cores(cores)
    torch.set_num_threads(min(torch.get_num_threads(), all_cores()))
    process, count = SharedProcess(), config.clients.count
    # where steps take turns, clients wait for each other
    at_once = count if shares_half(config) else max(all_cores() // threads, 1)
    config = with_room_for_messages(config, at_once)
    with tempfile.TemporaryDirectory() as disk:
        nodes: dict[int, dict[str, Scalar]] = {
            index + 1: {"partition-id": index, "num-partitions": count, "state-dir": disk} for index in range(count)
        }
        with InProcessGrid(split_client_app(process=process), nodes, at_once=at_once, threads=threads) as grid:
            make_strategy(config, Path(config.run.dir), process).start(grid)
