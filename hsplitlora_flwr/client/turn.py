"""A message of a task, from what it brings to the reply: all of the task over the stream, or one turn over messages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict

from hsplitlora_flwr.client.node import Node
from hsplitlora_flwr.client.task import ClientTask, OwnText, kind_of
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.update import Change, UpdateError
from hsplitlora_flwr.messages import Progress, Task, take_patch, take_start
from hsplitlora_flwr.models.fingerprint import check_part
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.transport.frames import Failure, Frame
from hsplitlora_flwr.transport.link import TRANSPORTS, Ticket
from hsplitlora_flwr.transport.messages import add_frames, frame_bytes, read_frames
from hsplitlora_flwr.transport.stream import StreamError, Unreachable

log = logging.getLogger(__name__)


class Turn:
    """What a node does with one message of a task.

    Parameters
    ----------
    node : Node
    message : Message
        With the task, or with the server's answers to the turn before.
    """

    def __init__(self, node: Node, message: Message) -> None:
        self._node, self._message = node, message
        node.process.return_freed_memory()  # before tensors come: where they lie is settled when they are made

    def begin(self) -> Message:
        """Do a task over the stream, or take the first turn over messages."""
        progress, node = Progress(), self._node
        task = Task.from_records(self._message.content)
        task = replace(task, config=node.settings(task.config))
        model = task.config.model
        with node.process.loading():
            check_part(task.base, model.path, task.split, model.dtype, head=task.labels_stay)
        if task.spacious:
            return node.process.keep_freed_memory(lambda: self._begin(task, progress))
        return self._begin(task, progress)

    def _begin(self, task: Task, progress: Progress) -> Message:
        node, text, frames = self._node, self._node.text(task.config), list[Frame]()
        with node.process.peak_memory(pick_devices(task.config.model.device)) as memory:
            try:
                changes = {} if task.from_base else node.store.update(take_patch(self._message.content))
            except UpdateError as error:  # then the server sends all of it
                log.warning("the update on disk is not what it was: %s", error)
                return Message(node.describe(task.config, text).to_records(), reply_to=self._message)
            start = take_start(self._message.content)
            begun = self._load(task, text, changes, start)
            changes, start = {}, {}  # merged, and from here on only the model holds what it needs
            progress.begin()
            done = task.method.split and bool(task.token) and self._over_stream(begun, progress)
            if not done:
                frames, done = begun.take_turn([])
        progress.note_peaks(memory.bytes, memory.host_bytes)
        return self._reply(begun, frames, done, progress)

    def go_on(self) -> Message:
        """Take the next turn over messages, from what the turn before left on disk."""
        node, answers = self._node, read_frames(self._message.content)
        if isinstance(answers[0], Failure):
            node.store.end_training()
            raise StreamError(f"the server shard failed: {answers[0].error}")
        tensors, kept = node.store.load_training()
        config, progress = Config.from_run_config(kept["settings"]), Progress(**kept["progress"])
        task, text = Task.from_text(config, kept["task"]), node.text(config)
        with node.process.peak_memory(pick_devices(config.model.device)) as memory:
            begun = self._load(task, text, {} if task.from_base else node.store.changes())
            begun.restore(tensors, kept["state"])
            frames, done = begun.take_turn(answers)
        progress.bytes_down += frame_bytes(self._message.content)
        progress.note_peaks(memory.bytes, memory.host_bytes)
        return self._reply(begun, frames, done, progress)

    def _load(
        self, task: Task, text: OwnText, changes: Mapping[str, Change], start: Mapping[str, Factors] | None = None
    ) -> ClientTask:
        given = self._node.assignment(task, text)
        with self._node.process.loading():
            return kind_of(task)(given, changes, start or {})

    def _over_stream(self, begun: ClientTask, progress: Progress) -> bool:
        """Do a task over the stream; False if none opens and messages are to take its place."""
        task, transport, store = begun.task, begun.task.config.transport, self._node.store
        try:
            with TRANSPORTS[transport.kind].connect(Ticket(task.endpoint, task.token), transport) as link:
                if self._node.measures(task.config) and not store.number("up"):
                    up, down = link.measure()
                    store.note(up=up, down=down)
                begun.work(link)
        except Unreachable as error:
            if transport.kind != "auto":
                raise
            log.warning("going on over messages: %s", error)
            return False
        progress.bytes_up, progress.bytes_down = link.bytes_up, link.bytes_down
        return True

    def _reply(self, begun: ClientTask, frames: Sequence[Frame], done: bool, progress: Progress) -> Message:
        """Frames for the server, and with the last of them the outcome."""
        task, store, records = begun.task, self._node.store, RecordDict()
        if frames:
            add_frames(records, frames)
            progress.bytes_up += frame_bytes(records)
        if done:
            store.end_training()
            description = self._node.describe(task.config, begun.given.text)
            records.update(begun.outcome(progress, description).to_records())
        else:
            tensors, state = begun.state()
            kept = {"settings": task.config.to_run_config(), "task": task.to_text(), "progress": vars(progress)}
            store.save_training(tensors, kept | {"state": state})
        return Message(records, reply_to=self._message)
