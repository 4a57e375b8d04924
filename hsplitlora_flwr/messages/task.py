"""What a client is asked to do: the settings of the run, its part of the plan, and the tensors that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.lora.update import Patch
from hsplitlora_flwr.messages.kinds import TRAIN
from hsplitlora_flwr.messages.packing import pack_factors, take_tensors, to_arrays, unpack_factors
from hsplitlora_flwr.methods import METHODS, Method
from hsplitlora_flwr.models.fingerprint import Fingerprint
from hsplitlora_flwr.transport.link import Endpoint


@dataclass(frozen=True)
class Task:
    """The content of a ``probe``, ``train`` or ``evaluate`` message.

    Parameters
    ----------
    config : Config
        The settings of the run.
    kind : str
        The message type.
    client : str
        The client's name.
    round : int
        The round, from 1.
    split : int
        Number of blocks that the client holds; all of them where the method does not split.
    specs : Mapping[str, AdapterSpec]
        Its adapters by absolute layer name; empty where nothing trains.
    first_step, steps : int
        Position in the learning-rate schedule, and the number of steps.
    spacious : bool
        The client's budget holds its plan even if its process keeps freed memory for later, which is faster.
    endpoint : Endpoint
        Address of the stream.
    token : str
        The token that opens the stream; empty if none is to be opened.
    lasting : bool
        The stream stays open after the task, for the next one (:mod:`hsplitlora_flwr.server.sessions`).
    patch : Patch
        What the client's accumulated update lacks.
    start : Mapping[str, Factors]
        Adapters of the client's layers to continue from, scale folded in; empty if they start afresh.
    checkpointing, server_checkpointing : bool
        Activation checkpointing of the client's blocks, and of the server's for it.
    forward_only : bool
        The client has no adapters: it computes no backward pass, scores nothing, and no gradient comes down.
    scored_steps : int
        Of the first steps, in which weights are scored: of a probe all weights, of training those with an adapter.
    base : Mapping[str, str]
        Digests of the tensors of the client's part as the server has them, by name.
    """

    config: Config
    kind: str
    client: str
    round: int
    split: int
    specs: Mapping[str, AdapterSpec]
    first_step: int
    steps: int
    spacious: bool = False
    endpoint: Endpoint = field(default_factory=lambda: Endpoint("", "", ""))
    token: str = ""
    lasting: bool = False
    patch: Patch = field(default_factory=lambda: Patch(0, {}))
    start: Mapping[str, Factors] = field(default_factory=dict)
    checkpointing: bool = False
    server_checkpointing: bool = False
    forward_only: bool = False
    scored_steps: int = 0
    base: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method of the run."""
        return METHODS[self.config.method.name]

    @property
    def seed(self) -> str:
        """Seed of the round's adapters at their start, on both sides; one for all clients with a global adapter."""
        owner = "all" if self.method.keeps_global_adapter else f"{self.round}/{self.client}"
        return f"{self.config.run.seed}/{owner}"

    @property
    def labels_stay(self) -> bool:
        """The client computes the loss."""
        return self.method.split and self.config.split.labels == "client"

    @property
    def from_base(self) -> bool:
        """Training continues a global adapter over the base itself, without an update in the weights."""
        return self.method.keeps_global_adapter and not self.method.residual and self.kind == TRAIN

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.patch.nbytes + sum(b.nbytes + a.nbytes for b, a in self.start.values())

    def over_stream(self, endpoint: Endpoint, token: str, *, lasting: bool = False) -> Task:
        """The same task with a stream to do it over."""
        return replace(self, endpoint=endpoint, token=token, lasting=lasting)

    def without_tensors(self) -> Task:
        """The same task without its tensors, which its client has elsewhere."""
        return replace(self, patch=Patch(0, {}), start={})

    def to_text(self) -> dict[str, Any]:
        """All but the tensors, the endpoint and the token, as Flower's records and JSON hold it."""
        return {
            "kind": self.kind,
            "client": self.client,
            "round": self.round,
            "split": self.split,
            "layers": list(self.specs),
            "ranks": [spec.rank for spec in self.specs.values()],
            "alphas": [spec.alpha for spec in self.specs.values()],
            "first-step": self.first_step,
            "steps": self.steps,
            "spacious": self.spacious,
            "checkpointing": self.checkpointing,
            "server-checkpointing": self.server_checkpointing,
            "forward-only": self.forward_only,
            "scored-steps": self.scored_steps,
        }

    @classmethod
    def from_text(cls, config: Config, text: Mapping[str, Any], **more: Any) -> Task:
        """The inverse of :meth:`to_text`; ``more`` is what that leaves out."""
        triples = zip(text["layers"], text["ranks"], text["alphas"], strict=True)
        return cls(
            config=config,
            kind=str(text["kind"]),
            client=str(text["client"]),
            round=int(text["round"]),
            split=int(text["split"]),
            specs={str(name): AdapterSpec(int(r), float(a), config.lora.dropout) for name, r, a in triples},
            first_step=int(text["first-step"]),
            steps=int(text["steps"]),
            spacious=bool(text["spacious"]),
            checkpointing=bool(text["checkpointing"]),
            server_checkpointing=bool(text["server-checkpointing"]),
            forward_only=bool(text["forward-only"]),
            scored_steps=int(text["scored-steps"]),
            **more,
        )

    def to_records(self) -> RecordDict:
        """As the content of a message."""
        tensors, text = self.patch.pack()
        return RecordDict(
            {
                "task": ConfigRecord(self.to_text()),
                "settings": ConfigRecord(dict(self.config.to_run_config())),
                "stream": ConfigRecord(vars(self.endpoint) | {"token": self.token, "lasting": self.lasting}),
                "base": ConfigRecord({"names": list(self.base), "digests": list(self.base.values())}),
                "patch": ConfigRecord(dict(text)),
                "update": to_arrays(tensors),
                "start": to_arrays(pack_factors(self.start)),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Task:
        """Read from the content of a message, without the tensors: see :func:`take_patch` and :func:`take_start`.

        A task lives as long as the training, but tensors that are merged into the weights must not.
        """
        stream: dict[str, Any] = dict(records.config_records["stream"])
        token, lasting = stream.pop("token"), stream.pop("lasting")
        settings, text = read_settings(records), dict(records.config_records["task"])
        said: dict[str, Any] = dict(records.config_records["base"])
        base = dict(zip(said["names"], said["digests"], strict=True))
        return cls.from_text(settings, text, endpoint=Endpoint(**stream), token=token, lasting=lasting, base=base)


def token_of(records: RecordDict) -> str:
    """The token of the stream of a message's task; "" if it names none."""
    return str(records.config_records["stream"]["token"]) if "stream" in records else ""


def take_patch(records: RecordDict) -> Patch:
    """The patch of a task, taken out of its message."""
    text = {key: str(value) for key, value in records.config_records["patch"].items()}
    return Patch.unpack(take_tensors(records.array_records["update"]), text)


def take_start(records: RecordDict) -> dict[str, Factors]:
    """The adapters that a task continues from, taken out of its message."""
    return unpack_factors(take_tensors(records.array_records["start"]))


def settings_records(config: Config, base: Fingerprint | None = None) -> RecordDict:
    """The content of a ``describe`` message: the settings of the run, and what its base is."""
    records = RecordDict({"settings": ConfigRecord(dict(config.to_run_config()))})
    if base:
        records["base"] = ConfigRecord({"fingerprint": base.to_text()})
    return records


def read_base(records: RecordDict) -> Fingerprint | None:
    """The fingerprint of the run's base in a ``describe`` message; None if there is none."""
    if "base" not in records:
        return None
    return Fingerprint.from_text(str(records.config_records["base"]["fingerprint"]))


def read_settings(records: RecordDict) -> Config:
    """The settings of the run from a message's content."""
    return Config.from_run_config(dict(records.config_records["settings"]))
