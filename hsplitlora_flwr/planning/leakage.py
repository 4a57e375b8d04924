"""Which split points tell too much: the table that an attack wrote for a model, and the floor that it gives a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsplitlora_flwr.config import Config, ConfigError, ModelConfig
from hsplitlora_flwr.planning.budget import PlanError

READABLE = 0.5
"""A cut from which more than this share of the tokens is recovered is warned of."""
DEMONSTRATION = {1: 0.90, 2: 0.88, 4: 0.82, 8: 0.72, 15: 0.67, 22: 0.63, 29: 0.49}
"""Of the demonstration model and the dialogues, as docs/privacy.md has it: known without an attack of one's own."""
PROTECTIONS = ("clip", "noise", "width")
"""Settings of the section ``split`` under which a table was made."""


@dataclass(frozen=True)
class LeakageTable:
    """What a curious server recovered at the split points that were attacked.

    Parameters
    ----------
    recovered : Mapping[int, float]
        Share of the tokens that the strongest attack named right, by split point.
    """

    recovered: Mapping[int, float]

    @classmethod
    def of(cls, config: Config) -> LeakageTable | None:
        """What ``hsplitlora attack`` wrote into ``split.leakage``; what is known of the demonstration model where
        nothing is named, and None of others, or where clients protect what they send.

        Raises
        ------
        ConfigError
            If there is no such file, or it holds something else, or was made under other protections.
        """
        protections = {name: getattr(config.split, name) for name in PROTECTIONS}
        if not config.split.leakage:
            known = config.model.path == ModelConfig().path and not any(protections.values())
            return cls(DEMONSTRATION) if known else None
        file = Path(config.split.leakage).expanduser()
        try:
            page = json.loads(file.read_text(encoding="utf-8"))
            table = {int(split): float(share) for split, share in page["recovered"].items()}
            made = {name: page.get(name, 0) for name in PROTECTIONS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"split.leakage={file} is no table of an attack ({type(error).__name__}: {error}); write one with "
                "hsplitlora attack --out FILE"
            ) from error
        if not table or not all(split >= 1 and 0 <= share <= 1 for split, share in table.items()):
            raise ConfigError(f"split.leakage={file} must hold shares from 0 to 1 by split point, and at least one")
        for name, value in protections.items():
            if made[name] != value:
                raise ConfigError(
                    f"split.leakage={file} was made with split.{name}={made[name]:g}, and the run has "
                    f"split.{name}={value:g}; attack what clients send: hsplitlora attack split.{name}={value:g}"
                )
        return cls(table)

    def at(self, split: int) -> float:
        """The share at a split point: that of the deepest attacked one up to it, and 1 below all of them."""
        return self.recovered[max(below)] if (below := [known for known in self.recovered if known <= split]) else 1.0

    def warnings(self, splits: Mapping[str, int]) -> list[str]:
        """A line for every split point that leaks more than :data:`READABLE`, with the clients that have it."""
        clients: dict[int, list[str]] = {}
        for name, split in splits.items():
            clients.setdefault(split, []).append(name)
        return [
            f"behind {split} block(s), which {_whose(names)}, an attack recovered {self.at(split):.0%} of "
            "the tokens; docs/privacy.md says what to do"
            for split, names in sorted(clients.items())
            if self.at(split) > READABLE
        ]

    def floor(self, limit: float) -> int:
        """The lowest split point from which on no attacked one leaks more than ``limit``.

        Raises
        ------
        PlanError
            If the deepest one still does.
        """
        floor = 0
        for split in sorted(self.recovered, reverse=True):
            if self.recovered[split] > limit:
                break
            floor = split
        if not floor:
            deepest = max(self.recovered)
            raise PlanError(
                f"split.max_leakage={limit:g}: even behind block {deepest - 1} {self.recovered[deepest]:.0%} of the "
                "tokens were recovered; raise it, or attack deeper splits"
            )
        return floor


def _whose(names: Sequence[str]) -> str:
    """Who keeps them, by the first names of a list that may be long."""
    if len(names) == 1:
        return f"client {names[0]} keeps"
    shown = ", ".join(names[:3])
    return f"clients {shown} and {len(names) - 3} more keep" if len(names) > 3 else f"clients {shown} keep"
