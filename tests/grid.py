"""A Flower grid whose nodes run in this process, one after another: whole runs without a SuperLink, over the stream."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Calls one ``ClientApp`` for every node, as an engine of Flower does, and turns what it raises into an error.

    Parameters
    ----------
    app : ClientApp
        The clients' app.
    node_configs : Mapping[int, dict]
        The configuration of every node, by its id.
    """

    def __init__(self, app: ClientApp, node_configs: Mapping[int, dict[str, Any]]) -> None:
        self.node_configs = dict(node_configs)
        self.sent: list[Message] = []
        self.contexts: dict[int, Context] = {}
        self.described: dict[int, RecordDict] = {}
        self.beside: Callable[[Message], Message] | None = None
        """Where it is set, what answers in the place of :meth:`answer`; nodes then train at the same time."""
        self._waiting: dict[str, Message] = {}
        self._working: dict[str, Future[Message]] = {}
        self._threads = ThreadPoolExecutor()
        self._folder = tempfile.TemporaryDirectory()
        self.disk = self._folder.name
        self._app = app
        # what an engine says to the process of a task before it runs
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node_configs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(str(len(self.sent)))
            self._waiting[ids[-1]] = message
            self.sent.append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message and self.beside and message.metadata.message_type in ("train.probe", "train"):
                self._working[message_id] = self._threads.submit(self.beside, message)
            elif message:
                replies.append(self._named((self.beside or self.answer)(message), message_id))
            elif message_id in self._working and self._working[message_id].done():
                replies.append(self._named(self._working.pop(message_id).result(), message_id))
        return replies

    @staticmethod
    def _named(reply: Message, message_id: str) -> Message:
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        return reply

    def answer(self, message: Message) -> Message:
        """One node's reply."""
        node = message.metadata.dst_node_id
        config = {"state-dir": self.disk} | self.node_configs[node]
        context = self.contexts.setdefault(node, Context(1, node, config, RecordDict(), {}))
        context.node_config = config
        try:
            reply = self._app(message, context)
            if "description" in reply.content:
                self.described[node] = reply.content
        except Exception as error:
            reply = Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError
