"""Settings that name files and folders, for a process that works in another folder than the user."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.files import is_hub_name


def with_absolute_paths(config: Config) -> Config:
    """The same settings with every path absolute; a ``model.path`` that is no folder here is a name, and stays, as does
    the name of a data set."""
    model = absolute(config.model.path) if Path(config.model.path).expanduser().is_dir() else config.model.path
    path, eval_path = (_of_data(each) for each in (config.data.path, config.data.eval_path))
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=absolute(config.run.dir), resume=absolute(config.run.resume)),
        data=dataclasses.replace(config.data, path=path, eval_path=eval_path),
        model=dataclasses.replace(config.model, path=model),
        split=dataclasses.replace(config.split, leakage=absolute(config.split.leakage)),
    )


def _of_data(path: str) -> str:
    """As :func:`absolute`; the name of a data set of the hub stays."""
    return path if is_hub_name(path) and not Path(path).expanduser().exists() else absolute(path)


def absolute(path: str) -> str:
    """A path of the user's, ``~`` included, as an absolute one; "" stays."""
    return str(Path(path).expanduser().resolve()) if path else ""
