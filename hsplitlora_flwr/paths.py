"""Settings that name files and folders, for a process that works in another folder than the user."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hsplitlora_flwr.config import Config


def with_absolute_paths(config: Config) -> Config:
    """The same settings with every path absolute; a ``model.path`` that is no folder here is a name, and stays."""
    model = absolute(config.model.path) if Path(config.model.path).expanduser().is_dir() else config.model.path
    path, eval_path = absolute(config.data.path), absolute(config.data.eval_path)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=absolute(config.run.dir), resume=absolute(config.run.resume)),
        data=dataclasses.replace(config.data, path=path, eval_path=eval_path),
        model=dataclasses.replace(config.model, path=model),
        split=dataclasses.replace(config.split, leakage=absolute(config.split.leakage)),
    )


def absolute(path: str) -> str:
    """A path of the user's, ``~`` included, as an absolute one; "" stays."""
    return str(Path(path).expanduser().resolve()) if path else ""
