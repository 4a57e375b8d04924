"""The one schema of a run, and how it travels.

Every setting is declared once, in :mod:`hsplitlora_flwr.config.sections`. Flower carries a :class:`Config` as dotted
keys in ``run_config`` (where only int, float, bool and str exist, and no type is checked), Hydra composes what differs
from the defaults over them, and every value is checked before anything is loaded: each by itself, then what they say
together. ``python -m hsplitlora_flwr.config`` prints the block of ``pyproject.toml`` that Flower needs, written from
this schema.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsplitlora_flwr.config.names import KNOWN_LISTENERS, KNOWN_METHODS, TRACKERS
from hsplitlora_flwr.config.sections import (
    ClientsConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PlanConfig,
    RunConfig,
    ServerConfig,
    SplitConfig,
    TrainConfig,
    TransportConfig,
)
from hsplitlora_flwr.registry import import_plugins
from hsplitlora_flwr.schema import (
    ConfigError,
    Scalar,
    Setting,
    checked,
    scalar,
    settings_of,
    unknown_key,
)

__all__ = [
    "ClientsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "PlanConfig",
    "RunConfig",
    "Scalar",
    "ServerConfig",
    "SplitConfig",
    "TrainConfig",
    "TransportConfig",
    "unknown_key",
]


RENAMED = {
    "train.recompute": "train.activation_checkpointing",
    "train.joint": "train.multi_adapter_batching",
}
"""Settings by the names that they had. These go on working, with a warning that says the new one."""


@dataclass(frozen=True)
class Config:
    """All settings of a run; every section is a table of ``pyproject.toml`` and a group of ``conf/``.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range, or two settings exclude each other.
    """

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
        for name, section in SECTIONS.items():
            object.__setattr__(self, name, checked(name, section, vars(getattr(self, name))))
        object.__setattr__(self, "clients", self.clients.counted)
        for text in _contradictions(self):
            raise ConfigError(text)

    @classmethod
    def from_mapping(cls, nested: Mapping[str, Any]) -> Config:
        """Build from nested tables, as Hydra composes them, once the modules of ``run.plugins`` are imported.

        Raises
        ------
        ConfigError
            If a section or a key is unknown, or a value has the wrong type or is out of range.
        PluginError
            If a module cannot be imported.
        """
        flat = dict(_flatten(nested))
        import_plugins(flat)
        for key in flat:
            if key.partition(".")[0] not in SECTIONS:
                raise unknown_key(key, KEYS)
        return cls.from_run_config(flat)

    @classmethod
    def from_run_config(cls, flat: Mapping[str, Any]) -> Config:
        """Build from dotted keys, as ``Context.run_config`` holds them.

        Keys that are absent keep their default; those of sections that are not here are an app's own, and left alone.

        Raises
        ------
        ConfigError
            If a key of a section is unknown, or a value has the wrong type or is out of range.
        """
        values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for key, value in _renamed(flat).items():
            section, dot, name = key.partition(".")
            if dot and section not in SECTIONS:
                continue
            if key not in KEYS:
                raise unknown_key(key, KEYS)
            values[section][name] = value
        return cls(**{name: section(**values[name]) for name, section in SECTIONS.items()})

    def to_run_config(self) -> dict[str, Scalar]:
        """The settings as dotted keys, in the order of the schema; tuples are comma-separated text."""
        return {f"{name}.{key}": scalar(value) for name in SECTIONS for key, value in vars(getattr(self, name)).items()}

    def alpha(self, rank: int) -> float:
        """LoRA alpha of an adapter of ``rank``; its scale is ``alpha / rank``."""
        return self.lora.alpha_of(rank)


SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in dataclasses.fields(Config)}
"""The dataclass of every section, by name."""
SETTINGS: tuple[Setting, ...] = tuple(each for name, section in SECTIONS.items() for each in settings_of(name, section))
KEYS = frozenset(each.key for each in SETTINGS)


def render_pyproject_block() -> str:
    """The ``[tool.flwr.app.config.*]`` tables of ``pyproject.toml`` as text, one comment a key."""
    tables = []
    for name, section in SECTIONS.items():
        lines = [f"[tool.flwr.app.config.{name}]"]
        for each in settings_of(name, section):
            lines += [
                "# " + "; ".join((each.meaning, *each.rules)),
                f"{each.key.partition('.')[2]} = {json.dumps(scalar(each.default))}",
            ]
        for old, new in RENAMED.items():
            if old.startswith(f"{name}."):
                lines += [f"# former name of {new}; empty = not given", f'{old.partition(".")[2]} = ""']
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under the names that they have now; a former one that is empty is not given."""
    given = {key: value for key, value in flat.items() if key not in RENAMED}
    for old, new in RENAMED.items():
        if (value := flat.get(old, "")) != "":
            warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
            given[new] = value
    return given


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong between settings that are fine one by one."""
    clients, data, plan, train = config.clients, config.data, config.plan, config.train
    for name, values in clients.lists.items():
        if len(values) > clients.count:
            yield (
                f"clients.count={clients.count} leaves out {len(values) - clients.count} of the {len(values)} clients "
                f"in clients.{name}={scalar(values)!r}; shorten that, or leave clients.count out: the list says it"
            )
    if clients.min > clients.count:
        yield f"clients.min={clients.min} is more than clients.count={clients.count}"
    if clients.per_round and clients.fraction < 1:
        yield f"clients.per_round={clients.per_round} and clients.fraction={clients.fraction:g}: give one of them"
    if 0 < clients.per_round < clients.min:
        yield f"clients.per_round={clients.per_round} is less than clients.min={clients.min}"
    if 0 < clients.max_update < 1:
        yield (
            f"clients.max_update={clients.max_update!r} would refuse the median itself; give at least 1, or 0 for no "
            "limit"
        )
    if not data.path and (data.source == "e2e" or (data.is_own and not data.eval_path)):
        yield f"data.path is empty; data.source={data.source} needs the path of its files" + (
            ", or data.eval_path where nodes have text of their own" if data.is_own else ""
        )
    if data.prompt and not data.completion:
        yield f"data.prompt={data.prompt} names what a model reads; name what it learns too, data.completion=COLUMN"
    if config.split.noise and not config.split.clip:
        yield (
            f"split.noise={config.split.noise:g} needs split.clip, in units of which it is; hsplitlora attack says how "
            "long activations are"
        )
    if config.split.decorrelate and config.lora.clients == "none":
        yield (
            f"split.decorrelate={config.split.decorrelate:g} is learnt by clients' adapters, and lora.clients=none "
            "gives them none"
        )
    if config.split.width and not config.split.bottleneck:
        yield (
            f"split.width={config.split.width} needs split.bottleneck, the file of directions for this model that "
            "hsplitlora bottleneck --out FILE learns"
        )
    if config.split.max_leakage < 1 and not config.split.leakage:
        yield (
            f"split.max_leakage={config.split.max_leakage:g} needs split.leakage, the file that an attack on this "
            "model wrote: hsplitlora attack --out FILE"
        )
    if unknown := [name for name in config.run.listeners if name not in KNOWN_LISTENERS]:
        yield (
            f"run.listeners names {', '.join(unknown)}, which is not registered; "
            f"registered are {', '.join(KNOWN_LISTENERS) or 'none'}"
        )
    if unknown := [name for name in config.run.trackers if name not in TRACKERS]:
        yield f"run.trackers names {', '.join(unknown)}; choose of {', '.join(TRACKERS)}"
    if config.run.adapter_rank and KNOWN_METHODS[config.method.name].central:
        yield (
            f"run.adapter_rank={config.run.adapter_rank} is for methods with clients, and {config.method.name} trains "
            f"in one place; use `hsplitlora export RUN --rank {config.run.adapter_rank}` after the run"
        )
    if config.split.max and config.split.max < config.split.min:
        yield f"split.max={config.split.max} is below split.min={config.split.min}"
    if train.micro_batch_size > train.batch_size:
        yield (
            f"train.micro_batch_size={train.micro_batch_size} is above train.batch_size={train.batch_size}, of which "
            "it is a part; lower it, or 0 sends the batch whole"
        )
    if train.momentum and train.optimizer != "sgd":
        yield f"train.momentum={train.momentum:g} is for train.optimizer=sgd, and it is {train.optimizer}; set it to 0"
    if plan.deadline and plan.planner != "exact":
        yield f"plan.deadline={plan.deadline:g} needs plan.planner=exact; {plan.planner} knows memory only"
    if bool(config.transport.certificate) != bool(config.transport.private_key):
        yield (
            "transport.certificate and transport.private_key belong together; name both files, or neither to have a "
            "certificate made for the run"
        )
    if config.model.quantise != "none":
        kept = f"model.quantise={config.model.quantise} leaves the weights of the base as they are"
        if KNOWN_METHODS[config.method.name].full:
            yield (
                f"{kept}, and method.name={config.method.name} trains them; set model.quantise=none, or another method"
            )
        if config.run.merged:
            yield (
                f"{kept}, and run.merged=true writes the update into them; use the adapter, or merge it with PEFT into "
                "a base that is not quantised"
            )
    alone = {
        "server.half=shared": config.server.half == "shared",
        "split.labels=client": config.split.labels == "client",
        "transport.kind=messages": config.transport.kind == "messages",
    }
    for other in (name for name, chosen in alone.items() if chosen and train.multi_adapter_batching == "on"):
        yield (
            f"train.multi_adapter_batching=on cannot be had with {other}, where clients come one by one; set it to auto"
        )
