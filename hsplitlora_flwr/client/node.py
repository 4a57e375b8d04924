"""A node while it answers a message: its settings, its text, its disk, and what it says of itself."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, RecordDict

from hsplitlora_flwr.client.budget import (
    adapter_bytes,
    host_memory_budget,
    is_measured,
    measured_flops,
    stated_speeds,
)
from hsplitlora_flwr.client.store import NodeStore
from hsplitlora_flwr.client.task import Assignment, OwnText
from hsplitlora_flwr.config import Config, ConfigError, Scalar
from hsplitlora_flwr.data.fit import Cut, fit_text
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.messages import Description, Task, read_base, read_settings
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.fingerprint import fingerprint
from hsplitlora_flwr.models.placement import check_device, on_gpus
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.privacy.protection import protection, protection_name
from hsplitlora_flwr.registry import import_plugins
from hsplitlora_flwr.training.cut import CutTransform, SeededCut, chained
from hsplitlora_flwr.training.process import OwnProcess
from hsplitlora_flwr.transport.bottleneck import digest

OF_NODES = {
    "model-path": "model.path",
    "device": "model.device",
    "proxy": "transport.proxy",
    "cut-clip": "split.clip",
    "cut-noise": "split.noise",
    "cut-width": "split.width",
    "cut-bottleneck": "split.bottleneck",
    "cut-decorrelate": "split.decorrelate",
}
"""What a node may say in its ``--node-config`` in place of a setting."""

LoadData = Callable[[Context, Config], Sequence[Example]]
"""Gives a client its examples."""
LoadBudget = Callable[[Context, Config], int]
"""Gives a client its memory budget in bytes, on the GPU where its model lies there."""


@dataclass(frozen=True)
class Means:
    """What an app gives its nodes; parameters as for :func:`~hsplitlora_flwr.client.handlers.split_client_app`."""

    load_data: LoadData
    load_budget: LoadBudget
    process: OwnProcess
    cut_transform: CutTransform | None


class Node:
    """A node while it answers a message, and what comes over its stream meanwhile; nothing is remembered between two
    messages but what is on its disk.

    Parameters
    ----------
    means : Means
    context : Context
        Of the node.

    Attributes
    ----------
    process : OwnProcess
        The process that it works in.
    store : NodeStore
        Its disk.
    """

    def __init__(self, means: Means, context: Context) -> None:
        import_plugins(context.run_config)
        self.process, self.store = means.process, NodeStore(context)
        self._means, self._context = means, context
        self._read: tuple[Config, OwnText] | None = None

    @property
    def name(self) -> str:
        """How logs and results call this client."""
        config = self._context.node_config
        return str(config.get("name", config.get("partition-id", self._context.node_id)))

    def settings(self, config: Config) -> Config:
        """A run's settings with what this node's configuration says instead (:data:`OF_NODES`)."""
        node = self._context.node_config
        own: dict[str, Scalar] = {setting: node[name] for name, setting in OF_NODES.items() if name in node}
        return Config.from_run_config(config.to_run_config() | own) if own else config

    def text(self, config: Config) -> OwnText:
        """The client's examples as tokens, read once; those that it keeps out of training are drawn by seed.

        Raises
        ------
        ConfigError, DataError, ModelFilesError
            If there are none to train on, or they do not fit this node's model.
        """
        if self._read and self._read[0] == config:
            return self._read[1]
        examples, apart = self._means.load_data(self._context, config), config.evaluation.client_rows
        if len(examples) <= apart:
            kept = f", and evaluation.client_rows={apart} keeps them out of training" if apart else ""
            raise ConfigError(f"client {self.name} has {len(examples) or 'no'} training examples{kept}")
        tokens = fit_text(examples, config)
        held_out = set(random.Random(data_seed(config, self.name)).sample(range(len(tokens)), apart))
        text = OwnText(
            train=[example for index, example in enumerate(tokens) if index not in held_out],
            held_out=[tokens[index] for index in sorted(held_out)],
        )
        self._read = config, text
        return text

    def introduce(self, content: RecordDict) -> RecordDict:
        """The answer to a ``describe`` message: budget, amount of data, and the version of the weights that it holds.

        Raises
        ------
        BaseMismatchError, ConfigError, DataError, ModelFilesError
            If it cannot take part.
        """
        config = self.settings(read_settings(content))
        check_device(config.model.device)
        if base := read_base(content):
            fingerprint(config.model.path).check(base, config.model.path)
        check_quantiser(config.model.quantise)  # the library is a part of the process, and so are text and tokenizer
        text = self.text(config)
        self.measure_process(config)
        return self.describe(config, text).to_records()

    def measures(self, config: Config) -> bool:
        """Whether what this node may use is measured, and not stated."""
        return is_measured(self._context, config)

    def measure_process(self, config: Config) -> None:
        """Note what the process takes for itself; before a model is loaded."""
        stated = config.clients.process_mb * 1e6
        self.store.note(process=stated or self.process.resting_bytes(read_config(config.model.path)))

    def describe(self, config: Config, text: OwnText) -> Description:
        """What a plan needs to know of this client."""
        context, store = self._context, self.store
        memory, (flops, up, down) = self._means.load_budget(context, config), stated_speeds(context, config)
        if self.measures(config):
            memory = int(store.steady("memory", memory))
            flops = flops or store.number("flops") or store.steady("flops", measured_flops(config))
            up, down = up or store.number("up"), down or store.number("down")
        on_gpu, process, host = on_gpus(config.model.device), int(store.number("process")), 0
        if on_gpu and 0 < (host := host_memory_budget(context, config)) < process:
            raise ConfigError(
                f"the process of client {self.name} takes {process:,} bytes in the machine by itself, and memory-gb "
                f"lets it have {host:,}; raise that"
            )
        version, held = store.held()
        cut = Cut.of(text.train)
        return Description(
            name=self.name,
            examples=len(text.train),
            memory_bytes=memory,
            process_bytes=0 if on_gpu else process,
            host_bytes=host,
            host_process_bytes=process if on_gpu else 0,
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
            **self._protections(config),
        )

    def _protections(self, config: Config) -> dict[str, Any]:
        """What a description says of the change of the cut activation; nothing where the model is not cut."""
        if not METHODS[config.method.name].split:
            return {}
        own, width = self._means.cut_transform, config.split.width
        names = own.name if own else "", protection_name(config.split)
        return {
            "cut_transform": ", ".join(filter(None, names)),
            "cut_width": width,
            "cut_directions": digest(config.split.bottleneck) if width else "",
        }

    def change_of_cut(self, task: Task) -> CutTransform | None:
        """What is done to the cut activation before it leaves: the app's own change, then that of the settings."""
        if not task.method.split:
            return None
        return chained(self._means.cut_transform, protection(task.config.split, task.split))

    def assignment(self, task: Task, text: OwnText) -> Assignment:
        """A task with what this node does it with."""
        transform = None
        if change := self.change_of_cut(task):
            own = "" if change.reproducible else self.store.secret()
            transform = SeededCut(change, f"{task.config.run.seed}/{task.client}/{task.kind}/{task.round}/{own}")
        return Assignment(task, text, data_seed(task.config, task.client), transform)


def data_seed(config: Config, client: str) -> int:
    """Fixes the order of a client's batches, and what it keeps out of training."""
    number = int(client) if client.isdigit() else zlib.crc32(client.encode())
    return config.run.seed * 1_000_003 + number % 1_000_003
