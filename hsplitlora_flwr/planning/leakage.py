"""Which split points tell too much: the table that an attack wrote for a model, and the floor that it gives a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.planning.budget import PlanError

READABLE = 0.5
"""A cut from which more than this share of the tokens is recovered is warned of."""


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
        """What ``hsplitlora attack`` wrote into ``split.leakage``; None where nothing is named.

        Raises
        ------
        ConfigError
            If there is no such file, or it holds something else.
        """
        if not config.split.leakage:
            return None
        file = Path(config.split.leakage).expanduser()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["recovered"]
            table = {int(split): float(share) for split, share in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"split.leakage={file} is no table of an attack ({type(error).__name__}: {error}); write one with "
                "hsplitlora attack --out FILE"
            ) from error
        if not table or not all(split >= 1 and 0 <= share <= 1 for split, share in table.items()):
            raise ConfigError(f"split.leakage={file} must hold shares from 0 to 1 by split point, and at least one")
        return cls(table)

    def at(self, split: int) -> float:
        """The share at a split point: that of the deepest attacked one up to it, and 1 below all of them."""
        return self.recovered[max(below)] if (below := [known for known in self.recovered if known <= split]) else 1.0

    def warnings(self, splits: Mapping[str, int]) -> list[str]:
        """A line for every client, by name, whose split point leaks more than :data:`READABLE`."""
        return [
            f"client {name} keeps {split} block(s) to itself, behind which an attack recovered {self.at(split):.0%} of "
            "the tokens (split.leakage); split.max_leakage sets a floor"
            for name, split in splits.items()
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
