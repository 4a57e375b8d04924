"""What is typed on a command line, made fit for Hydra.

Hydra reads a value by a grammar of its own, in which ``ü``, ``'``, ``(`` and ``#`` need quotes inside the shell's. So
what it cannot read is taken as the plain text that it is, and so is a path that it would read as something else, such
as a number or a list. Keys are checked here too, since Hydra's advice on an unknown one, ``+key``, does not help.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from hsplitlora_flwr.cli.settings import help_text, register
from hsplitlora_flwr.config import RENAMED, SETTINGS, Config, ConfigError, unknown_key
from hsplitlora_flwr.registry import PluginError

PATHS = (
    *("model.path", "data.path", "data.eval_path", "split.leakage", "split.bottleneck", "run.dir", "run.resume"),
    *("transport.certificate", "transport.private_key"),
)
"""Settings that name a file or folder."""
LISTS = tuple(each.key for each in SETTINGS if isinstance(each.default, tuple))
"""Settings with several values, which may be written as such: ``clients.memory_gb=1,1.3,1.8``."""
_MULTIRUN = {"-m", "--multirun"}


def start(main: Callable[[], None], launcher: type[Any], about: str) -> int:
    """Run an entry point of Hydra, or print its help; returns the exit status, 2 where the command line is wrong.

    Parameters
    ----------
    launcher : type
        The section ``launcher``, which there is besides those of :class:`Config`.
    about : str
        What the help says before it lists the settings.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here, and are told in one line
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(about, launcher), end="")
            return 0
        undashed(sys.argv[1:])
        register(launcher)
        sys.argv[1:] = literal(renamed(sys.argv[1:]))
        check_keys(sys.argv[1:], keys_of("launcher", launcher))
        if not _MULTIRUN & set(sys.argv[1:]):
            check_single(sys.argv[1:])
        main()
    except (HydraException, ConfigError, PluginError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def literal(arguments: Sequence[str]) -> list[str]:
    """The arguments with those values in quotes that Hydra would misread."""
    sweeps = bool(_MULTIRUN & set(arguments))
    return [_literal(argument, sweeps) for argument in arguments]


def undashed(arguments: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for ``--train.rounds=4``, as other programs take it."""
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and "." in key:
            raise ConfigError(f"{argument}: settings stand without dashes: {argument.lstrip('-')}")


def renamed(arguments: Sequence[str]) -> list[str]:
    """The arguments with the names that settings have now; one of a former name is told."""
    now = []
    for argument in arguments:
        key, assigned, value = argument.partition("=")
        if key in RENAMED:
            print(f"warning: {key} is now {RENAMED[key]}", file=sys.stderr)
        key = "sweep" if key == "+sweep" else RENAMED.get(key, key)  # a group that is there, with or without its plus
        now.append(f"{key}{assigned}{value}")
    return now


def check_keys(arguments: Sequence[str], more_keys: Sequence[str] = ()) -> None:
    """Raise :class:`ConfigError` if an override names a key that there is not, with the one that may be meant."""
    known = [*Config().to_run_config(), *more_keys]
    sections = {key.partition(".")[0] for key in known} | {"hydra", "experiment", "privacy", "sweep"}
    for override in filter(None, map(_parse, arguments)):
        key = override.key_or_group
        if key not in known and not (key in sections or key.startswith(("hydra.", "hydra/"))):
            raise unknown_key(key, known)


def check_single(arguments: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if an override of a single run has several values."""
    for override in filter(None, map(_parse, arguments)):
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} has several values, which -m takes one after the other; or name one"
            )


def refuse_keys(arguments: Sequence[str], keys: Collection[str], why: str) -> None:
    """Raise :class:`ConfigError` if an override sets one of ``keys``."""
    for override in filter(None, map(_parse, arguments)):
        if override.key_or_group in keys:
            raise ConfigError(f"{override.input_line}: {why}")


def _literal(argument: str, sweeps: bool) -> str:
    key, assigned, value = argument.partition("=")
    if not assigned or argument.startswith("-"):
        return argument
    override = _parse(argument)
    if override is not None:
        read = override.value()
        misread = key in PATHS and isinstance(read, bool | int | float | list | dict)
        split = key in (*PATHS, *LISTS) and override.is_sweep_override() and not sweeps
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
    text = " ".join(str(error).partition("\nConfig search path")[0].split())
    if found := re.search(r"Could not find '([^']+)/([^']+)' Available options in '[^']+': (.*)", text):
        group, typed, options = found.groups()
        if close := get_close_matches(typed, options.split(), 1):
            text += f"; did you mean {group}={close[0]}?"
    return text


def keys_of(section: str, schema: type) -> list[str]:
    """The keys of a dataclass that stands in ``conf/`` under ``section``."""
    return [f"{section}.{field.name}" for field in dataclasses.fields(schema)]
