"""A grid that waits to be asked: its nodes work one after another, in the thread of whoever pulls their replies."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.cli.in_process import InProcessGrid


class LocalGrid(InProcessGrid):
    """Remembers what was sent, and reads its nodes' configurations anew for every message.

    Parameters
    ----------
    app : ClientApp
        The clients' app.
    node_configs : Mapping[int, dict]
        The configuration of every node, by its id.
    """

    wait = None  # type: ignore[assignment]  # as Flower's own grids, it does not say when a reply has come

    def __init__(self, app: ClientApp, node_configs: Mapping[int, dict[str, Any]]) -> None:
        super().__init__(app, node_configs)
        self.node_configs = dict(node_configs)
        self.sent: list[Message] = []
        self.described: dict[int, RecordDict] = {}
        self.beside: Callable[[Message], Message] | None = None
        """Where it is set, what answers in the place of :meth:`answer`; nodes then train at the same time."""
        self._waiting: dict[str, Message] = {}
        self._folder = tempfile.TemporaryDirectory()
        self.disk = self._folder.name

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node_configs)

    def push(self, message: Message) -> str:
        self.sent.append(message)
        if self.beside and message.metadata.message_type in ("train.probe", "train"):
            return super().push(message)
        message_id = next(self.numbers)
        self._waiting[message_id] = message
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = list(message_ids)
        asked = (self._waiting.pop(message_id, None) for message_id in message_ids)
        return [*(self.respond(message) for message in asked if message), *super().pull_messages(message_ids)]

    def respond(self, message: Message) -> Message:
        return (self.beside or self.answer)(message)

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        config = {"state-dir": self.disk} | self.node_configs[node]
        self.contexts.setdefault(node, Context(1, node, config, RecordDict(), {})).node_config = config
        reply = super().answer(message)
        if not reply.has_error() and "description" in reply.content:
            self.described[node] = reply.content
        return reply
