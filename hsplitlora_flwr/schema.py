"""How a setting is declared: once, as a typed field of a section, with its meaning, unit and bounds.

::

    @dataclass(frozen=True)
    class TrainConfig:
        lr: float = setting(1e-3, "peak learning rate", ge=0)
        schedule: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate by global step")
        optimizer: Annotated[str, OneOf(KNOWN_OPTIMIZERS)] = setting("adamw", "optimizer of the adapters")

Pydantic checks the values of a section against its types and bounds. What Flower carries, what the help prints and what
an error says of a setting follow from the same field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

Scalar = int | float | bool | str
"""What Flower's run config holds."""

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_LARGEST = 2**63 - 1
_OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"}


class ConfigError(ValueError):
    """A configuration value is unknown, of the wrong type or out of range. The text names key, value and remedy."""


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that there is not, with the one that may be meant, else with all."""
    known = sorted(known)
    alike = [each for each in known if each.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return ConfigError(
        f"unknown key '{key}'; " + (f"did you mean {alike[0]}?" if alike else f"known keys: {', '.join(known)}")
    )


def setting(default: Any, meaning: str, *, unit: str = "", **bounds: float) -> Any:
    """A field of a section.

    Parameters
    ----------
    default : Any
        Of the field's type; lists of values are tuples.
    meaning : str
        What it sets, and what special values do.
    unit : str
        Of the number.
    **bounds : float
        ``ge``, ``gt``, ``le`` or ``lt``, as pydantic's fields take them.
    """
    rules: dict[str, Any] = dict(bounds)
    if isinstance(default, bool | int | float):
        rules["strict"] = True  # 1.5 is no int, and True no number
    if type(default) is int:
        rules = {"le": _LARGEST, **rules}
    if type(default) is float:
        rules["allow_inf_nan"] = False
    return field(default=default, metadata={"description": meaning, "unit": unit, **rules})


@dataclass(frozen=True, eq=False)
class OneOf:
    """Marks a text that is one of some names, which are asked for when a value is checked: more may be registered.

    Parameters
    ----------
    names : Collection of str
        Such as a :class:`~hsplitlora_flwr.registry.Registry`.
    """

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names:
            raise ValueError(_not_among(self.names))
        return value


def parts(value: Any) -> Any:
    """Comma-separated text, or one number, as a tuple: how lists come through Flower and a command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if type(value) in (int, float) else value


Listed = BeforeValidator(parts)
"""Marks a tuple that may be written as comma-separated text."""


def scalar(value: Any) -> Scalar:
    """A value as Flower carries it: a tuple is comma-separated text."""
    carried: Scalar = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return carried


@dataclass(frozen=True)
class Setting:
    """What a section's field declares.

    Parameters
    ----------
    key : str
        ``section.name``.
    kind : Any
        Its type, with what marks it.
    default : Any
    meaning, unit : str
    bounds : Mapping[str, float]
        By pydantic's names.
    """

    key: str
    kind: Any
    default: Any
    meaning: str
    unit: str
    bounds: Mapping[str, float]

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that it may be, as of now; empty where other things say what is allowed."""
        if get_origin(self.kind) is Literal:
            return get_args(self.kind)
        marks = get_args(self.kind)[1:] if get_origin(self.kind) is Annotated else ()
        return tuple(name for mark in marks if isinstance(mark, OneOf) for name in mark.names)

    @property
    def rules(self) -> tuple[str, ...]:
        """What its values are and may be, in words."""
        choices = f"one of {', '.join(self.choices)}" if self.choices else ""
        return tuple(filter(None, (f"in {self.unit}" if self.unit else "", self.range, choices)))

    @property
    def range(self) -> str:
        """Its bounds in words, without those that come from Flower alone."""
        return _range({name: bound for name, bound in self.bounds.items() if bound != _LARGEST})


def settings_of(name: str, section: Any) -> tuple[Setting, ...]:
    """The settings of a section, in order."""
    hints = get_type_hints(section, include_extras=True)
    return tuple(
        Setting(
            key=f"{name}.{each.name}",
            kind=hints[each.name],
            default=each.default,
            meaning=each.metadata["description"],
            unit=each.metadata["unit"],
            bounds={bound: each.metadata[bound] for bound in _BOUNDS if bound in each.metadata},
        )
        for each in dataclasses.fields(section)
    )


def checked(name: str, section: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a section with these values, of the right types.

    Raises
    ------
    ConfigError
        If a value is of the wrong type, out of range or not among the choices.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return _adapter(section).validate_python(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = f"{name}.{problem['loc'][0]}"
        [setting] = (each for each in settings_of(name, section) if each.key == key)
        raise ConfigError(_explained(setting, values[str(problem["loc"][0])], problem)) from None


@cache
def _adapter(section: Any) -> TypeAdapter[Any]:
    return TypeAdapter(section)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


_LONGEST = 400
"""How much of a wrong value an error shows."""


def _explained(setting: Setting, value: Any, problem: ErrorDetails) -> str:
    said = f"{setting.key}={scalar(value)!r}"
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    if problem["type"] == "value_error":
        return f"{said} {problem['ctx']['error']}"
    if len(problem["loc"]) > 1:  # an item of a list
        if problem["type"] in _OUT_OF_RANGE:
            return f"{said} must hold numbers {_range(problem.get('ctx', {})) or 'that are finite'}"
        return f"{said} must be {problem['type'].partition('_')[0]}s separated by commas"
    if problem["type"] == "literal_error":
        return f"{said} {_not_among(setting.choices)}"
    if problem["type"] not in _OUT_OF_RANGE:
        kind = "text separated by commas" if isinstance(setting.default, tuple) else _KINDS[type(setting.default)]
        return f"{said} is of type {type(value).__name__}; it must be {kind}"
    if math.isfinite(value) and abs(value) > _LARGEST:
        return f"{said} is out of range; Flower carries whole numbers of 64 bits"
    finite = "finite and " if isinstance(setting.default, float) else ""
    return f"{said} is out of range; it must be {finite}{setting.range}"


def _range(bounds: Mapping[str, float]) -> str:
    return " and ".join(f"{word} {bounds[name]:.15g}" for name, word in _BOUNDS.items() if name in bounds)


def _not_among(names: Iterable[str]) -> str:
    return f"is not allowed; choose one of {', '.join(names)}"
