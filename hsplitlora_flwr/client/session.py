"""A Flower message that lasts: the task that it brought, and the tasks that follow over the stream.

The server may keep a client (:attr:`hsplitlora_flwr.messages.Task.lasting`). Then the reply to the task goes over the
stream, and the server's next message arrives there too, without starting a process. No model is in memory between two
tasks. If the stream breaks for longer than the grace, the message ends, and so does the process.
"""

from __future__ import annotations

from flwr.app import Message, RecordDict

from hsplitlora_flwr.client.node import Node
from hsplitlora_flwr.client.turn import Line, Turn
from hsplitlora_flwr.messages import (
    DESCRIBE,
    FORGET,
    pack_content,
    unpack_content,
)
from hsplitlora_flwr.transport.frames import Released, Reply, Request
from hsplitlora_flwr.transport.link import MeasuredLink
from hsplitlora_flwr.transport.stream import StreamError


class Session:
    """What a node does with a message that brings a task.

    Parameters
    ----------
    node : Node
    message : Message
    """

    def __init__(self, node: Node, message: Message) -> None:
        self._node, self._message = node, message

    def run(self) -> Message:
        """Do the task, and those that follow it over the stream; returns the reply to the message."""
        with Line() as line:
            reply, lasts = Turn(self._node, self._message.content, line).begin()
            if lasts and line.link:
                self._go_on(reply, line, line.link)
                reply = RecordDict()
        return Message(reply, reply_to=self._message)

    def _go_on(self, reply: RecordDict, line: Line, link: MeasuredLink) -> None:
        self._node.process.settle()
        while True:
            link.send(Reply(pack_content(reply)))
            reply = RecordDict()
            request = link.receive()
            if isinstance(request, Released):
                return
            if not isinstance(request, Request):
                raise StreamError(f"the server shard answered a reply with {type(request).__name__}")
            reply = self._answer(request.kind, unpack_content(request.content), line)
            del request

    def _answer(self, kind: str, content: RecordDict, line: Line) -> RecordDict:
        if kind == DESCRIBE:
            return self._node.introduce(content)
        if kind == FORGET:
            self._node.store.forget()
            return RecordDict()
        return Turn(self._node, content, line).begin()[0]
