"""What Hydra composes: defaults and options made from the schema, under what ``conf/`` says differently; and the help.

``method=NAME`` and ``transport=NAME`` are there for whatever is registered; the other groups are files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hsplitlora_flwr.config import SECTIONS, SETTINGS, Config
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.schema import scalar, settings_of

_PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = shipped if (shipped := _PACKAGE / "app").is_dir() else _PACKAGE.parent
"""The folder of the Flower app, with ``pyproject.toml`` and ``conf/``: a wheel has it inside the package, a checkout is
it."""
CONF = PROJECT / "conf"
_WIDTH = 80
_NAMED = {"method": "method.name", "transport": "transport.kind"}
"""Groups that have an option for every choice of a setting."""


def register(launcher: type[Any]) -> None:
    """Give Hydra the defaults of the schema, and of how a run is started, and the options of what is registered."""
    OmegaConf.register_new_resolver("first", _first, replace=True)
    store = ConfigStore.instance()
    store.store("schema", {name: _defaults(name, section) for name, section in _sections(launcher).items()})
    choices = {each.key: each.choices for each in SETTINGS if each.key in _NAMED.values()}
    for group, key in _NAMED.items():
        for choice in choices[key]:
            store.store(choice, {key.partition(".")[2]: choice}, group=group)


def _first(count: Any, values: str) -> str:
    """The first ``count`` of values that commas separate; all of them where that is no number of clients."""
    parts = values.split(",")
    return ",".join(parts[:count] if isinstance(count, int) and count > 0 else parts)


def composed_config(composed: DictConfig) -> Config:
    """The checked settings of a run as Hydra composed them, for commands that start none.

    Raises
    ------
    ConfigError, PluginError, OmegaConfBaseException
        If a key or a value is wrong, or a plug-in cannot be imported.
    """
    values: Any = OmegaConf.to_container(composed, resolve=True)
    del values["launcher"]
    return Config.from_mapping(values)


def help_text(about: str, launcher: type[Any]) -> str:
    """What a command does, and :func:`settings_text`.

    Parameters
    ----------
    about : str
        What a command does.
    launcher : type
        The section ``launcher``.
    """
    return "\n".join(_narrow(about)) + f"\n{settings_text(launcher)}\n"


def settings_text(launcher: type[Any]) -> str:
    """The options of every group, the methods, and every setting as it is when nothing is said, in 80 columns."""
    register(launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config")
        OmegaConf.resolve(composed.clients)
        values: Any = OmegaConf.to_container(composed)
        loader = GlobalHydra.instance().config_loader()
        options = {group: loader.get_group_options(group) for group in loader.list_groups("") if group != "hydra"}
    lines = ["Options that set several settings at once:", ""]
    for group, names in options.items():
        lines += _wrapped(f"{group}={' | '.join(names)}", 2)
    lines += ["", "Methods:", ""]
    for name, method in METHODS.items():
        lines += _wrapped(f"{name}: {method.summary or method.source}", 2)
    lines += ["", "Settings, as they are when nothing is said:"]
    for name, section in _sections(launcher).items():
        lines += ["", *_wrapped(f"{name}: {_first_sentence(section)}", 0)]
        for each in settings_of(name, section):
            lines += _wrapped(f"{each.key}={values[name][each.key.partition('.')[2]]}", 2)
            lines += _wrapped("; ".join((each.meaning, *each.rules)), 6)
    return "\n".join(lines)


def _sections(launcher: type[Any]) -> Mapping[str, Any]:
    return SECTIONS | {"launcher": launcher}


def _defaults(name: str, section: Any) -> dict[str, Any]:
    return {each.key.partition(".")[2]: scalar(each.default) for each in settings_of(name, section)}


def _first_sentence(section: Any) -> str:
    text = " ".join((section.__doc__ or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("``", "")


def _wrapped(text: str, indent: int) -> list[str]:
    shown = textwrap.TextWrapper(_WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
    shown.break_on_hyphens = False
    return shown.wrap(text)


def _narrow(about: str) -> Iterator[str]:
    """A docstring's paragraphs at the width of the help; its examples below what they say."""
    for paragraph in about.replace("``", "").replace("::\n", "").strip().split("\n\n"):
        if paragraph.lstrip("\n").startswith("    "):
            for example in paragraph.strip("\n").splitlines():
                command, _, meaning = example.strip().partition(" # ")
                yield from [f"  # {meaning.strip()}"] * bool(meaning)
                yield f"  {command.strip()}"
        elif paragraph.strip():
            yield from textwrap.wrap(" ".join(paragraph.split()), _WIDTH)
        yield ""
