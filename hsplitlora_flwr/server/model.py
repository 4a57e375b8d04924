"""The model that a run trains, between rounds: loading, measuring, exporting and checkpointing it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors, SharedUpdate, Update, aggregate, directions, residual, truncate
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.export import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    TOLERANCE,
    at_rank,
    save_merged_model,
    save_peft_adapter,
)
from hsplitlora_flwr.lora.kept import KeptHalf
from hsplitlora_flwr.lora.layers import AdapterSpec, start_along
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change, with_adapter
from hsplitlora_flwr.methods import METHODS, keeps_half, starts_along_update
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.models.parts import WholeModel
from hsplitlora_flwr.reporting.card import CARD_FILE
from hsplitlora_flwr.server.checkpoint import RunState


def files_of(folder: str) -> list[str]:
    """The files in the folder of an adapter, relative to the run folder."""
    return [f"{folder}/{name}" for name in (ADAPTER_FILE, "adapter_config.json", MANIFEST_FILE, CARD_FILE)]


class TunedModel:
    """A frozen base and the update that training has made so far.

    Parameters
    ----------
    config : Config
    base : SharedBase
    state : RunState, optional
        What an earlier run left; without one the update is empty.

    Attributes
    ----------
    has_adapter : bool
        Whether the update is written as an adapter; else the model itself is.
    """

    has_adapter = True

    def __init__(self, config: Config, base: SharedBase, state: RunState | None = None) -> None:
        self.base = base
        self.accumulated = state.accumulated if state else AccumulatedUpdate(config.lora.rank_cap)
        self._config = config

    def changes(self) -> Mapping[str, Change]:
        """The whole change of the model, by absolute layer name."""
        return self.accumulated.changes()

    def whole(self) -> WholeModel:
        """All of it, to be measured; no client may be training."""
        self.base.update(self.changes())
        return self.base.whole()

    def save_adapter(self, folder: Path) -> None:
        """Write the update as a PEFT adapter."""
        self._save(self.changes(), folder)

    def save_at_rank(self, rank: int, folder: Path) -> tuple[WholeModel, float]:
        """Write the best approximation of the update of at most a rank, and compute with that from here on.

        Returns
        -------
        tuple[WholeModel, float]
            The model with it, to be measured, and what it lost, as of :func:`~hsplitlora_flwr.lora.export.at_rank`.
        """
        changes, dropped = at_rank(self.changes(), rank)
        self._save(changes, folder)
        self.base.update(changes)
        return self.base.whole(), dropped

    def _save(self, changes: Mapping[str, Change], folder: Path) -> None:
        save_peft_adapter(changes, folder, self.base.model, self._config.model.path, self.base.inside)

    def dropped(self) -> dict[str, float]:
        """The energy that the last round lost to ``lora.rank_cap``, for the summary; empty without a cap."""
        return {"dropped_energy": self.accumulated.dropped} if self._config.lora.rank_cap else {}

    def export(self, folder: Path, *, merged: bool) -> tuple[Sequence[str], dict[str, Any]]:
        """Write into a run folder what the run leaves; returns the files, and what the summary says of them.

        Parameters
        ----------
        folder : Path
            The run folder.
        merged : bool
            The model with the update in its weights too; nothing is to be done with this one after.
        """
        self.save_adapter(folder / "adapter")
        if merged:
            save_merged_model(self.base.merged(), load_tokenizer(self._config.model.path), folder / "merged")
        return files_of("adapter"), {"adapter": {"folder": "adapter", "relative_error": TOLERANCE}}


@dataclass(frozen=True)
class TrainedHalf:
    """The shared half after a round; empty if each client has a half of its own.

    Parameters
    ----------
    adapters : Update
        As they ended, ``(B, s A)`` by absolute layer name.
    tensors : Mapping[str, Tensor]
        The same with their optimizer; see :meth:`hsplitlora_flwr.training.half.SharedHalf.tensors`.
    trained_by : Mapping[str, Collection[int]]
        The clients that trained each, as indices into the updates of the round.
    """

    adapters: Update = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    trained_by: Mapping[str, Collection[int]] = field(default_factory=dict)

    def of(self, client: int) -> Update:
        """Those adapters that a client of the round trained, by its index."""
        return {name: self.adapters[name] for name, clients in self.trained_by.items() if client in clients}


class FederatedModel(TunedModel):
    """A tuned model, and all that adapters of the next round start from.

    By the method, an adapter starts afresh, along the update of the last round, or as the global adapter. Of a half
    that all clients share it may go on instead, with its optimizer (:mod:`hsplitlora_flwr.lora.kept`).

    Attributes
    ----------
    adapter : dict[str, Factors]
        The global adapter, or the directions of the last update, by layer name; layers that are absent start afresh.
    kept : KeptHalf
        What the shared half goes on from.
    """

    def __init__(self, config: Config, base: SharedBase, state: RunState | None = None) -> None:
        super().__init__(config, base, state)
        self._method, self._keeps = METHODS[config.method.name], keeps_half(config)
        self._along = max(*config.lora.ranks, config.lora.rank) if starts_along_update(config) else 0
        self.adapter: dict[str, Factors] = dict(state.start) if state else {}
        self.kept = KeptHalf(state.optimizer if state and self._keeps else None)

    def changes(self) -> Mapping[str, Change]:
        """With the global adapter, where that stands beside the accumulated update and is no part of it."""
        changes = self.accumulated.changes()
        if not self._method.residual:
            return changes
        return {**changes, **{name: with_adapter(changes.get(name), pair) for name, pair in self.adapter.items()}}

    def start(self, specs: Mapping[str, AdapterSpec]) -> dict[str, Factors]:
        """What adapters start from, cut to their ranks, by absolute layer name; others start afresh."""
        start = {name: truncate(self.adapter[name], spec.rank) for name, spec in specs.items() if name in self.adapter}
        if self._method.keeps_global_adapter:
            return start
        return {name: start_along(factors, specs[name]) for name, factors in start.items()}

    def begin_round(self, half: Mapping[str, AdapterSpec]) -> None:
        """Let the base compute what the adapters of a round train over: the update without what they have of it.

        Parameters
        ----------
        half : Mapping[str, AdapterSpec]
            Adapters of the half that the clients share; none where each has one of its own.
        """
        self.kept.begin(half)
        self.base.update({} if self._method.keeps_global_adapter else self.kept.beside(self.accumulated))

    def add_round(self, updates: Sequence[Update], shares: Sequence[float], half: TrainedHalf) -> Update:
        """Add the clients' updates and their shared half up, by the method's rule; returns the sum.

        Parameters
        ----------
        updates : Sequence[Update]
            Of the clients, with their own halves.
        shares : Sequence[float]
            The weights ``p_i``.
        half : TrainedHalf
        """
        shared = SharedUpdate(half.adapters, half.trained_by)
        if not self._method.keeps_global_adapter:  # what goes on has been in the update all along
            shared = self.kept.update(half.adapters, half.trained_by)
        update = aggregate(updates, shares, self._method.rule, shared)
        wholes = self._keep(half, len(updates)) if self._keeps else {}
        if self._method.residual:
            self.accumulated.add(residual(updates, shares, update))
        elif self._method.keeps_global_adapter:
            self.accumulated.replace(update)
        else:
            self.accumulated.add(update, wholes)
        if self._method.keeps_global_adapter:
            self.adapter = update
        elif self._along:
            self.adapter = {name: directions(factors, self._along) for name, factors in update.items()}
        return update

    def _keep(self, half: TrainedHalf, clients: int) -> dict[str, Change]:
        """Let the next round go on from the half; returns the whole change of layers that all clients trained."""
        settled = {name for name, trained in half.trained_by.items() if len(trained) == clients}
        tensors = half.tensors
        if (
            self._method.keeps_global_adapter
        ):  # elsewhere the global adapter is a mean, and not what the optimizer moved
            tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(":")[0] in settled}
        return self.kept.end(tensors, half.adapters, settled)
