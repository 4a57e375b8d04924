"""Central training: all data in one place, as the reference for federated methods.

There are no clients and no cut. The server reads all training text and takes as many steps in a round as all clients
together would, on batches of the same size. Adapters, optimizer and schedule continue from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp import Grid
from torch import nn

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import Batch, training_batches
from hsplitlora_flwr.data.fit import Cut, fit_text
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.export import save_merged_model
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.limits import update_norm
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.models.parts import WholeModel
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.paths import CHECKPOINTS
from hsplitlora_flwr.planning.round import cost_model
from hsplitlora_flwr.reporting.events import Listener
from hsplitlora_flwr.server.checkpoint import RunState, save_state
from hsplitlora_flwr.server.model import TunedModel
from hsplitlora_flwr.server.records import step_row
from hsplitlora_flwr.server.run import Run
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.client import TrainingRecord
from hsplitlora_flwr.training.memory import PeakMemory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.whole import train_whole


class CentralModel(TunedModel):
    """A model whose adapters train on it where it is.

    Parameters
    ----------
    config, base, state
        As for :class:`~hsplitlora_flwr.server.model.TunedModel`.

    Attributes
    ----------
    optimizer : AdapterOptimizer
        Over what trains.
    parameters : int
        How many numbers that are.
    """

    def __init__(self, config: Config, base: SharedBase, state: RunState | None = None) -> None:
        super().__init__(config, base, state)
        self._part = base.whole()
        trained = self._trainable(self._part)
        self.parameters = sum(parameter.numel() for parameter in trained)
        if config.train.activation_checkpointing == "on":  # no budget asks for it
            checkpoint_blocks(self._part)
        self.optimizer = AdapterOptimizer(trained, config.train)
        if state:
            self.optimizer.restore(state.optimizer)

    def whole(self) -> WholeModel:
        """The model as training has left it."""
        return self._part

    def take_update(self) -> float:
        """Make what training has left the update; returns its norm."""
        update = extract(self._part)
        self.accumulated.replace(update)
        return update_norm(update)

    def save_state(self, server_round: int, folder: Path) -> None:
        """Put adapters, with what the optimizer keeps of them, into a run folder."""
        settings = self._config.to_run_config()
        save_state(RunState(server_round, settings, self.accumulated, optimizer=self.optimizer.tensors()), folder)

    def _trainable(self, part: WholeModel) -> list[nn.Parameter]:
        config, rank = self._config, self._config.lora.rank
        spec = AdapterSpec(rank, config.alpha(rank), config.lora.dropout)
        layers = cost_model(config, config.train.batch_size, config.data.max_length).layers
        return inject(part, {layer.name: spec for layer in layers}, f"{config.run.seed}/all")


class FullModel(CentralModel):
    """A model all of whose weights train; there is no adapter, and the model itself is what is written."""

    has_adapter = False

    def save_state(self, server_round: int, folder: Path) -> None:
        """Put the model into a run folder; its optimizer would be twice as large, and is not kept."""
        self._write(folder / CHECKPOINTS)

    def export(self, folder: Path, *, merged: bool) -> tuple[Sequence[str], dict[str, Any]]:
        """Write the model into a run folder."""
        self._write(folder / "merged")
        return ("merged/config.json", "merged/model.safetensors"), {}

    def _trainable(self, part: WholeModel) -> list[nn.Parameter]:
        return list(part.requires_grad_(True).parameters())

    def _write(self, folder: Path) -> None:
        save_merged_model(self._part.causal_lm, load_tokenizer(self._config.model.path), folder)


@dataclass(frozen=True)
class Central:
    """What the rounds of central training work with: the model, and a batch for every step to come."""

    model: CentralModel
    batches: Iterator[Batch]


class CentralTraining(Run[Central]):
    """LoRA or full fine-tuning on all data, in the server's process.

    Parameters
    ----------
    config, held_out, folder, listeners
        As for :class:`~hsplitlora_flwr.server.run.Run`.
    examples : Sequence[Example]
        All training text.
    """

    def __init__(
        self,
        config: Config,
        held_out: Sequence[Example],
        folder: Path,
        examples: Sequence[Example],
        *,
        listeners: Sequence[Listener] = (),
    ) -> None:
        # the same number of training tokens as the clients would see: their steps, one after another
        train = replace(config.train, steps=config.train.steps * config.clients.count)
        super().__init__(replace(config, train=train), held_out, folder, listeners=listeners)
        self._examples = examples

    def prepare(self, grid: Grid, state: RunState | None, opened: ExitStack) -> Central:
        """Load the model and make what trains."""
        config, train = self.config, self.config.train
        tokens = fit_text(self._examples, config)
        self._report_text(Cut.of(tokens), Cut.of(self.held_out))
        self.report.phase(f"loading {config.model.path}")
        model = config.model
        base = SharedBase(model.path, model.dtype, pick_devices(model.device), model.quantise)
        done = state.server_round * train.steps if state else 0
        batches = training_batches(tokens, train.batch_size, config.run.seed, done)
        return Central((FullModel if self.method.full else CentralModel)(config, base, state), batches)

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """As many steps as all clients together take in a round."""
        model, started = self.loaded.model, time.time()
        with PeakMemory(pick_devices(self.config.model.device)) as memory:
            record = self._train(server_round)
        norm, row = model.take_update(), self._row(record, memory)
        self.report.client_finished(server_round, row)
        self.report.round_finished(server_round, time.time() - started, norm, [row], **model.dropped())
        return MetricRecord({"loss": record.losses[-1], "update-norm": norm, "clients": 1})

    def checkpoint(self, server_round: int) -> None:
        """Put what trained on disk: adapters with what the optimizer keeps of them, or the model."""
        self.loaded.model.save_state(server_round, self.folder)

    def _train(self, server_round: int) -> TrainingRecord:
        train, model = self.config.train, self.loaded.model
        return train_whole(
            model.whole().train(),
            model.optimizer,
            self.loaded.batches,
            first_step=(server_round - 1) * train.steps,
            steps=train.steps,
            micro_batch_size=train.micro_batch_size,
            report=lambda step: self.report.step(**step_row("all", server_round, train, step)),
        )

    def _row(self, record: TrainingRecord, memory: PeakMemory) -> dict[str, Any]:
        """The round as that of one client, who is all of them."""
        return {
            "client": "all",
            "examples": len(self._examples),
            "trainable_parameters": self.loaded.model.parameters,
            "measured_bytes": memory.bytes,
            "host_measured_bytes": memory.host_bytes,
            "predicted_bytes": 0,
            "tokens": record.tokens,
            "label_tokens": record.label_tokens,
            "tokens_per_second": record.tokens / record.seconds,
            "bytes_up": 0,
            "bytes_down": 0,
            "seconds": record.seconds,
            "losses": record.losses,
        }
