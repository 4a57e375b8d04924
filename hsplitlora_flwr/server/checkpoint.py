"""What a round leaves for the next one, on disk: from it goes on what ended early, or is to have more rounds.

``checkpoints/round-N`` of a run folder holds

    delta.safetensors      the accumulated update                                                    (lora/export.py)
    start.safetensors      what adapters start from in round N + 1: ``layer:B`` and ``layer:A``
    optimizer.safetensors  what trains on from round to round, and what its optimizer keeps of it: the half that all
                           clients share, or what is trained in one place
    state.json             importance, plans with the budgets that they are for, and the settings

It appears under its name when all of it is on the disk, not only on its way there; the one before it stays beside it,
and those before that go. Every file is known by its checksum, so what is damaged, or of another run, is recognised
before anything starts. Clients keep nothing from round to round that it lacks: their optimizers start anew, and
batches, masks and learning rate follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hsplitlora_flwr.config import Config, ConfigError, Scalar
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.export import DELTA_FILE, load_update, save_update
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change, pack, unpack
from hsplitlora_flwr.methods import METHODS, keeps_half
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.paths import CHECKPOINTS, kept_rounds, last_round
from hsplitlora_flwr.planning.budget import Budget
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.reporting.summary import SUMMARY_FILE, read_summary

_STATE, _START, _OPTIMIZER = "state.json", "start.safetensors", "optimizer.safetensors"
_TENSORS = (DELTA_FILE, _START, _OPTIMIZER)
_UNPLANNED = (
    *("run.dir", "run.resume", "run.resume_changed", "run.timeout", "run.merged"),
    *("run.trackers", "run.adapter_rank", "evaluation.texts"),
)
"""Settings that no plan depends on."""

_MAY_CHANGE = (
    *_UNPLANNED,
    # who takes part, with what machines
    *("clients.count", "clients.wait", "clients.min", "clients.memory_gb", "clients.gpu_memory_gb"),
    *("clients.gflops", "clients.mbit_up", "plan.server_gpu_memory_gb"),
    *("clients.mbit_down", "clients.adapter_mb", "plan.deadline", "plan.over_budget", "plan.server_gflops"),
    *("plan.server_memory_gb", "model.device", "clients.process_mb", "plan.server_process_mb"),
    # for how long, and how the same steps are computed, sent and measured
    *(
        "train.rounds",
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.multi_adapter_batching",
        "train.passes",
    ),
    *("server.order", "server.patience"),
    *("evaluation.batch_size", "evaluation.generate", "evaluation.beams", "evaluation.max_new_tokens"),
    *("transport.kind", "transport.address", "transport.port", "transport.bind", "transport.public_port"),
    *("transport.tls", "transport.proxy", "transport.certificate", "transport.private_key", "transport.in_flight"),
)
"""Settings with which a run goes on as it would have gone on. Of all others those that are fixed stay, since what is on
the disk is of no use with another value, and the rest is for the user to say (``run.resume_changed``)."""

_FOLDERS = {
    "model.path": "its update belongs to that model",
    "data.path": "a run goes on with the text that it began with",
    "data.eval_path": "a run goes on with the text that it began with",
}
"""Settings that stay but for the place where a folder lies, and why."""


class ResumeError(ValueError):
    """A run that cannot be resumed; the text says why and what to do."""


@dataclass(frozen=True)
class RunState:
    """All that a run continues from after a round.

    Parameters
    ----------
    server_round : int
        The last finished round.
    settings : Mapping[str, Any]
        The run's, as dotted keys.
    accumulated : AccumulatedUpdate
        The accumulated update.
    start : Mapping[str, Factors]
        What adapters start from, by layer name.
    optimizer : Mapping[str, Tensor]
        Of the half that all clients share (:meth:`hsplitlora_flwr.training.half.SharedHalf.tensors`), or of training in
        one place; empty where nothing trains on.
    importance, planned_importance : Mapping[str, float]
        Of every weight: now, and when the plan was made.
    plans : Mapping[str, ClientPlan]
        By client.
    planned_budgets : Mapping[str, Budget]
        By client, when the plan was made.
    """

    server_round: int
    settings: Mapping[str, Any]
    accumulated: AccumulatedUpdate
    start: Mapping[str, Factors] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    planned_importance: Mapping[str, float] = field(default_factory=dict)
    plans: Mapping[str, ClientPlan] = field(default_factory=dict)
    planned_budgets: Mapping[str, Budget] = field(default_factory=dict)

    def plans_hold(self, config: Config) -> bool:
        """Whether the plans are still those of these settings."""
        now = config.to_run_config()
        return all(self.settings.get(key) == value for key, value in now.items() if key not in _UNPLANNED)


def save_state(state: RunState, run_folder: Path) -> None:
    """Write the checkpoint of a round, and then remove those before the one before it."""
    folder = run_folder / CHECKPOINTS
    draft = folder / "part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_update(state.accumulated, draft)
    files = {_START: pack({name: Change(factors=pair) for name, pair in state.start.items()})}
    files[_OPTIMIZER] = dict(state.optimizer)
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft / name)
    content = {
        "server_round": state.server_round,
        "settings": dict(state.settings),
        "importance": dict(state.importance),
        "planned_importance": dict(state.planned_importance),
        "plans": {client: asdict(plan) for client, plan in state.plans.items()},
        "planned_budgets": {client: asdict(budget) for client, budget in state.planned_budgets.items()},
        "digests": {name: _digest(draft / name) for name in _TENSORS},
    }
    text = json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"
    (draft / _STATE).write_text(text, encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        _sync(path)
    target, rounds = folder / f"round-{state.server_round}", kept_rounds(run_folder)
    if target.exists():  # of a run that was in this folder before
        shutil.rmtree(target)
    draft.rename(target)
    _sync(folder)
    before = max((number for number in rounds if number < state.server_round), default=0)
    for number in rounds:
        if number not in (before, state.server_round):
            shutil.rmtree(folder / f"round-{number}")


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, is on the disk."""
    if path.is_dir() and os.name == "nt":  # there folders cannot be opened, and need not
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_resume(config: Config, run_folder: Path) -> None:
    """Check that there is a complete round to resume from, and that the settings fit it.

    Every file is read once for its checksum; no tensor is kept.

    Parameters
    ----------
    config : Config
    run_folder : Path
        Of the run that goes on, which is not that of the earlier one.

    Raises
    ------
    ResumeError, ConfigError
        If there is none, or they do not.
    """
    if not config.run.resume:
        return
    earlier = Path(config.run.resume)
    if earlier.resolve() == run_folder.resolve():
        raise ConfigError(f"run.resume={earlier} is the folder of this run too; name another one in run.dir")
    folder = _last_checkpoint(config)
    text = _read_text(folder)
    _check_settings(config, text)
    for name in _TENSORS:
        _check_digest(folder / name, text)
    _plans(folder, text)
    with _reading(earlier / SUMMARY_FILE) as file:
        _check_summary(read_summary(file.parent))


def load_state(config: Config) -> RunState:
    """What the run ``run.resume`` left after its last finished round.

    Raises
    ------
    ResumeError, ConfigError, UpdateError
        If there is no such round, it does not fit the settings, or a file is damaged.
    """
    folder = _last_checkpoint(config)
    text = _read_text(folder)
    _check_settings(config, text)
    plans, budgets = _plans(folder, text)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in (_START, _OPTIMIZER):
        _check_digest(folder / name, text)
        with _reading(folder / name) as file:
            tensors[name] = load_file(file)
    _check_digest(folder / DELTA_FILE, text)
    with _reading(folder / DELTA_FILE):
        accumulated = load_update(folder, config.lora.rank_cap)
    with _reading(folder / _START):
        start = {name: change.factors for name, change in unpack(tensors[_START]) if change.factors}
    return RunState(
        server_round=text["server_round"],
        settings=_as_now(text["settings"]),
        accumulated=accumulated,
        start=start,
        optimizer=tensors[_OPTIMIZER],
        importance=text["importance"],
        planned_importance=text["planned_importance"],
        plans=plans,
        planned_budgets=budgets,
    )


def _last_checkpoint(config: Config) -> Path:
    folder = Path(config.run.resume) / CHECKPOINTS
    if METHODS[config.method.name].full:
        raise ConfigError(
            "run.resume is not possible with method.name=full, whose optimizer is not on disk; start from the model "
            f"after its last round: model.path={folder}"
        )
    last = last_round(Path(config.run.resume))
    if not last:
        raise ResumeError(
            f"run.resume={config.run.resume}: there is no finished round in {folder}; name the folder of a run that "
            "finished one, or leave it empty to start anew"
        )
    return folder / f"round-{last}"


def _read_text(folder: Path) -> dict[str, Any]:
    with _reading(folder / _STATE) as file:
        text = _read_json(file)
        kinds = {"server_round": int} | dict.fromkeys(_TABLES, dict)
        if missing := kinds.keys() - text.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if text.get("checksum") != _checksum({key: value for key, value in text.items() if key != "checksum"}):
            raise ValueError("its checksum does not fit its content")
        if wrong := [key for key, kind in kinds.items() if type(text[key]) is not kind]:
            raise ValueError(f"it says {wrong[0]}={text[wrong[0]]!r}")
        if folder.name != f"round-{text['server_round']}":
            raise ValueError(f"it is of round {text['server_round']}")
        return text


_TABLES = ("settings", "importance", "planned_importance", "plans", "planned_budgets", "digests")


_RENAMED = {"recompute": "checkpointing", "server_recompute": "server_checkpointing"}
"""Fields of plans by the names that they had."""


def _plans(folder: Path, text: Mapping[str, Any]) -> tuple[dict[str, ClientPlan], dict[str, Budget]]:
    with _reading(folder / _STATE):
        fields = {
            client: {_RENAMED.get(name, name): plan[name] for name in plan} for client, plan in text["plans"].items()
        }
        plans = {client: ClientPlan(**plan) for client, plan in fields.items()}
        return plans, {client: Budget(**budget) for client, budget in text["planned_budgets"].items()}


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _check_summary(content: Any) -> None:
    """Raise ``ValueError`` unless the rows of rounds can be told apart, which a run that goes on takes over."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for name in ("rounds", "plans", "importance_drift"):
        rows = content.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(r, dict) and type(r.get("round")) is int for r in rows):
            raise ValueError(f"its {name} are not those of a run")
    best = content.get("best") or {"round": 0, "perplexity": 0.0}
    if not isinstance(best, dict) or (type(best.get("round")), type(best.get("perplexity"))) != (int, float):
        raise ValueError("its best round is not that of a run")


def _check_digest(file: Path, text: Mapping[str, Any]) -> None:
    with _reading(file):
        if _digest(file) != text["digests"].get(file.name):
            raise ValueError("its checksum does not fit its content")


def _check_settings(config: Config, text: Mapping[str, Any]) -> None:
    now, then = with_model_dtype(config).to_run_config(), _as_now(text["settings"])
    fixed = _fixed(config)
    changed = [key for key in now if now[key] != then[key] and key not in (*_MAY_CHANGE, *_FOLDERS)]
    for key in (key for key in changed if key in fixed):
        raise ConfigError(
            f"{key}={now[key]!r}, and the run in run.resume={config.run.resume} has {then[key]!r}; a run goes on with "
            "what it began with"
        )
    if changed and not config.run.resume_changed:
        values = ", ".join(f"{key}={now[key]!r} for {then[key]!r}" for key in changed)
        raise ConfigError(
            f"other settings than those of the run in run.resume={config.run.resume}: {values}; it goes on with what "
            "it began with, unless run.resume_changed=true says that these are meant"
        )
    # a folder may have moved to another place
    for key, why in _FOLDERS.items():
        if Path(str(now[key])).name != Path(str(then[key])).name:
            raise ConfigError(f"{key}={now[key]}, and the run in run.resume={config.run.resume} has {then[key]}; {why}")
    if config.train.rounds < text["server_round"]:
        raise ConfigError(
            f"train.rounds={config.train.rounds}, and the run in run.resume={config.run.resume} has finished "
            f"{text['server_round']}; give at least as many"
        )


def _as_now(settings: Mapping[str, Any]) -> dict[str, Scalar]:
    """An earlier run's settings, under the names and in the form that they have now."""
    return Config.from_run_config(settings).to_run_config()


def _fixed(config: Config) -> list[str]:
    """The settings that a checkpoint depends on."""
    method = METHODS[config.method.name]
    fixed = ["method.name", "model.quantise", "run.seed", "evaluation.client_rows"]
    # other text would be held out and kept apart, of which some has been trained on
    fixed += [key for key in config.to_run_config() if key.startswith("data.")]
    if method.keeps_global_adapter or method.central:  # the same adapters go on
        fixed += ["lora.rank", "lora.ranks", "lora.alpha", "lora.targets"]
    if method.central or keeps_half(config):  # and the same optimizer
        fixed += ["train.optimizer", "train.momentum"]
    return fixed


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Whatever goes wrong while a file is read, the file is damaged: its content may be anything.

    Raises
    ------
    ResumeError
        In place of every exception.
    """
    try:
        yield file
    except (ResumeError, ConfigError):
        raise
    except Exception as error:
        number, before = file.parent.name.removeprefix("round-"), list[int]()
        if number.isdecimal():
            before = [each for each in kept_rounds(file.parents[2]) if each < int(number)]
        other = f", remove the folder {file.parent.name} to go on after round {max(before)}" if before else ""
        raise ResumeError(
            f"{file} is damaged or not of a run ({str(error)[:200] or type(error).__name__}); restore it from a "
            f"copy{other}, or leave run.resume empty to start anew"
        ) from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of what JSON says, however it is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
