"""What a round leaves for the next one, on disk: from it goes on what ended early, or is to have more rounds.

``checkpoints/round-N`` of a run folder holds

    delta.safetensors      the accumulated update                                                    (lora/export.py)
    start.safetensors      what adapters start from in round N + 1: ``layer:B`` and ``layer:A``
    optimizer.safetensors  training in one place: what trains, and what the optimizer keeps of it
    state.json             importance, plans with the budgets that they are for, and the settings

It appears under its name when it is complete, and only then the one before it goes. Clients keep nothing from round to
round that it lacks: optimizers start anew, and batches, masks and learning rate follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.delta import Change, Delta, pack, unpack
from hsplitlora_flwr.lora.export import load_delta, save_delta
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.planning.planner import Budget, ClientPlan
from hsplitlora_flwr.reporting.summary import SUMMARY_FILE

CHECKPOINTS = "checkpoints"
_STATE, _START, _OPTIMIZER = "state.json", "start.safetensors", "optimizer.safetensors"
_FREE = ("run.dir", "run.resume", "run.timeout", "run.merged")
"""Settings that no plan depends on."""


class ResumeError(ValueError):
    """A run that cannot be gone on from; the text says why and what to do."""


@dataclass(frozen=True)
class RunState:
    """All that a run goes on from after a round.

    Parameters
    ----------
    server_round : int
        The last finished round.
    settings : Mapping[str, Any]
        The run's, as dotted keys.
    delta : Delta
        The accumulated update.
    start : Mapping[str, Factors]
        What adapters start from, by layer name.
    optimizer : Mapping[str, Tensor]
        Of training in one place; empty where clients train.
    importance, planned_importance : Mapping[str, float]
        Of every weight: now, and when the plan was made.
    plans : Mapping[str, ClientPlan]
        By client.
    planned_budgets : Mapping[str, Budget]
        By client, when the plan was made.
    """

    server_round: int
    settings: Mapping[str, Any]
    delta: Delta
    start: Mapping[str, Factors] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    planned_importance: Mapping[str, float] = field(default_factory=dict)
    plans: Mapping[str, ClientPlan] = field(default_factory=dict)
    planned_budgets: Mapping[str, Budget] = field(default_factory=dict)

    def plans_hold(self, config: Config) -> bool:
        """Whether the plans are still those of these settings."""
        now = config.to_run_config()
        return all(self.settings.get(key) == value for key, value in now.items() if key not in _FREE)


def save_state(state: RunState, run_folder: Path) -> None:
    """Write the checkpoint of a round, and then remove the one before."""
    folder = run_folder / CHECKPOINTS
    draft = folder / "part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_delta(state.delta, draft)
    files = {_START: pack({name: Change(factors=pair) for name, pair in state.start.items()})}
    files[_OPTIMIZER] = dict(state.optimizer)
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft / name)
    text = {
        "server_round": state.server_round,
        "settings": dict(state.settings),
        "importance": dict(state.importance),
        "planned_importance": dict(state.planned_importance),
        "plans": {client: asdict(plan) for client, plan in state.plans.items()},
        "planned_budgets": {client: asdict(budget) for client, budget in state.planned_budgets.items()},
        "digests": {name: _digest(draft / name) for name in files},
    }
    (draft / _STATE).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    earlier = list(folder.glob("round-*"))
    draft.rename(folder / f"round-{state.server_round}")
    for old in earlier:
        shutil.rmtree(old)


def last_round(run_folder: Path) -> int:
    """The last finished round that a run can be gone on from; 0 if there is none."""
    folders = (run_folder / CHECKPOINTS).glob("round-*")
    return max((int(folder.name.removeprefix("round-")) for folder in folders), default=0)


def check_resume(config: Config, run_folder: Path) -> None:
    """See that there is a round to go on from, and that the settings fit it; reads no tensor.

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
    _check_settings(config, _read_text(_last_checkpoint(config)))
    _read_json(earlier / SUMMARY_FILE)


def load_state(config: Config) -> RunState:
    """What the run ``run.resume`` left after its last finished round.

    Raises
    ------
    ResumeError, ConfigError, DeltaError
        If there is no such round, it does not fit the settings, or a file is damaged.
    """
    folder = _last_checkpoint(config)
    text = _read_text(folder)
    _check_settings(config, text)
    tensors = {}
    for name in (_START, _OPTIMIZER):
        try:
            if _digest(folder / name) != text["digests"].get(name):
                raise _damaged(folder / name, "its checksum does not fit its content")
            tensors[name] = load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise _damaged(folder / name, error) from error
    return RunState(
        server_round=text["server_round"],
        settings=text["settings"],
        delta=load_delta(folder, config.lora.rank_cap),
        start={name: change.factors for name, change in unpack(tensors[_START]) if change.factors},
        optimizer=tensors[_OPTIMIZER],
        importance=text["importance"],
        planned_importance=text["planned_importance"],
        plans={client: ClientPlan(**plan) for client, plan in text["plans"].items()},
        planned_budgets={client: Budget(**budget) for client, budget in text["planned_budgets"].items()},
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
    text = _read_json(folder / _STATE)
    if missing := {"server_round", "settings", "plans", "planned_budgets", "digests"} - text.keys():
        raise _damaged(folder / _STATE, f"it lacks {', '.join(sorted(missing))}")
    return text


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error


def _check_settings(config: Config, text: Mapping[str, Any]) -> None:
    now, then, method = config.to_run_config(), text["settings"], METHODS[config.method.name]
    fixed = ["method.name", "model.quantise"]
    if method.carries or method.central:  # the same adapters go on
        fixed += ["lora.rank", "lora.ranks", "lora.alpha", "lora.targets"]
    if method.central:  # and the same optimizer
        fixed += ["train.optimizer", "train.momentum"]
    for key in fixed:
        if now[key] != then.get(key):
            raise ConfigError(
                f"{key}={now[key]!r}, and the run in run.resume={config.run.resume} has {then.get(key)!r}; a run goes "
                "on with what it began with"
            )
    # a folder may have moved to another place
    name, other = Path(config.model.path).name, Path(str(then.get("model.path"))).name
    if name != other:
        raise ConfigError(
            f"model.path={config.model.path}, and the run in run.resume={config.run.resume} has "
            f"{then.get('model.path')}; its update belongs to that model"
        )
    if config.train.rounds < text["server_round"]:
        raise ConfigError(
            f"train.rounds={config.train.rounds}, and the run in run.resume={config.run.resume} has finished "
            f"{text['server_round']}; give at least as many"
        )


def _damaged(file: Path, cause: object) -> ResumeError:
    return ResumeError(f"{file} is damaged ({cause}); restore it from a copy, or leave run.resume empty to start anew")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
