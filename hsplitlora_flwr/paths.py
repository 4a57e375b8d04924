"""Files and folders: settings that name them, made absolute, and where runs and nodes keep theirs.

A run works in another folder than the user, so relative paths would not be found there.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import platformdirs

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.files import is_hub_name

CHECKPOINTS = "checkpoints"
"""The folder in that of a run in which ``round-N`` is what round ``N + 1`` goes on from."""


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
        split=dataclasses.replace(
            config.split,
            leakage=absolute(config.split.leakage),
            bottleneck=absolute(config.split.bottleneck),
        ),
    )


def _of_data(path: str) -> str:
    """As :func:`absolute`; the name of a data set of the hub stays."""
    return path if is_hub_name(path) and not Path(path).expanduser().exists() else absolute(path)


def absolute(path: str) -> str:
    """A path of the user's, ``~`` included, as an absolute one; "" stays."""
    return str(Path(path).expanduser().resolve()) if path else ""


def check_run_folder(folder: Path) -> None:
    """See that a run folder can be written, whether it is there yet or not.

    Raises
    ------
    ConfigError
        If it cannot.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()  # permissions, and a disk that is full or read-only
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written: {place} takes no file ({error.strerror}); name another folder"
        ) from error


def kept_rounds(run_folder: Path) -> list[int]:
    """The finished rounds that a run can be gone on from."""
    numbers = (folder.name.removeprefix("round-") for folder in (run_folder / CHECKPOINTS).glob("round-*"))
    return [int(number) for number in numbers if number.isdecimal()]


def last_round(run_folder: Path) -> int:
    """The last of :func:`kept_rounds`; 0 if there is none."""
    return max(kept_rounds(run_folder), default=0)


def nodes_folder() -> Path:
    """Where nodes of this machine keep what is theirs of a run, a folder a run, unless ``state-dir`` says otherwise."""
    return platformdirs.user_cache_path("hsplitlora_flwr") / "nodes"
