"""``probe``: what scoring the weights costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import inject, shape_of
from hsplitlora_flwr.models.loading import load_causal_lm, split_model
from hsplitlora_flwr.models.parts import ClientModel, ServerModel
from hsplitlora_flwr.planning import scoring
from hsplitlora_flwr.planning.trace import LiveBytes
from simulations.benchmarks.common import SHAPES, Row, Setup, specs, spread_batches, take_turns, timed

TURNS = 7


def probe(setup: Setup) -> Iterator[Row]:
    """A step that scores the weights against a training step with adapters on all of them: it keeps the same inputs.

    Both take turns in this process. Times are medians, and ``spread`` is the distance between the quartiles of
    ``extra time``.
    """
    rows, length = SHAPES[0]
    model = load_causal_lm(setup.model)
    blocks = int(model.config.num_hidden_layers)
    split = max(blocks // 3, 1)
    batch = next(spread_batches(rows, length, int(model.config.vocab_size)))
    for side in (0, 1):
        trained, scored = (split_model(model, split)[side].train() for _ in range(2))
        shapes = [shape_of(linear) for _, linear in scored.linears()]
        inject(trained, specs(name for name, _ in trained.linears()), "")
        steps = partial(_step, trained, batch), partial(_scoring_step, scored, batch)
        training, probing = take_turns([partial(timed, step) for step in steps], TURNS)
        ratio = probing / training
        peaks = [_peak_bytes(trained, _step, batch), _peak_bytes(scored, _scoring_step, batch)]
        yield {
            "side": ("client", "server")[side],
            "blocks": (split, blocks - split)[side],
            "training_s": training.median,
            "probe_s": probing.median,
            "extra time": ratio.median - 1,
            "spread": ratio.spread,
            "training_peak_mb": peaks[0] / 1e6,
            "probe_peak_mb": peaks[1] / 1e6,
            "extra memory / largest matrix": (peaks[1] - peaks[0]) / (4 * max(m * n for m, n in shapes)),
        }


def _step(part: ClientModel | ServerModel, batch: Batch) -> None:
    """A forward and a backward pass."""
    if isinstance(part, ClientModel):
        cut = part(batch.input_ids, batch.attention_mask)
        cut.backward(torch.ones_like(cut))
    else:
        cut = torch.ones(*batch.input_ids.shape, int(part.decoder.config.hidden_size), requires_grad=True)
        part(cut, batch.attention_mask, batch.labels).loss.backward()


def _scoring_step(part: ClientModel | ServerModel, batch: Batch) -> None:
    with scoring(part):
        _step(part, batch)


def _peak_bytes(
    part: ClientModel | ServerModel, step: Callable[[ClientModel | ServerModel, Batch], None], batch: Batch
) -> int:
    """Most bytes of tensors in a step, weights and accumulated gradients apart."""
    parameters = list(part.parameters())
    live = LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    with live:
        step(part, batch)
    return live.peak
