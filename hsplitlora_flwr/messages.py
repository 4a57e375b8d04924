"""The control plane: what the Flower messages of a round hold.

Each class below is the content of one message or reply, written to and read from Flower's records here and nowhere
else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.fit import Cut
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.lora.update import Patch
from hsplitlora_flwr.methods import METHODS, Method
from hsplitlora_flwr.models.fingerprint import Fingerprint
from hsplitlora_flwr.planning.budget import Budget
from hsplitlora_flwr.transport.link import Endpoint

DESCRIBE, PROBE, TRAIN, EVALUATE = "query.describe", "train.probe", "train", "evaluate"
"""Message types, in the order of a round."""
TURN, FORGET = "train.turn", "query.forget"
"""A step over messages; and the end of the run, when nodes remove what they kept of it."""
PACKET_BYTES = 4 << 20
"""Of tensors that travel as one; Flower cuts what is longer than 5 MB."""
PACKET_TYPE = "safetensors"
"""What Flower calls the serialization of such an array, so that nobody takes it for one of numpy's."""
NAME_LENGTH = 64
"""Longest name of a client."""
HELD_BYTES = 4 << 20
"""Longest text of what a client says that it holds: some ten thousand layers."""

answering_here: ContextVar[bool] = ContextVar("answering_here", default=False)
"""Whether this thread is the server's, in a call that lets clients answer: one that waited there for what the server
sends next would wait for ever."""

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class ReplyError(ValueError):
    """A client's reply is not what it should be."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a flaw of the reply that is read there.

    A reply is bytes from another machine, which parsers answer with any exception, deep nesting and lack of memory
    included. None of them is to end the run of the others.

    Raises
    ------
    ReplyError
        In place of every exception.
    """
    try:
        yield
    except ReplyError:
        raise
    except Exception as error:
        raise ReplyError(f"{what} cannot be read ({type(error).__name__}: {printable(error, 200)})") from error


def printable(text: object, limit: int = 500) -> str:
    """What a client wrote as a line for logs: without control, escape and direction characters, and not too long."""
    start = str(text)[:limit]
    return "".join(character if character.isprintable() else " " for character in start)


def record(records: RecordDict, name: str, kind: type[R]) -> R:
    """A record of a reply.

    Raises
    ------
    ReplyError
        If it is not there or of another kind.
    """
    found = records.get(name)
    if not isinstance(found, kind):
        raise ReplyError(f"its reply holds no {kind.__name__} '{name}'")
    return found


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
        Its memory budget where the model lies, on its GPU or in the machine.
    tokens : int
        Of its training examples, before any was cut to ``data.max_length``.
    cut_rows, cut_tokens : int
        How many examples were cut, and how many tokens that cost.
    flops, up, down : float
        Its speed in operations/s, and its link to and from the server in bytes/s; 0 where it states none.
    adapter_bytes : int
        Adapters that it may send in a round; 0 for no bound.
    process_bytes : int
        What its process takes there before a model is loaded; 0 on a GPU.
    host_bytes, host_process_bytes : int
        With a GPU, what its process may take in the machine, 0 for no bound, and takes by itself; else 0.
    longest : int
        Tokens of its longest example.
    held : Mapping[str, str]
        The state of each layer's accumulated update that it holds; see
        :meth:`hsplitlora_flwr.lora.update.AccumulatedUpdate.held`.
    version : int
        The version that it held last.
    cut_transform : str
        What it does to its cut activation before that leaves; "" for nothing.
    cut_width : int
        Numbers in which it sends a token's, by a file of directions; 0 for all of it.
    cut_directions : str
        Digest of that file; "" where it needs none.
    """

    name: str
    examples: int
    memory_bytes: int
    process_bytes: int
    longest: int
    held: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    flops: float = 0.0
    up: float = 0.0
    down: float = 0.0
    adapter_bytes: int = 0
    tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    cut_transform: str = ""
    host_bytes: int = 0
    host_process_bytes: int = 0
    cut_width: int = 0
    cut_directions: str = ""

    @staticmethod
    def is_all_of(records: RecordDict) -> bool:
        """Whether a reply's content is a description and nothing else."""
        return set(records) == {"description"}

    @property
    def budget(self) -> Budget:
        """What a plan may use."""
        speeds = self.flops or None, self.up or None, self.down or None
        return Budget(self.memory_bytes, self.process_bytes, *speeds, self.adapter_bytes or None)

    @property
    def cut(self) -> Cut:
        """What of its training text was cut."""
        return Cut(self.examples, self.tokens, self.cut_rows, self.cut_tokens)

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict({"description": ConfigRecord(vars(self) | {"held": json.dumps(dict(self.held))})})

    @classmethod
    def from_records(cls, records: RecordDict) -> Description:
        """Read from the content of a reply.

        Raises
        ------
        ReplyError
            If it is not what :meth:`to_records` makes, or says what cannot be.
        """
        with reading("its description of itself"):
            values: dict[str, Any] = dict(record(records, "description", ConfigRecord))
            for key, allowed in _CLAIMS.items():
                if key in values and not allowed.holds(values[key]):
                    raise ReplyError(
                        f"its description of itself cannot be used: {key}={printable(repr(values[key]), 80)}, which "
                        f"must be {allowed}"
                    )
            held = {str(name): str(state) for name, state in dict(json.loads(values["held"])).items()}
            made = cls(**values | {"held": held})
            if not (made.cut_rows <= made.examples and made.cut_rows <= made.cut_tokens <= made.tokens):
                raise ReplyError(f"its description of itself cannot be used: {made.cut} cannot be cut")
            return made


@dataclass(frozen=True)
class _Number:
    """What a number that a client says may be: of a type, and within bounds."""

    kind: type[int] | type[float]
    low: float
    high: float
    or_zero: bool = False

    def holds(self, value: object) -> bool:
        typed = type(value) is self.kind or (self.kind is float and type(value) is int)
        return typed and (self.low <= value <= self.high or (self.or_zero and value == 0))  # type: ignore[operator]

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        return f"{what} from {self.low:g} to {self.high:g}" + (", or 0" if self.or_zero else "")


@dataclass(frozen=True)
class _Text:
    """What a text that a client says may be: no longer than this, and in a name all to be seen."""

    length: int
    printable: bool = False
    or_empty: bool = False

    def holds(self, value: object) -> bool:
        if not isinstance(value, str) or not (1 - self.or_empty) <= len(value) <= self.length:
            return False
        return not self.printable or (value.isprintable() and value == value.strip())

    def __str__(self) -> str:
        return f"a text of at most {self.length} characters" + (", none of them invisible" if self.printable else "")


_CLAIMS: Mapping[str, _Number | _Text] = {
    "name": _Text(NAME_LENGTH, printable=True),
    "examples": _Number(int, 1, 1e12),
    "memory_bytes": _Number(int, 1, 1e15),
    "process_bytes": _Number(int, 0, 1e15),
    "host_bytes": _Number(int, 0, 1e15),
    "host_process_bytes": _Number(int, 0, 1e15),
    "longest": _Number(int, 1, 1e9),
    "held": _Text(HELD_BYTES),
    "cut_transform": _Text(NAME_LENGTH, printable=True, or_empty=True),
    "cut_width": _Number(int, 0, 1e6),
    "cut_directions": _Text(NAME_LENGTH, printable=True, or_empty=True),
    "version": _Number(int, 0, 1e9),
    "flops": _Number(float, 1e6, 1e18, or_zero=True),
    "up": _Number(float, 1, 1e15, or_zero=True),
    "down": _Number(float, 1, 1e15, or_zero=True),
    "adapter_bytes": _Number(int, 0, 1e15),
    "tokens": _Number(int, 0, 1e15),
    "cut_rows": _Number(int, 0, 1e12),
    "cut_tokens": _Number(int, 0, 1e15),
}
"""What a client may say of itself. Speeds beyond these bounds are of no machine, and would only upset a plan."""


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
        The client's budget holds its plan even where its process keeps freed memory for later, which is faster.
    endpoint : Endpoint
        Of the stream.
    token : str
        That opens it; empty where no stream is to be opened.
    lasting : bool
        The stream stays open after the task, for what comes next (:mod:`hsplitlora_flwr.server.sessions`).
    patch : Patch
        What the client's accumulated update lacks.
    start : Mapping[str, Factors]
        Adapters of the client's layers to go on from, scale folded in; empty where adapters start afresh.
    checkpointing, server_checkpointing : bool
        Activation checkpointing of the client's blocks, and of the server's for it.
    forward_only : bool
        The client computes forward alone: nothing of its part trains or is scored, and no gradient comes down.
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
    base: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method of the run."""
        return METHODS[self.config.method.name]

    @property
    def seed(self) -> str:
        """Fixes the start of the round's adapters on both sides; the same for all where one adapter is carried on."""
        owner = "all" if self.method.keeps_global_adapter else f"{self.round}/{self.client}"
        return f"{self.config.run.seed}/{owner}"

    @property
    def labels_stay(self) -> bool:
        """The client computes the loss."""
        return self.method.split and self.config.split.labels == "client"

    @property
    def from_base(self) -> bool:
        """What trains goes on from a global adapter over the base itself, not from an update in its weights."""
        return self.method.keeps_global_adapter and not self.method.residual and self.kind == TRAIN

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.patch.nbytes + sum(b.nbytes + a.nbytes for b, a in self.start.values())

    def over_stream(self, endpoint: Endpoint, token: str, *, lasting: bool = False) -> Task:
        """The same task with a stream to do it over."""
        return replace(self, endpoint=endpoint, token=token, lasting=lasting)

    def without_tensors(self) -> Task:
        """The same task as its client knows it: its tensors are elsewhere."""
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
                "start": to_arrays(_pack(self.start)),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Task:
        """Read from the content of a message, without the tensors: see :func:`take_patch` and :func:`take_start`.

        A task lives as long as the training, and what is merged into the weights must not.
        """
        stream: dict[str, Any] = dict(records.config_records["stream"])
        token, lasting = stream.pop("token"), stream.pop("lasting")
        settings, text = read_settings(records), dict(records.config_records["task"])
        said: dict[str, Any] = dict(records.config_records["base"])
        base = dict(zip(said["names"], said["digests"], strict=True))
        return cls.from_text(settings, text, endpoint=Endpoint(**stream), token=token, lasting=lasting, base=base)


def token_of(records: RecordDict) -> str:
    """The token of the stream that a message's task is to be done over; "" where it names none."""
    return str(records.config_records["stream"]["token"]) if "stream" in records else ""


def take_patch(records: RecordDict) -> Patch:
    """The patch of a task, out of its message, which is left without it."""
    text = {key: str(value) for key, value in records.config_records["patch"].items()}
    return Patch.unpack(take_tensors(records.array_records["update"]), text)


def take_start(records: RecordDict) -> dict[str, Factors]:
    """The adapters that a task goes on from, out of its message, which is left without them."""
    return _unpack(take_tensors(records.array_records["start"]))


@dataclass(frozen=True)
class Outcome:
    """The content of a client's last reply to ``train``, ``probe`` or ``evaluate``.

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
        ``bytes-up``, ``bytes-down`` (frames), ``seconds`` (training), ``seconds-before`` (from the start of the
        process's work on the message to the first step); of an evaluation ``nll`` and ``label-tokens``.
    description : Description
        The client's, as it is now: another round need not ask for it.
    """

    adapters: Mapping[str, Factors]
    importance: Mapping[str, float]
    losses: list[float]
    metrics: Mapping[str, float]
    description: Description

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict(
            {
                **self.description.to_records(),
                "adapters": to_arrays(_pack(self.adapters)),
                "importance": MetricRecord(dict(self.importance)),
                "losses": MetricRecord({"losses": self.losses}),
                "metrics": MetricRecord(dict(self.metrics)),
            }
        )

    @staticmethod
    def is_in(records: RecordDict) -> bool:
        """Whether a reply's content is, or ends with, an outcome."""
        return "losses" in records

    @classmethod
    def from_records(cls, records: RecordDict) -> Outcome:
        """Read from the content of a reply, whose arrays are taken out of it.

        Raises
        ------
        ReplyError
            If it is not what :meth:`to_records` makes.
        """
        with reading("its reply"):
            importance, metrics = record(records, "importance", MetricRecord), record(records, "metrics", MetricRecord)
            losses: Any = record(records, "losses", MetricRecord)["losses"]
            return cls(
                adapters=_unpack(take_tensors(record(records, "adapters", ArrayRecord))),
                importance={name: float(value) for name, value in importance.items()},  # type: ignore[arg-type]
                losses=[float(loss) for loss in losses],
                metrics={name: float(value) for name, value in metrics.items()},  # type: ignore[arg-type]
                description=Description.from_records(records),
            )


@dataclass
class Progress:
    """What a client notes of its way through a task, over all of its messages.

    Parameters
    ----------
    started : float
        When it took the task up, in seconds since the epoch.
    before : float
        Seconds from then until the first step: reading text, weights and the update.
    peak, host_peak : int
        Peak memory where the model lies, and of the process in the machine, in bytes.
    bytes_up, bytes_down : int
        Frames to and from the server.
    """

    started: float = field(default_factory=time.time)
    before: float = 0.0
    peak: int = 0
    host_peak: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def begin(self) -> None:
        """Training starts."""
        self.before = time.time() - self.started

    def note_peaks(self, there: int, host: int) -> None:
        """Memory at its peak meanwhile, in bytes: where the model lies, and of the process in the machine."""
        self.peak, self.host_peak = max(self.peak, there), max(self.host_peak, host)

    def metrics(self, seconds: float) -> dict[str, float]:
        """For an :class:`Outcome`; ``seconds`` of training where one process knows them."""
        return {
            "measured-bytes": self.peak,
            "host-bytes": self.host_peak,
            "bytes-up": self.bytes_up,
            "bytes-down": self.bytes_down,
            "seconds-before": self.before,
            "seconds": seconds or time.time() - self.started - self.before,
        }


def settings_records(config: Config, base: Fingerprint | None = None) -> RecordDict:
    """The content of a ``describe`` message: the settings of the run, and what its base is."""
    records = RecordDict({"settings": ConfigRecord(dict(config.to_run_config()))})
    if base:
        records["base"] = ConfigRecord({"fingerprint": base.to_text()})
    return records


def read_base(records: RecordDict) -> Fingerprint | None:
    """What the base of the run is, from a ``describe`` message; None where it does not say."""
    if "base" not in records:
        return None
    return Fingerprint.from_text(str(records.config_records["base"]["fingerprint"]))


def read_settings(records: RecordDict) -> Config:
    """The settings of the run from a message's content."""
    return Config.from_run_config(dict(records.config_records["settings"]))


def _pack(adapters: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{name}:{role}": t for name, pair in adapters.items() for role, t in zip("BA", pair, strict=True)}


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    names = [key.removesuffix(":B") for key in tensors if key.endswith(":B")]
    return {name: (tensors[f"{name}:B"], tensors[f"{name}:A"]) for name in names}


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record of safetensors files, each of about :data:`PACKET_BYTES`.

    In a deployment Flower fetches every array of a record on its own, which for a thousand of them takes longer than
    what they hold.
    """
    packets: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room or not packets:
            packets.append({})
            room = PACKET_BYTES
        packets[-1][name] = tensor.detach().cpu().contiguous()
        room -= tensor.nbytes
    return ArrayRecord({str(i): _packet(save(each)) for i, each in enumerate(packets)})


def pack_content(records: RecordDict) -> Tensor:
    """The content of a message as bytes, uint8, to travel over a stream; it holds no bytes but those of arrays."""
    data: dict[str, Tensor] = {}
    text: dict[str, list[Any]] = {}
    for name, held in records.items():
        kind = _RECORDS.index(type(held))
        if isinstance(held, ArrayRecord):
            keys = {str(len(data) + index): key for index, key in enumerate(held)}
            data |= {place: _bytes(held[key].data) for place, key in keys.items()}
            text[name] = [kind, [[key, place, held[key].stype] for place, key in keys.items()]]
        else:
            text[name] = [kind, dict(held)]
    return _bytes(save({_TEXT: _bytes(json.dumps(text).encode()), **data}))


def unpack_content(content: Tensor) -> RecordDict:
    """The inverse of :func:`pack_content`.

    Raises
    ------
    Exception
        Of whatever kind, if it is not what that makes.
    """
    data = load(content.numpy().tobytes())
    records = RecordDict()
    for name, (kind, held) in json.loads(data.pop(_TEXT).numpy().tobytes()).items():
        if _RECORDS[kind] is ArrayRecord:
            packets = {key: (data.pop(place).numpy().tobytes(), stype) for key, place, stype in held}
            held = {key: Array("uint8", (len(packet),), stype, packet) for key, (packet, stype) in packets.items()}
        records[name] = _RECORDS[kind](held)
    return records


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


_RECORDS: tuple[type[Any], ...] = (ArrayRecord, ConfigRecord, MetricRecord)
_TEXT = "text"


def _packet(data: bytes) -> Array:
    return Array("uint8", (len(data),), PACKET_TYPE, data)


def take_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a Flower record, which is left empty so that its bytes do not stay in memory.

    Raises
    ------
    Exception
        Of whatever kind, if they are not what :func:`to_arrays` makes.
    """
    tensors: dict[str, Tensor] = {}
    for key in list(arrays):
        packet = arrays.pop(key)
        if packet.stype != PACKET_TYPE:
            raise ValueError(f"array '{printable(key, 40)}' is not {PACKET_TYPE}")
        # sorted, since `load` gives them in any order, and two runs are to be alike
        tensors |= sorted(load(packet.data).items())
    return tensors
