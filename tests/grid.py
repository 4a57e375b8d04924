"""A Flower grid whose nodes run in this process, one after another: whole runs without a SuperLink, over the stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
        self._waiting: dict[str, Message] = {}
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
        waiting = {one: self._waiting.pop(one) for one in message_ids if one in self._waiting}
        replies = self.answer_all(list(waiting.values()))
        for message_id, reply in zip(waiting, replies, strict=True):
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
        return replies

    def answer_all(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The replies to messages that were pushed together."""
        return [self.answer(message) for message in messages]

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
