"""The single runs of a comparison, and their results on disk.

The :class:`~hsplitlora_flwr.comparison.results.Result` of a :class:`Job` is a JSON file, and counts only for exactly
the settings that it holds. So a comparison that was stopped, or changed, goes on with what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.comparison.results import CENTRAL, Result
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.paths import with_absolute_paths

_OF_CLIENTS = (
    "clients.memory_gb",
    "clients.gpu_memory_gb",
    "clients.gflops",
    "clients.process_mb",
    "clients.mbit_up",
    "clients.mbit_down",
    "clients.adapter_mb",
    "plan.server_memory_gb",
    "plan.server_gpu_memory_gb",
    "data.partition",
    "data.alpha",
)


@dataclass(frozen=True)
class Job:
    """One run: a cell of the comparison, or a trial of the tuning. ``config`` has no ``run.dir`` yet."""

    setting: str
    config: Config
    trial: bool = False

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def name(self) -> str:
        """Names the job's file and run folder."""
        kind = f"lr{self.config.train.lr}" if self.trial else f"seed{self.config.run.seed}"
        return f"{self.setting}-{self.method}-{kind}"

    @property
    def text(self) -> str:
        kind = f"lr {self.config.train.lr}" if self.trial else f"seed {self.config.run.seed}"
        return f"{self.setting} {self.method} {kind}"

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make a difference: not the run folder, nor clients where there are none."""
        ignored = ("run.dir", *(_OF_CLIENTS if self.setting == CENTRAL else ()))
        return {key: value for key, value in self.config.to_run_config().items() if key not in ignored}

    def result(self, **fields: Any) -> Result:
        config = self.config
        return Result(self.setting, self.method, config.run.seed, config.train.lr, self.identity, **fields)


class Store:
    """Results on disk, a JSON file each, in the folder ``records`` of the results folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "records"
        self._folder.mkdir(parents=True, exist_ok=True)

    def load(self, job: Job) -> Result | None:
        """The job's result, if there is one of exactly its settings."""
        try:
            result = Result(**json.loads((self._folder / f"{job.name}.json").read_text(encoding="utf-8")))
            # Through the schema, so that a setting that is younger than the result has its default; and a folder may be
            # written in another way.
            done, wanted = map(with_absolute_paths, map(Config.from_run_config, (result.config, job.identity)))
            if done.model.dtype != wanted.model.dtype:
                done, wanted = with_model_dtype(done), with_model_dtype(wanted)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return result if done == wanted else None

    def save(self, job: Job, result: Result) -> None:
        write(self._folder / f"{job.name}.json", json.dumps(vars(result)) + "\n")


def vary(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same settings but for some dotted keys."""
    return Config.from_run_config({**config.to_run_config(), **changes})
