"""What is typed on a command line, made fit for Hydra.

Hydra reads a value by a grammar of its own, in which ``ü``, ``'``, ``(`` and ``#`` need quotes inside the shell's. So
what it cannot read is taken as the plain text that it is, and so is a path that it would read as something else, such
as a number or a list. Keys are checked here too, since Hydra's advice on an unknown one, ``+key``, does not help.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from hsplitlora_flwr.config import Config, ConfigError, unknown_key

PATHS = (
    *("model.path", "data.path", "data.eval_path", "split.leakage", "run.dir", "run.resume"),
    *("transport.certificate", "transport.private_key"),
)
"""Settings that name a file or folder."""


def start(main: Callable[[], None], more_keys: Sequence[str] = ()) -> int:
    """Run an entry point of Hydra; returns the exit status, which is 2 where the command line is wrong.

    Parameters
    ----------
    more_keys : Sequence[str]
        Keys that there are besides those of :class:`Config`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here, and are told in one line
    try:
        sys.argv[1:] = literal(sys.argv[1:])
        check_keys(sys.argv[1:], more_keys)
        main()
    except (HydraException, ConfigError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def literal(arguments: Sequence[str]) -> list[str]:
    """The arguments with those values in quotes that Hydra would misread."""
    sweeps = any(argument in ("-m", "--multirun") for argument in arguments)
    return [_literal(argument, sweeps) for argument in arguments]


def check_keys(arguments: Sequence[str], more_keys: Sequence[str] = ()) -> None:
    """Raise :class:`ConfigError` if an override names a key that there is not, with the one that may be meant."""
    known = [*Config().to_run_config(), *more_keys]
    sections = {key.partition(".")[0] for key in known} | {"hydra", "experiment"}
    for override in filter(None, map(_parse, arguments)):
        key = override.key_or_group
        if key not in known and not (key in sections or key.startswith(("hydra.", "hydra/"))):
            raise unknown_key(key, known)


def _literal(argument: str, sweeps: bool) -> str:
    key, assigned, value = argument.partition("=")
    if not assigned or argument.startswith("-"):
        return argument
    override = _parse(argument)
    if override is not None:
        read = override.value()
        misread = key in PATHS and isinstance(read, bool | int | float | list | dict)
        split = key in PATHS and override.is_sweep_override() and not sweeps
        if not (misread or split):
            return argument
    parts = value.split(",") if sweeps else [value]
    return f"{key}={','.join(QuotedString(part, Quote.single).with_quotes() for part in parts)}"


def _parse(argument: str) -> Override | None:
    """As Hydra reads it; None if it cannot, or if it is no override."""
    if argument.startswith("-"):
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def one_line(error: Exception) -> str:
    """What is wrong, without where Hydra looked for files."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read; write KEY=VALUE, such as train.rounds=4"
    text = str(error).partition("\nConfig search path")[0]
    return " ".join(text.split())


def keys_of(section: str, schema: type) -> list[str]:
    """The keys of a dataclass that stands in ``conf/`` under ``section``."""
    return [f"{section}.{field.name}" for field in dataclasses.fields(schema)]
