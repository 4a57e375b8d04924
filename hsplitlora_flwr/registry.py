"""What settings choose by name, and the packages that add to it.

A method, an aggregation rule, a codec, an optimizer, a source of text: each kind has a :class:`Registry`, in which the
package's own stand by the same ``register`` as those of others. Server and clients are processes on several machines,
and a name must mean the same in all of them. So whoever adds one says which module does it, in one of two ways:

- an installed package by an entry point of the group :data:`GROUP`, which is imported when a name is not known yet, or
  all names are asked for;
- a module that can be imported on every machine, as that of a Flower app of one's own, by the setting ``run.plugins``.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from hsplitlora_flwr.schema import parts

T = TypeVar("T")

GROUP = "hsplitlora_flwr.plugins"
"""The group of entry points; each names a module."""
SETTING = "run.plugins"
"""The key of the modules that a run names itself."""


class PluginError(ValueError):
    """A name cannot be registered, or a module that registers names cannot be imported; the text says which and why."""


class Registry(Mapping[str, T]):
    """Things of one kind by name.

    Parameters
    ----------
    kind : str
        How errors call one of them.
    *names : str
        Those that the package itself registers. They are known before that, so that settings are checked without
        importing what they choose from.
    home : str, optional
        The module that registers them, which is imported when one of them is asked for; and where no names are given
        also to know them, so importing it should cost nothing then.
    """

    def __init__(self, kind: str, *names: str, home: str = "") -> None:
        self.kind, self._names, self._home = kind, dict.fromkeys(names), home
        self._knows_its_names = bool(names)
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item``; returns it.

        Raises
        ------
        PluginError
            If the name is taken, or no name.
        """
        if not re.fullmatch(r"\.?\w[\w.+-]*", name):
            raise PluginError(f"{self.kind} {name!r}: a name has letters, digits, '_', '-', '+' and '.', and no spaces")
        if name in self._items:
            raise PluginError(f"{self.kind} '{name}' is registered already; choose another name")
        self._items[name] = item
        self._names[name] = None
        return item

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        if name not in self._items:
            self._go_home()
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._names:
            self._settle()
        if name not in self._names:
            load_plugins()
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(list(self._names))

    def __len__(self) -> int:
        self._load()
        return len(self._names)

    def _settle(self) -> None:
        if not self._knows_its_names:
            self._go_home()

    def _go_home(self) -> None:
        if self._home:
            importlib.import_module(self._home)

    def _load(self) -> None:
        self._settle()
        load_plugins()


def load_plugins() -> None:
    """Import what the entry points of installed packages name, once.

    Raises
    ------
    PluginError
        If one cannot be imported.
    """
    with _LOADING.lock:
        if _LOADING.done:
            return
        _LOADING.done = True  # modules look names up while they are imported
        try:
            for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
                package = point.dist.name if point.dist else "a package"
                _import(point.module, f"{package} is installed with the plugin", "mend or uninstall it")
        except BaseException:
            _LOADING.done = False
            raise


def import_plugins(run_config: Mapping[str, Any]) -> None:
    """Import the modules that ``run.plugins`` names, separated by commas, before the settings are checked.

    Parameters
    ----------
    run_config : Mapping[str, Any]
        Flower's: dotted keys.

    Raises
    ------
    PluginError
        If one cannot be imported.
    """
    for module in parts(run_config.get(SETTING, "")):
        _import(module, f"{SETTING} names", "it must be importable on the server and on every client")


class _Loading:
    """Whether entry points have been imported."""

    def __init__(self) -> None:
        self.lock, self.done = threading.RLock(), False


_LOADING = _Loading()


def _import(module: str, who: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the code of others does
        raise PluginError(f"{who} {module!r}, which cannot be imported ({_told(error)}); {remedy}") from error


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
