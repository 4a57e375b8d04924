"""The control plane: what the Flower messages of a round hold.

Each class below is the content of one message or reply, written to and read from Flower's records here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.methods import METHODS, Method
from hsplitlora_flwr.planning.planner import Budget

DESCRIBE, PROBE, TRAIN = "query.describe", "train.probe", "train"
"""Message types, in the order of a round."""


@dataclass(frozen=True)
class Description:
    """A node's answer to ``describe``.

    Parameters
    ----------
    name : str
        How logs and results call the client.
    examples : int
        Its number of training examples.
    memory_bytes : int
        Its memory budget.
    flops, up, down : float
        Its speed in operations/s, and its link to and from the server in bytes/s; 0 where it states none.
    process_bytes : int
        What its process takes before a model is loaded.
    longest : int
        Tokens of its longest example.
    version : int
        The version of the accumulated update that it holds.
    """

    name: str
    examples: int
    memory_bytes: int
    process_bytes: int
    longest: int
    version: int
    flops: float = 0.0
    up: float = 0.0
    down: float = 0.0

    @property
    def budget(self) -> Budget:
        """What a plan may use."""
        return Budget(self.memory_bytes, self.process_bytes, self.flops or None, self.up or None, self.down or None)

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict({"description": ConfigRecord(dict(vars(self)))})

    @classmethod
    def from_records(cls, records: RecordDict) -> Description:
        """Read from the content of a reply."""
        values: dict[str, Any] = dict(records.config_records["description"])
        return cls(**values)


@dataclass(frozen=True)
class Task:
    """The content of a ``probe`` or ``train`` message.

    Parameters
    ----------
    config : Config
        The settings of the run.
    client : str
        The client's name.
    round : int
        The round, from 1; 0 for the probe.
    split : int
        Number of blocks that the client holds; all of them where the method does not split.
    specs : Mapping[str, AdapterSpec]
        Its adapters by absolute layer name; empty in a probe.
    first_step, steps : int
        Position in the learning-rate schedule, and the number of steps.
    address, token : str
        Of the stream; empty where the method does not split.
    changes : dict[str, Tensor]
        The accumulated update of the client's layers; see :func:`hsplitlora_flwr.lora.delta.pack`.
    start : Mapping[str, Factors]
        Adapters of the client's layers to go on from, scale folded in; empty where adapters start afresh.
    """

    config: Config
    client: str
    round: int
    split: int
    specs: Mapping[str, AdapterSpec]
    first_step: int
    steps: int
    address: str
    token: str
    changes: dict[str, Tensor] = field(default_factory=dict)
    start: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method of the run."""
        return METHODS[self.config.method.name]

    @property
    def seed(self) -> str:
        """Fixes the start of the round's adapters on both sides; the same for all where one adapter is carried on."""
        owner = "all" if self.method.carries else f"{self.round}/{self.client}"
        return f"{self.config.run.seed}/{owner}"

    def with_token(self, token: str) -> Task:
        """The same task with the token of its stream."""
        return replace(self, token=token)

    def to_records(self) -> RecordDict:
        """As the content of a message."""
        task = ConfigRecord(
            {
                "client": self.client,
                "round": self.round,
                "split": self.split,
                "layers": list(self.specs),
                "ranks": [spec.rank for spec in self.specs.values()],
                "alphas": [spec.alpha for spec in self.specs.values()],
                "first-step": self.first_step,
                "steps": self.steps,
                "address": self.address,
                "token": self.token,
            }
        )
        settings = ConfigRecord(dict(self.config.to_run_config()))
        return RecordDict(
            {
                "task": task,
                "settings": settings,
                "update": to_arrays(self.changes),
                "start": to_arrays(_pack(self.start)),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Task:
        """Read from the content of a message, whose arrays are taken out of it."""
        task: dict[str, Any] = dict(records.config_records["task"])
        config = read_settings(records)
        triples = zip(task["layers"], task["ranks"], task["alphas"], strict=True)
        return cls(
            config=config,
            client=str(task["client"]),
            round=int(task["round"]),
            split=int(task["split"]),
            specs={str(name): AdapterSpec(int(r), float(a), config.lora.dropout) for name, r, a in triples},
            first_step=int(task["first-step"]),
            steps=int(task["steps"]),
            address=str(task["address"]),
            token=str(task["token"]),
            changes=take_tensors(records.array_records["update"]),
            start=_unpack(take_tensors(records.array_records["start"])),
        )


@dataclass(frozen=True)
class Outcome:
    """The content of a reply to ``train`` or ``probe``.

    Parameters
    ----------
    adapters : Mapping[str, Factors]
        ``(B, A)`` by absolute layer name, scale folded in.
    importance : Mapping[str, float]
        By absolute layer name; only in the reply to a probe.
    losses : list of float
        The loss of every step.
    metrics : Mapping[str, float]
        ``measured-bytes`` (peak memory), ``resident-parameters`` (base parameters held), ``tokens``, ``label-tokens``,
        ``bytes-up``, ``bytes-down`` (on the stream), ``seconds`` (training).
    """

    adapters: Mapping[str, Factors]
    importance: Mapping[str, float]
    losses: list[float]
    metrics: Mapping[str, float]

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict(
            {
                "adapters": to_arrays(_pack(self.adapters)),
                "importance": MetricRecord(dict(self.importance)),
                "losses": MetricRecord({"losses": self.losses}),
                "metrics": MetricRecord(dict(self.metrics)),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Outcome:
        """Read from the content of a reply, whose arrays are taken out of it."""
        numbers: dict[str, dict[str, Any]] = {kind: dict(record) for kind, record in records.metric_records.items()}
        return cls(
            adapters=_unpack(take_tensors(records.array_records["adapters"])),
            importance={name: float(value) for name, value in numbers["importance"].items()},
            losses=[float(loss) for loss in numbers["losses"]["losses"]],
            metrics={name: float(value) for name, value in numbers["metrics"].items()},
        )


def settings_records(config: Config) -> RecordDict:
    """The content of a ``describe`` message: the settings of the run."""
    return RecordDict({"settings": ConfigRecord(dict(config.to_run_config()))})


def read_settings(records: RecordDict) -> Config:
    """The settings of the run from a message's content."""
    return Config.from_run_config(dict(records.config_records["settings"]))


def _pack(adapters: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{name}:{role}": t for name, pair in adapters.items() for role, t in zip("BA", pair, strict=True)}


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    names = [key.removesuffix(":B") for key in tensors if key.endswith(":B")]
    return {name: (tensors[f"{name}:B"], tensors[f"{name}:A"]) for name in names}


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors (fp32 or fp64) as a Flower record."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def take_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a Flower record, which is left empty so that its bytes do not stay in memory."""
    return {name: torch.from_numpy(arrays.pop(name).numpy().copy()) for name in list(arrays)}
