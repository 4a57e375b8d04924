"""The client: it describes itself, scores its weights, and trains its part of the model on data that stay with it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hsplitlora_flwr.config import Config, ConfigError, DataConfig
from hsplitlora_flwr.control import DESCRIBE, PROBE, Description, Outcome, Task, read_settings
from hsplitlora_flwr.data.collate import Tokens, tokenize, training_batches
from hsplitlora_flwr.data.partition import partition
from hsplitlora_flwr.data.sources import Example, load_text
from hsplitlora_flwr.lora.delta import unpack
from hsplitlora_flwr.lora.layers import extract, inject
from hsplitlora_flwr.models.loading import load_tokenizer, pick_device, read_config
from hsplitlora_flwr.models.split import WholeModel
from hsplitlora_flwr.planning.importance import scoring
from hsplitlora_flwr.training.client import load_client, load_whole, train_client
from hsplitlora_flwr.training.memory import PeakMemory, process_bytes, return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.whole import train_whole
from hsplitlora_flwr.transport.stream import StreamLink

LoadData = Callable[[Context, Config], Sequence[Example]]
"""Gives a client its training examples."""
LoadBudget = Callable[[Context, Config], int]
"""Gives a client its memory budget in bytes."""


def load_partition(context: Context, config: Config) -> Sequence[Example]:
    """A client's share of the configured data set, by the ``partition-id`` and ``num-partitions`` of its node."""
    index, count = _partition_of(context)
    return _partitions(config.data, count, config.run.seed)[index]


def load_memory_budget(context: Context, config: Config) -> int:
    """``memory-gb`` of the node's configuration, else the entry of ``clients.memory_gb`` for its partition.

    Raises
    ------
    ConfigError
        If neither says a budget.
    """
    stated = context.node_config.get("memory-gb")
    if stated is not None:
        if not isinstance(stated, int | float) or not stated > 0:
            raise ConfigError(f"memory-gb={stated!r} of the node must be a number above 0")
        return int(stated * 1e9)
    if not config.memory_bytes:
        raise ConfigError("the node states no memory-gb in its --node-config, and clients.memory_gb is empty")
    return config.memory_bytes[_partition_of(context)[0] % len(config.memory_bytes)]


def split_client_app(load_data: LoadData = load_partition, load_budget: LoadBudget = load_memory_budget) -> ClientApp:
    """A Flower ``ClientApp`` that takes part in split fine-tuning.

    Parameters
    ----------
    load_data : Callable[[Context, Config], Sequence[Example]]
        Gives this client its training examples; they do not leave it.
    load_budget : Callable[[Context, Config], int]
        Gives this client's memory budget in bytes.
    """
    app = ClientApp()

    @app.query(DESCRIBE.partition(".")[2])
    def describe(message: Message, context: Context) -> Message:
        """Say the budget and the amount of data."""
        config = read_settings(message.content)
        rows = _rows(context, config, load_data)
        description = Description(
            name=_name_of(context),
            examples=len(rows),
            memory_bytes=load_budget(context, config),
            process_bytes=process_bytes(read_config(config.model.path)),
            longest=max(map(len, rows)),
            version=0,
            flops=_speed(context, config, "gflops") * 1e9,
            up=_speed(context, config, "mbit_up") * 1e6 / 8,
            down=_speed(context, config, "mbit_down") * 1e6 / 8,
        )
        return Message(description.to_records(), reply_to=message)

    @app.train(PROBE.partition(".")[2])
    def probe(message: Message, context: Context) -> Message:
        """Score the weights that this client holds, on a few batches."""
        return _take_part(message, context, load_data, scores_weights=True)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train this client's adapters over the stream."""
        return _take_part(message, context, load_data, scores_weights=False)

    return app


def _take_part(message: Message, context: Context, load_data: LoadData, *, scores_weights: bool) -> Message:
    return_freed_memory()  # before tensors come: where they lie is settled when they are made
    task = Task.from_records(message.content)
    config, train = task.config, task.config.train
    rows = _rows(context, config, load_data)
    batches = training_batches(rows, train.batch_size, _data_seed(config, task.client), task.first_step)

    with PeakMemory() as memory:
        device, method = pick_device(config.model.device), task.method
        path, dtype, changes = config.model.path, config.model.dtype, dict(unpack(task.changes))
        model = (
            load_client(path, task.split, dtype, device, changes)
            if method.split
            else load_whole(path, dtype, device, changes)
        )
        task.changes.clear()
        changes.clear()
        parameters = inject(model, task.specs, task.seed, task.start, freeze_a=method.freeze_a)
        optimizer = AdapterOptimizer(parameters, train)
        model.train()
        importance: dict[str, float] = {}
        bytes_up = bytes_down = 0
        if isinstance(model, WholeModel):
            record = train_whole(
                model,
                optimizer,
                batches,
                first_step=task.first_step,
                steps=task.steps,
                micro_batch_size=train.micro_batch_size,
            )
        else:
            probing: AbstractContextManager[dict[str, float]] = (
                scoring(model, config.plan.cost, config.lora.rank) if scores_weights else nullcontext(importance)
            )
            with StreamLink(task.address, task.token) as link, probing as importance:
                record = train_client(
                    model,
                    optimizer,
                    batches,
                    link,
                    first_step=task.first_step,
                    steps=task.steps,
                    # |W * gradient| is not additive over parts of a batch, so a probe takes the batch whole
                    micro_batch_size=0 if scores_weights else train.micro_batch_size,
                    wire=getattr(torch, config.transport.wire),
                )
            bytes_up, bytes_down = link.bytes_up, link.bytes_down

    outcome = Outcome(
        adapters=extract(model),
        importance=importance,
        losses=record.losses,
        metrics={
            "measured-bytes": memory.bytes,
            "resident-parameters": model.resident_parameters(),
            "tokens": record.tokens,
            "label-tokens": record.label_tokens,
            "bytes-up": bytes_up,
            "bytes-down": bytes_down,
            "seconds": record.seconds,
        },
    )
    return Message(outcome.to_records(), reply_to=message)


def _rows(context: Context, config: Config, load_data: LoadData) -> list[Tokens]:
    examples = load_data(context, config)
    if not examples:
        raise ConfigError(f"client {_name_of(context)} has no training examples")
    return tokenize(examples, load_tokenizer(config.model.path), config.data.max_length)


def _speed(context: Context, config: Config, key: str) -> float:
    """``gflops``, ``mbit-up`` or ``mbit-down`` of the node's configuration, else of ``clients``; 0 when not stated."""
    name = key.replace("_", "-")
    stated = context.node_config.get(name)
    if stated is not None:
        if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated > 0:
            raise ConfigError(f"{name}={stated!r} of the node must be a number above 0")
        return float(stated)
    speeds = config.speeds(key)
    return speeds[_partition_of(context)[0] % len(speeds)] if speeds else 0.0


def _name_of(context: Context) -> str:
    return str(context.node_config.get("partition-id", context.node_id))


def _data_seed(config: Config, client: str) -> int:
    number = int(client) if client.isdigit() else zlib.crc32(client.encode())
    return config.run.seed * 1_000_003 + number % 1_000_003


def _partition_of(context: Context) -> tuple[int, int]:
    """Index and number of partitions of this node.

    Raises
    ------
    ConfigError
        If the node's configuration does not say them.
    """
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as missing:
        raise ConfigError(
            f"the node's configuration has no {missing}; start it with --node-config 'partition-id=0 num-partitions=3'"
        ) from None


@lru_cache(maxsize=1)
def _partitions(data: DataConfig, count: int, seed: int) -> list[list[Example]]:
    """Every client's examples; a worker process of a simulation serves many clients and reads the files once."""
    examples = load_text(data, seed).train
    return [[examples[row] for row in rows] for rows in partition(examples, data, count, seed)]


app = split_client_app()
