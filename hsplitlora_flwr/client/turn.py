"""One task from the message that brings it to the reply: in one go over the stream, or one turn over messages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from flwr.app import RecordDict

from hsplitlora_flwr.client.node import Node
from hsplitlora_flwr.client.task import ClientTask, OwnText, kind_of
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.update import Change, UpdateError
from hsplitlora_flwr.messages import Progress, Task, answering_here, take_patch, take_start
from hsplitlora_flwr.models.fingerprint import check_part
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.transport.frames import Failure, Frame
from hsplitlora_flwr.transport.link import TRANSPORTS, MeasuredLink, Ticket
from hsplitlora_flwr.transport.messages import add_frames, frame_bytes, read_frames
from hsplitlora_flwr.transport.stream import StreamError, Unreachable

log = logging.getLogger(__name__)


class Line:
    """A client's end of the stream, open from its first task on; a context manager that closes it."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._link: MeasuredLink | None = None
        self._closed = False  # none opens

    def __enter__(self) -> Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, tb)
        self._link = None

    @property
    def link(self) -> MeasuredLink | None:
        """The stream, where it is open."""
        return self._link

    def open(self, task: Task) -> MeasuredLink | None:
        """The stream of a task, opened for the first; None where none opens and messages are to take its place.

        Raises
        ------
        StreamError
            If none opens, and messages are not to.
        """
        transport = task.config.transport
        if self._link is None and task.token and not self._closed:
            way = TRANSPORTS[transport.kind].connect(Ticket(task.endpoint, task.token), transport)
            try:
                self._link = self._opened.enter_context(way)
            except Unreachable as error:
                if transport.kind != "auto":
                    raise
                log.warning("going on over messages: %s", error)
                self._closed = True
        return self._link


class Turn:
    """A node's work on one message of a task, or on what comes over the stream in place of one.

    Parameters
    ----------
    node : Node
    content : RecordDict
        With the task, or with the server's answers to the turn before.
    line : Line
        The node's stream.
    """

    def __init__(self, node: Node, content: RecordDict, line: Line) -> None:
        self._node, self._content, self._line = node, content, line
        node.process.return_freed_memory()  # before tensors come: where they lie is settled when they are made

    def begin(self) -> tuple[RecordDict, bool]:
        """Do a task over the stream, or take the first turn over messages.

        Returns
        -------
        tuple[RecordDict, bool]
            The content of the reply, and whether the stream stays open for it and for what follows.
        """
        progress, node = Progress(), self._node
        task = Task.from_records(self._content)
        task = replace(task, config=node.settings(task.config))
        # who stays opens it first of all, so that the server knows; who goes, last: a second message may bring the task
        lasts = task.lasting and not answering_here.get() and self._line.open(task) is not None
        model = task.config.model
        with node.process.loading():
            check_part(task.base, model.path, task.split, model.dtype, head=task.labels_stay)
        if task.spacious:
            return node.process.keep_freed_memory(lambda: self._begin(task, progress)), lasts
        return self._begin(task, progress), lasts

    def _begin(self, task: Task, progress: Progress) -> RecordDict:
        node, text, frames = self._node, self._node.text(task.config), list[Frame]()
        with node.process.peak_memory(pick_devices(task.config.model.device)) as memory:
            try:
                changes = {} if task.from_base else node.store.update(take_patch(self._content))
            except UpdateError as error:  # then the server sends all of it
                log.warning("the update on disk is not what it was: %s", error)
                return node.describe(task.config, text).to_records()
            start = take_start(self._content)
            begun = self._load(task, text, changes, start)
            changes, start = {}, {}  # merged, and from here on only the model holds what it needs
            progress.begin()
            if link := self._line.open(task):
                self._over_stream(begun, link, progress)
                done = True
            else:
                frames, done = begun.take_turn([])
        progress.note_peaks(memory.bytes, memory.host_bytes)
        return self._reply(begun, frames, done, progress)

    def go_on(self) -> RecordDict:
        """Take the next turn over messages, from what the turn before left on disk; returns the reply's content."""
        node, answers = self._node, read_frames(self._content)
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
        progress.bytes_down += frame_bytes(self._content)
        progress.note_peaks(memory.bytes, memory.host_bytes)
        return self._reply(begun, frames, done, progress)

    def _load(
        self, task: Task, text: OwnText, changes: Mapping[str, Change], start: Mapping[str, Factors] | None = None
    ) -> ClientTask:
        given = self._node.assignment(task, text)
        with self._node.process.loading():
            return kind_of(task)(given, changes, start or {})

    def _over_stream(self, begun: ClientTask, link: MeasuredLink, progress: Progress) -> None:
        """Do a task over the stream."""
        store, up, down = self._node.store, link.bytes_up, link.bytes_down
        if self._node.measures(begun.task.config) and not store.number("up"):
            measured_up, measured_down = link.measure()
            store.note(up=measured_up, down=measured_down)
        begun.work(link)
        progress.bytes_up, progress.bytes_down = link.bytes_up - up, link.bytes_down - down

    def _reply(self, begun: ClientTask, frames: Sequence[Frame], done: bool, progress: Progress) -> RecordDict:
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
        return records
