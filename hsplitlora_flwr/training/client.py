"""The client's side of split fine-tuning: forward to the cut, send, receive the gradient, backward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.delta import Change
from hsplitlora_flwr.lora.layers import attach_changes, merge_changes, takes_changes
from hsplitlora_flwr.models.loading import load_causal_lm, load_client_model
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import ClientModel, ModelPart, WholeModel, whole_model
from hsplitlora_flwr.training.memory import trim_heap
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import Activation, Finish, Frame, Gradient

P = TypeVar("P", bound=ModelPart)


class Link(Protocol):
    """What carries frames to the server and its answers back."""

    def exchange(self, frame: Frame) -> Frame:
        """Send a frame and wait for its answer."""


@dataclass
class TrainingRecord:
    """What a client's round was: a loss per step, labelled and real tokens, seconds."""

    losses: list[float] = field(default_factory=list)
    label_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


def load_client(path: str, split: int, dtype: str, device: str, changes: Mapping[str, Change]) -> ClientModel:
    """The client's part with the accumulated update: in the weights where they are fp32, else beside them.

    Parameters
    ----------
    path, split, dtype, device
        As for :func:`hsplitlora_flwr.models.load_client_model`.
    changes : Mapping[str, Change]
        The update by absolute layer name.
    """
    return _with_changes(load_client_model(path, split, dtype, device), changes)


def load_whole(path: str, dtype: str, device: str, changes: Mapping[str, Change]) -> WholeModel:
    """The whole model with the accumulated update, for methods that do not split; parameters as above."""
    model = load_causal_lm(path, dtype, device)
    return _with_changes(whole_model(model, find_family(model.config)), changes)


def _with_changes(model: P, changes: Mapping[str, Change]) -> P:
    if takes_changes(model.dtype):
        weights = dict(model.linears())
        merge_changes(model, changes, lambda name: cast(Tensor, weights[name].weight))
    else:
        attach_changes(model, changes)
    return model


def train_client(
    model: ClientModel,
    optimizer: AdapterOptimizer,
    batches: Iterator[Batch],
    link: Link,
    *,
    first_step: int,
    steps: int,
    micro_batch_size: int = 0,
    wire: torch.dtype = torch.float32,
) -> TrainingRecord:
    """Train the client's adapters for ``steps`` steps, together with the server behind ``link``.

    Parameters
    ----------
    model : ClientModel
        The client's part, with its adapters; none during a probe.
    optimizer : AdapterOptimizer
        Over those adapters.
    batches : Iterator[Batch]
        One per step.
    link : Link
        To the server.
    first_step : int
        Global step of the first batch.
    steps : int
        Number of steps.
    micro_batch_size : int
        Rows that travel at once; gradients accumulate over the batch. 0 = the whole batch.
    wire : torch.dtype
        Dtype of the cut activation on the wire.
    """
    record = TrainingRecord()
    started = time.perf_counter()
    device = next(model.parameters()).device
    square, largest = 0.0, 0
    for step in range(first_step, first_step + steps):
        batch = next(batches)
        if batch.input_ids.numel() > largest:  # about to set a new peak: without the leftovers of smaller batches
            largest = batch.input_ids.numel()
            trim_heap()
        micro_batches = batch.micro_batches(micro_batch_size) if micro_batch_size else [batch]
        loss, server_square = 0.0, 0.0
        for index, micro in enumerate(micro_batches):
            cut = model(micro.input_ids.to(device), micro.attention_mask.to(device))
            answer = link.exchange(
                Activation(
                    step=step,
                    cut=cut.detach().to(wire),
                    attention_mask=micro.attention_mask,
                    labels=micro.labels,
                    label_tokens=batch.label_tokens,
                    last=index == len(micro_batches) - 1,
                    previous_square=square,
                )
            )
            assert isinstance(answer, Gradient)
            if cut.requires_grad:  # not when no block of the client has an adapter
                cut.backward(answer.gradient.to(cut.device, cut.dtype))
            loss += answer.loss
            server_square = answer.square
        square = optimizer.square()
        optimizer.step(step, server_square)
        record.losses.append(loss)
        record.label_tokens += batch.label_tokens
        record.tokens += int(batch.attention_mask.sum())
    link.exchange(Finish(square))
    record.seconds = time.perf_counter() - started
    return record
