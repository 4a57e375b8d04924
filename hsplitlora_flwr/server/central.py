"""Training with all data in one place: what federated methods are measured against.

No client takes part and nothing is cut: the server reads all training text and takes as many steps in a round as all
clients together would, on batches of the same size. Adapters, optimizer and schedule go on from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import MetricRecord
from flwr.serverapp import Grid

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import training_batches
from hsplitlora_flwr.data.fit import Cut, fit_text
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.export import save_merged_model
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.limits import update_norm
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.models.split import WholeModel
from hsplitlora_flwr.planning.round import cost_model
from hsplitlora_flwr.reporting.events import Listener
from hsplitlora_flwr.server.checkpoint import CHECKPOINTS, RunState, save_state
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.training.memory import PeakMemory
from hsplitlora_flwr.training.recompute import recompute_blocks
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import StepReport
from hsplitlora_flwr.training.whole import train_whole


class CentralTraining(HSplitLoRA):
    """LoRA or full fine-tuning on all data, in the server's process.

    Parameters
    ----------
    config, held_out, folder, listeners
        As for :class:`HSplitLoRA`.
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

    def prepare(self, grid: Grid) -> None:
        """Load the model and make what trains."""
        config, train = self.config, self.config.train
        self._read_held_out()
        rows = fit_text(self._examples, config)
        self._report_text(Cut.of(rows))
        self.report.status(f"loading {config.model.path}")
        model = config.model
        self.base = SharedBase(model.path, model.dtype, pick_devices(model.device), model.quantise)
        done = self._resumed.server_round * train.steps if self._resumed else 0
        self._batches = training_batches(rows, train.batch_size, config.run.seed, done)
        self._model = self.base.whole()
        if self.method.full:
            trained = list(self._model.requires_grad_(True).parameters())
        else:
            rank = config.lora.rank
            spec = AdapterSpec(rank, config.alpha(rank), config.lora.dropout)
            layers = cost_model(config, train.batch_size, config.data.max_length).layers
            trained = inject(self._model, {layer.name: spec for layer in layers}, f"{config.run.seed}/all")
        if train.activation_checkpointing == "on":  # no budget asks for it
            recompute_blocks(self._model)
        self._optimizer = AdapterOptimizer(trained, train)
        if self._resumed:
            self._optimizer.restore(self._resumed.optimizer)
        self._trained = sum(parameter.numel() for parameter in trained)

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """As many steps as all clients together take in a round."""
        train, started = self.config.train, time.time()
        first_step = (server_round - 1) * train.steps

        def report(step: StepReport) -> None:
            self.report.step(
                round=server_round,
                rounds=train.rounds,
                client="all",
                step=step.step - first_step + 1,
                steps=train.steps,
                loss=step.loss,
                tokens=step.label_tokens,
                all_tokens=step.tokens,
            )

        with PeakMemory() as memory:
            record = train_whole(
                self._model.train(),
                self._optimizer,
                self._batches,
                first_step=first_step,
                steps=train.steps,
                micro_batch_size=train.micro_batch_size,
                report=report,
            )
        update = extract(self._model)
        self.delta.replace(update)
        norm = update_norm(update)
        row = {
            "client": "all",
            "examples": len(self._examples),
            "trainable_parameters": self._trained,
            "measured_bytes": memory.bytes,
            "predicted_bytes": 0,
            "tokens": record.tokens,
            "label_tokens": record.label_tokens,
            "tokens_per_second": record.tokens / record.seconds,
            "bytes_up": 0,
            "bytes_down": 0,
            "seconds": record.seconds,
            "losses": record.losses,
        }
        self.report.client_finished(server_round, row)
        self.report.round_finished(server_round, time.time() - started, norm, [row], **self._dropped())
        return MetricRecord({"loss": record.losses[-1], "update-norm": norm, "clients": 1})

    def checkpoint(self, server_round: int) -> None:
        """Put what trained on disk: adapters with what the optimizer keeps of them, or the model."""
        if self.method.full:
            save_merged_model(self._model.causal_lm, load_tokenizer(self.config.model.path), self.folder / CHECKPOINTS)
            return
        settings = self.config.to_run_config()
        save_state(RunState(server_round, settings, self.delta, optimizer=self._optimizer.tensors()), self.folder)

    def keep_best(self, server_round: int) -> None:
        """As elsewhere; full fine-tuning has no adapter to keep."""
        if not self.method.full:
            super().keep_best(server_round)

    def export(self) -> None:
        """Write the adapter; after full fine-tuning there is none, and the model itself is written."""
        if not self.method.full:
            super().export()
            return
        self.report.status("writing the model")
        save_merged_model(self._model.causal_lm, load_tokenizer(self.config.model.path), self.folder / "merged")
        self.report.finished(("merged/config.json", "merged/model.safetensors"))

    def _global_model(self) -> WholeModel:
        return self._model
