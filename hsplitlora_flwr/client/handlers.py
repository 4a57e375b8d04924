"""The Flower ``ClientApp``: a client describes itself, scores its weights, and trains its part on data that stay."""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.client.budget import (
    adapter_bytes,
    is_measured,
    load_memory_budget,
    measured_flops,
    partition_of,
    stated_speeds,
)
from hsplitlora_flwr.client.store import NodeStore
from hsplitlora_flwr.client.task import Assignment, ClientTask, OwnText, kind_of
from hsplitlora_flwr.config import Config, ConfigError, DataConfig, Scalar
from hsplitlora_flwr.data.fit import Cut, fit_text
from hsplitlora_flwr.data.partition import cached_partition
from hsplitlora_flwr.data.sources import Example, load_text, read_rows
from hsplitlora_flwr.lora.update import DeltaError
from hsplitlora_flwr.messages import (
    DESCRIBE,
    FORGET,
    PROBE,
    TURN,
    Description,
    Progress,
    Task,
    read_base,
    read_settings,
    take_patch,
    take_start,
)
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.fingerprint import check_part, fingerprint
from hsplitlora_flwr.models.loading import read_config
from hsplitlora_flwr.models.placement import check_device
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.privacy.protection import protection
from hsplitlora_flwr.registry import import_plugins
from hsplitlora_flwr.training.cut import CutTransform, SeededCut, chained
from hsplitlora_flwr.training.process import OwnProcess
from hsplitlora_flwr.transport.frames import Failure, Frame
from hsplitlora_flwr.transport.link import TRANSPORTS, Ticket
from hsplitlora_flwr.transport.messages import add_frames, frame_bytes, read_frames
from hsplitlora_flwr.transport.stream import StreamError, Unreachable
from hsplitlora_flwr.transport.workers import WAKE

log = logging.getLogger(__name__)

LoadData = Callable[[Context, Config], Sequence[Example]]
"""Gives a client its examples."""
LoadBudget = Callable[[Context, Config], int]
"""Gives a client its memory budget in bytes."""


def load_own_text(context: Context, config: Config) -> Sequence[Example]:
    """The file that ``data-path`` of the node's configuration names, else the node's share of the configured data set.

    A share goes by ``partition-id`` and ``num-partitions`` of the node, as simulations set them.

    Raises
    ------
    DataError, ConfigError
        If the file is missing or malformed, or the node says neither.
    """
    own = context.node_config.get("data-path")
    if own is not None:
        return read_rows(str(own), config.data)
    if config.data.is_own and not config.data.path:
        raise ConfigError(
            "data.path is empty, so every node needs a file of its own: --node-config 'data-path=\"FILE\"'"
        )
    index, count = partition_of(context)
    return _partitions(config.data, count, config.run.seed)[index]


def split_client_app(
    load_data: LoadData = load_own_text,
    load_budget: LoadBudget = load_memory_budget,
    process: OwnProcess | None = None,
    *,
    cut_transform: CutTransform | None = None,
) -> ClientApp:
    """A Flower ``ClientApp`` that takes part in split fine-tuning.

    Parameters
    ----------
    load_data : Callable[[Context, Config], Sequence[Example]]
        Gives this client its examples; they do not leave it.
    load_budget : Callable[[Context, Config], int]
        Gives this client's memory budget in bytes.
    process : OwnProcess, optional
        The process that it runs in; one of its own by default, as Flower's engines give it.
    cut_transform : CutTransform, optional
        What is done to the cut activation before it leaves this client; the server is told its name.
    """
    app = ClientApp()
    client = _Client(load_data, load_budget, process or OwnProcess(), cut_transform)

    @app.query(_action(DESCRIBE))
    def describe(message: Message, context: Context) -> Message:
        """Say the budget, the amount of data, and the version of the weights that this node holds."""
        import_plugins(context.run_config)
        config, store = _on_this_node(read_settings(message.content), context), NodeStore(context)
        check_device(config.model.device)
        if base := read_base(message.content):
            fingerprint(config.model.path).check(base, config.model.path)
        check_quantiser(config.model.quantise)  # the library is a part of the process, and so are text and tokenizer
        text = client.text(context, config)
        stated = config.clients.process_mb * 1e6
        store.note(process=stated or client.process.resting_bytes(read_config(config.model.path)))
        description = client.describe(context, config, store, text)
        return Message(description.to_records(), reply_to=message)

    @app.train(_action(PROBE))
    def probe(message: Message, context: Context) -> Message:
        """Score the weights that this client holds, on a few batches."""
        return client.take_part(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train this client's adapters."""
        return client.take_part(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Measure the model on examples that this client keeps out of training."""
        return client.take_part(message, context)

    @app.train(_action(TURN))
    def turn(message: Message, context: Context) -> Message:
        """Go on with a task over messages."""
        return client.go_on(message, context)

    @app.query(_action(FORGET))
    def forget(message: Message, context: Context) -> Message:
        """Remove what this node kept of the run."""
        NodeStore(context).forget()
        return Message(RecordDict(), reply_to=message)

    @app.query(_action(WAKE))
    def wake(message: Message, context: Context) -> Message:
        """Show that this process lives."""
        return Message(RecordDict(), reply_to=message)

    return app


@dataclass(frozen=True)
class _Client:
    """What a node does with its messages; nothing is remembered between them but what is on its disk."""

    load_data: LoadData
    load_budget: LoadBudget
    process: OwnProcess
    cut_transform: CutTransform | None

    def text(self, context: Context, config: Config) -> OwnText:
        """The client's examples as tokens; those that it keeps out of training are drawn by seed.

        Raises
        ------
        ConfigError, DataError, ModelFilesError
            If there are none to train on, or they do not fit this node's model.
        """
        examples, apart = self.load_data(context, config), config.evaluation.client_rows
        if len(examples) <= apart:
            kept = f", and evaluation.client_rows={apart} keeps them out of training" if apart else ""
            raise ConfigError(f"client {_name_of(context)} has {len(examples) or 'no'} training examples{kept}")
        rows = fit_text(examples, config)
        held_out = set(random.Random(_data_seed(config, _name_of(context))).sample(range(len(rows)), apart))
        return OwnText(
            train=[row for index, row in enumerate(rows) if index not in held_out],
            held_out=[rows[index] for index in sorted(held_out)],
        )

    def describe(self, context: Context, config: Config, store: NodeStore, text: OwnText) -> Description:
        """What a plan needs to know of this client."""
        memory, (flops, up, down) = self.load_budget(context, config), stated_speeds(context, config)
        if is_measured(context, config):
            memory = int(store.steady("memory", memory))
            flops = flops or store.number("flops") or store.steady("flops", measured_flops(config))
            up, down = up or store.number("up"), down or store.number("down")
        version, held = store.held()
        cut = Cut.of(text.train)
        return Description(
            name=_name_of(context),
            examples=len(text.train),
            memory_bytes=memory,
            process_bytes=int(store.number("process")),
            longest=max(map(len, (*text.train, *text.held_out))),
            held=held,
            version=version,
            flops=flops,
            up=up,
            down=down,
            adapter_bytes=adapter_bytes(context, config),
            tokens=cut.tokens,
            cut_rows=cut.cut_rows,
            cut_tokens=cut.cut_tokens,
            cut_transform=changed.name if (changed := self.change_of_cut(config)) else "",
        )

    def change_of_cut(self, config: Config) -> CutTransform | None:
        """What is done to the cut activation before it leaves: the app's own change, then that of the settings."""
        return chained(self.cut_transform, protection(config.split)) if METHODS[config.method.name].split else None

    def assignment(self, task: Task, text: OwnText, store: NodeStore) -> Assignment:
        """A task with what this node does it with."""
        seed, transform = _data_seed(task.config, task.client), None
        if change := self.change_of_cut(task.config):
            own = "" if change.reproducible else store.secret()
            place = f"{task.config.run.seed}/{task.client}/{task.kind}/{task.round}/{own}"
            transform = SeededCut(change, place)
        return Assignment(task, text, seed, transform)

    def take_part(self, message: Message, context: Context) -> Message:
        """Do a task over the stream, or take the first turn over messages."""
        progress = Progress()
        import_plugins(context.run_config)
        self.process.return_freed_memory()  # before tensors come: where they lie is settled when they are made
        task = Task.from_records(message.content)
        task = replace(task, config=_on_this_node(task.config, context))
        model = task.config.model
        with self.process.loading():
            check_part(task.base, model.path, task.split, model.dtype, head=task.labels_stay)
        work = partial(self._work, message, context, task, progress)
        return self.process.keep_freed_memory(work) if task.spacious else work()

    def _work(self, message: Message, context: Context, task: Task, progress: Progress) -> Message:
        store = NodeStore(context)
        text, frames = self.text(context, task.config), list[Frame]()
        with self.process.peak_memory() as memory:
            try:
                changes = {} if task.from_base else store.update(take_patch(message.content))
            except DeltaError as error:  # then the server sends all of it
                log.warning("the update on disk is not what it was: %s", error)
                return Message(self.describe(context, task.config, store, text).to_records(), reply_to=message)
            start, given = take_start(message.content), self.assignment(task, text, store)
            with self.process.loading():
                begun = kind_of(task)(given, changes, start)
            changes, start = {}, {}  # merged, and from here on only the model holds what it needs
            progress.begin()
            done = task.method.split and bool(task.token) and _over_stream(begun, context, store, progress)
            if not done:
                frames, done = begun.take_turn([])
        progress.peak = max(progress.peak, memory.bytes)
        return self._reply(message, context, begun, frames, done, progress)

    def go_on(self, message: Message, context: Context) -> Message:
        """Take the next turn of a task over messages, from what the turn before left on disk."""
        import_plugins(context.run_config)
        self.process.return_freed_memory()
        store, answers = NodeStore(context), read_frames(message.content)
        if isinstance(answers[0], Failure):
            store.end_training()
            raise StreamError(f"the server shard failed: {answers[0].error}")
        tensors, kept = store.load_training()
        config, progress = Config.from_run_config(kept["settings"]), Progress(**kept["progress"])
        task = Task.from_text(config, kept["task"])
        text = self.text(context, config)
        with self.process.peak_memory() as memory:
            changes = {} if task.from_base else store.changes()
            given = self.assignment(task, text, store)
            with self.process.loading():
                begun = kind_of(task)(given, changes)
            changes = {}
            begun.restore(tensors, kept["state"])
            frames, done = begun.take_turn(answers)
        progress.bytes_down += frame_bytes(message.content)
        progress.peak = max(progress.peak, memory.bytes)
        return self._reply(message, context, begun, frames, done, progress)

    def _reply(
        self,
        message: Message,
        context: Context,
        begun: ClientTask,
        frames: Sequence[Frame],
        done: bool,
        progress: Progress,
    ) -> Message:
        """Frames for the server, and with the last of them the outcome."""
        task, store, records = begun.task, NodeStore(context), RecordDict()
        if frames:
            add_frames(records, frames)
            progress.bytes_up += frame_bytes(records)
        if done:
            store.end_training()
            description = self.describe(context, task.config, store, begun.given.text)
            records.update(begun.outcome(progress, description).to_records())
        else:
            tensors, state = begun.state()
            kept = {"settings": task.config.to_run_config(), "task": task.to_text(), "progress": vars(progress)}
            store.save_training(tensors, kept | {"state": state})
        return Message(records, reply_to=message)


def _over_stream(begun: ClientTask, context: Context, store: NodeStore, progress: Progress) -> bool:
    """Do a task over the stream; False if none opens and messages are to take its place."""
    task, transport = begun.task, begun.task.config.transport
    try:
        with TRANSPORTS[transport.kind].connect(Ticket(task.endpoint, task.token), transport) as link:
            if is_measured(context, task.config) and not store.number("up"):
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


def _action(message_type: str) -> str:
    return message_type.partition(".")[2]


OF_NODES = {
    "model-path": "model.path",
    "device": "model.device",
    "proxy": "transport.proxy",
    "cut-clip": "split.clip",
    "cut-noise": "split.noise",
}
"""What a node may say in its ``--node-config`` in place of a setting."""


def _on_this_node(config: Config, context: Context) -> Config:
    """The settings with what this node's configuration says instead (:data:`OF_NODES`)."""
    node = context.node_config
    own: dict[str, Scalar] = {setting: node[name] for name, setting in OF_NODES.items() if name in node}
    return Config.from_run_config(config.to_run_config() | own) if own else config


def _name_of(context: Context) -> str:
    """How logs and results call this client."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", context.node_id)))


def _data_seed(config: Config, client: str) -> int:
    number = int(client) if client.isdigit() else zlib.crc32(client.encode())
    return config.run.seed * 1_000_003 + number % 1_000_003


@lru_cache(maxsize=1)
def _partitions(data: DataConfig, count: int, seed: int) -> list[list[Example]]:
    """Every client's examples; a worker process of a simulation serves many clients and reads the files once."""
    examples = load_text(data, seed).train
    return [[examples[row] for row in rows] for rows in cached_partition(examples, data, count, seed)]
