"""What a comparison compares: methods, client settings, seeds and learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hsplitlora_flwr.config import ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.schema import scalar

EACH = "each"
CHOSEN_HERE = ("experiment", "method", "method.name", "run.seed", "run.dir", "train.lr")
"""What is set for every run, and so not by the user."""


@dataclass(frozen=True)
class Options:
    """What is compared. ``hsplitlora compare --help`` says what each one means.

    Raises
    ------
    ConfigError
        If a value is not allowed.
    """

    settings: tuple[str, ...] = ("heterogeneous", "homogeneous")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (1, 2, 3)
    leaders: tuple[str, ...] = ()
    more_seeds: tuple[int, ...] = ()
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tune_in: str = "heterogeneous"
    tune_seed: int = 0
    tune_rows: int = 0
    tune_rounds: int = 0
    widen: int = 2
    target: float | str = "splitlora"
    out: Path = Path("runs/compare")
    work: Path = Path("runs/compare-work")
    keep: bool = False
    at_once: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("settings", "methods", "all_seeds", "lrs"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name.removeprefix('all_')}={scalar(values)} must name one or more, each once")
        if unknown := [method for method in self.leaders if method not in self.methods]:
            raise ConfigError(f"--leaders: {', '.join(unknown)} is not among --methods")
        if self.at_once < 0:
            raise ConfigError(f"--at-once={self.at_once} must be at least 1, or 0 for as many as the machine holds")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ConfigError(f"--methods: unknown {', '.join(unknown)}; known: {', '.join(METHODS)}")
        if isinstance(self.target, str) and self.target not in self.methods:
            raise ConfigError(f"--target={self.target} is not among --methods; add it there, or give a perplexity")
        if not isinstance(self.target, str) and not 0 < self.target < math.inf:
            raise ConfigError(f"--target={self.target!r} must be a perplexity above 0, or a method")
        if not all(0 < rate < math.inf for rate in self.lrs):
            raise ConfigError(f"--lrs={scalar(self.lrs)} must be numbers above 0")
        if min(*self.all_seeds, self.tune_seed, self.tune_rows, self.tune_rounds, self.widen) < 0:
            raise ConfigError("seeds, --tune-rows, --tune-rounds and --widen must be at least 0")
        if self.tuned and self.tune_seed in self.all_seeds:
            raise ConfigError(
                f"--tune-seed={self.tune_seed} is among --seeds; choose another, so that no run reports it"
            )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Those of every method, and those of the leaders alone."""
        return (*self.seeds, *self.more_seeds)

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds of a method."""
        return self.all_seeds if method in self.leaders else self.seeds

    @property
    def tuned(self) -> bool:
        """There is a choice between learning rates."""
        return len(self.lrs) > 1

    @property
    def tuning_settings(self) -> tuple[str, ...]:
        """The settings in which learning rates are chosen."""
        if not self.tuned:
            return ()
        return self.settings if self.tune_in == EACH else (self.tune_in,)

    @property
    def all_settings(self) -> tuple[str, ...]:
        """Those that are compared and those in which learning rates are chosen."""
        return tuple(dict.fromkeys((*self.settings, *self.tuning_settings)))

    def tuning_setting(self, setting: str) -> str:
        """The setting in which the learning rates of ``setting`` are chosen."""
        return setting if self.tune_in == EACH else self.tune_in
