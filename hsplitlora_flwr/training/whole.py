"""Training a model that is not cut, for methods without a split: forward, loss, backward and step in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from hsplitlora_flwr.copies import to_device, to_numbers
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import draw_masks
from hsplitlora_flwr.models.parts import WholeModel
from hsplitlora_flwr.training.client import TrainingRecord
from hsplitlora_flwr.training.memory import RoomForPeaks
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import StepReport


def train_whole(
    model: WholeModel,
    optimizer: AdapterOptimizer,
    batches: Iterator[Batch],
    *,
    first_step: int,
    steps: int,
    micro_batch_size: int = 0,
    report: Callable[[StepReport], None] = lambda _: None,
) -> TrainingRecord:
    """Train a whole model for ``steps`` steps; the same step as :func:`hsplitlora_flwr.training.client.train_client`.

    Parameters
    ----------
    model : WholeModel
        With its adapters, or with weights that train.
    optimizer : AdapterOptimizer
        Over those.
    batches : Iterator[Batch]
        One per step.
    first_step, steps : int
        Global step of the first batch, and the number of steps.
    micro_batch_size : int
        Rows of one forward pass; gradients accumulate over the batch. 0 = the whole batch.
    report : Callable[[StepReport], None], optional
        Called after every step.
    """
    record = TrainingRecord()
    started = time.perf_counter()
    device, room = model.device, RoomForPeaks()
    for step in range(first_step, first_step + steps):
        batch = next(batches)
        room.make_for(batch)
        losses: list[Tensor] = []
        for index, micro in enumerate(batch.micro_batches(micro_batch_size) if micro_batch_size else [batch]):
            draw_masks(model, step, index)
            ids, mask = (to_device(each, device) for each in (micro.input_ids, micro.attention_mask))
            output = model(ids, mask, micro.labels, batch.label_tokens)
            output.loss.backward()
            losses.append(output.loss.detach())
        optimizer.step(step, optimizer.grad_norm())
        loss, tokens = sum(to_numbers(*losses)), int(batch.attention_mask.sum())
        record.losses.append(loss)
        record.label_tokens += batch.label_tokens
        record.tokens += tokens
        report(StepReport(step, loss, batch.label_tokens, tokens))
    record.seconds = time.perf_counter() - started
    return record
