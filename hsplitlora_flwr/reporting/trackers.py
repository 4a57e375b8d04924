"""Trackers of experiments as listeners: ``run.trackers=tensorboard,mlflow``.

What a tracker is told, by training step; a round's figures stand at its last step:

    loss/CLIENT                     of every step
    perplexity                      of the held-out text, at step 0 before training
    seconds/CLIENT, seconds/round   of a round
    memory_gb/CLIENT                measured peak of a client's process
    update_norm                     of the round's update

They are the trackers of ``accelerate``, each of which needs its own package; where they write and under which account
is theirs to say (``MLFLOW_TRACKING_URI``, ``WANDB_PROJECT``). Without that TensorBoard and MLflow write into the run
folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting.events import Event

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}
"""The module that each tracker needs, which is also what installs it."""
PROJECT = "hsplitlora"


def check_trackers(names: Collection[str]) -> None:
    """See that the packages of these trackers are installed.

    Raises
    ------
    ModuleNotFoundError
        If one is not; the text says what installs it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise ModuleNotFoundError(
                f"run.trackers={name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}"
            )


class TrackerListener:
    """Hands a run's figures to a tracker.

    Parameters
    ----------
    name : str
        One of :data:`PACKAGES`.
    config : Config
        The settings, which the tracker keeps with the run.
    folder : Path
        The run folder.

    Raises
    ------
    ModuleNotFoundError
        If the tracker's package is not installed.
    """

    def __init__(self, name: str, config: Config, folder: Path) -> None:
        check_trackers([name])
        self._tracker = _start(name, folder)
        self._tracker.store_init_configuration(config.to_run_config())
        self._step = 0
        self._losses: dict[int, dict[str, float]] = {}  # of this round's steps: clients come to a step one by one

    def handle(self, event: Event) -> None:
        """Take one event."""
        match event["kind"]:
            case "step":
                step = (event["round"] - 1) * event["steps"] + event["step"]
                self._losses.setdefault(step, {})[f"loss/{event['client']}"] = event["loss"]
            case "client_finished":
                client = event["client"]
                figures = {f"seconds/{client}": event["seconds"]}
                if event["measured_bytes"]:
                    figures[f"memory_gb/{client}"] = event["measured_bytes"] / 1e9
                self._losses.setdefault(max(self._losses, default=self._step), {}).update(figures)
            case "round_finished":
                self._flush()
                self._log({"seconds/round": event["seconds"], "update_norm": event["update_norm"]})
            case "evaluated":
                self._log({"perplexity": event["perplexity"]})
            case "finished" | "failed":
                self._flush()
                self._tracker.finish()

    def _flush(self) -> None:
        """Log the steps in order: some trackers take no step that is before the last."""
        for step, figures in sorted(self._losses.items()):
            self._step = step
            self._log(figures)
        self._losses = {}

    def _log(self, figures: dict[str, float]) -> None:
        self._tracker.log(figures, step=self._step)


def _start(name: str, folder: Path) -> Any:
    from accelerate import PartialState  # takes seconds, and most runs have no tracker
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # which its logs ask for; it takes hold of no GPU

    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder)},
        "mlflow": {"experiment_name": PROJECT, "run_name": folder.name},
        "wandb": {"run_name": os.environ.get("WANDB_PROJECT", PROJECT), "name": folder.name, "dir": str(folder)},
        "trackio": {"run_name": PROJECT, "name": folder.name},
    }
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")  # it takes no folder any more
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](**options[name])
    tracker.start()
    return tracker
