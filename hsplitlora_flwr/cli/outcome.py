"""The folder of a finished run, as the commands read it that come after a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.reporting.summary import SUMMARY_FILE, read_summary

if TYPE_CHECKING:
    from hsplitlora_flwr.lora.aggregation import Factors
    from hsplitlora_flwr.lora.base import SharedBase

ADAPTER, MERGED = "adapter", "merged"


@dataclass(frozen=True)
class Outcome:
    """A run folder with its summary.

    Parameters
    ----------
    folder : Path
    summary : Mapping
        The content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str) -> Outcome:
        """Of a run in any state.

        Raises
        ------
        ConfigError
            If this is no run folder.
        """
        path = Path(folder).expanduser().resolve()
        try:
            summary = read_summary(path)
        except OSError:
            raise ConfigError(f"{folder} is no folder of a run: no {SUMMARY_FILE} can be read there") from None
        except ValueError as error:
            raise ConfigError(f"{path / SUMMARY_FILE} is damaged: {error}") from None
        if not isinstance(summary, dict) or not {"status", "config", "rounds", "started"} <= set(summary):
            raise ConfigError(f"{path / SUMMARY_FILE} is not the summary of a run")
        return cls(path, summary)

    @property
    def config(self) -> Config:
        """The settings."""
        return Config.from_run_config(self.summary["config"])

    @property
    def full(self) -> bool:
        """The run trained all weights, so it left a model and no adapter."""
        return METHODS[self.config.method.name].full

    @property
    def kind_of_prompts(self) -> str:
        """As :func:`hsplitlora_flwr.data.shapes.kind_of` told it of the held-out text."""
        kind = self.summary.get("text", {}).get("held_out", {}).get("prompts")
        return str(kind or ("pair" if self.config.data.is_own else "line"))  # as runs had it that do not say

    def load(self, path: str = "", *, without: str = "") -> tuple[SharedBase, dict[str, Factors]]:
        """The base model of the run, on the device there is, and the adapter by layer name.

        Parameters
        ----------
        path : str
            Where the base is, if not where the run found it.
        without : str
            What the adapter is needed for, if a model without one is of no use.

        Raises
        ------
        ValueError
            ``ConfigError`` if the run left no adapter, ``ModelFilesError`` if there is no base, ``UpdateError`` if the
            two do not fit.
        """
        from hsplitlora_flwr.lora.base import SharedBase
        from hsplitlora_flwr.lora.export import load_peft_adapter
        from hsplitlora_flwr.models.placement import pick_devices

        model = self.config.model
        where = str(self.folder / MERGED) if self.full else path or model.path
        if self.full:
            if without:
                raise ConfigError(f"{self.folder} holds a run of method.name=full, which has no adapter to {without}")
            return SharedBase(where, self._dtype(where), pick_devices("auto")), {}
        if not (self.folder / ADAPTER).is_dir():
            raise ConfigError(f"{self.folder} has no {ADAPTER}/: the run is {self.summary['status']}, not finished")
        base = SharedBase(where, self._dtype(where), pick_devices("auto"), model.quantise)
        return base, load_peft_adapter(self.folder / ADAPTER, base.model, base.inside)

    def _dtype(self, where: str) -> str:
        """In which the base is held; a run writes down what ``auto`` came to."""
        from hsplitlora_flwr.models.configuration import with_model_dtype

        config = replace(self.config, model=replace(self.config.model, path=where))
        return with_model_dtype(config).model.dtype


def ends(work: Callable[[], None]) -> None:
    """Do a command's work and end the process: with 0, or with 2 and one line where something typed is wrong."""
    try:
        work()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def parser(text: str) -> argparse.ArgumentParser:
    """Of a command on one finished run."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("run", metavar="RUN", help="folder of the run")
    made.add_argument("--model", default="", metavar="PATH", help="the base model, if the run found it elsewhere")
    return made
