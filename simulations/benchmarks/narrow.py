"""``narrow``: what narrow numbers on the wire do to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Batch, training_batches
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import load_causal_lm, split_model
from hsplitlora_flwr.models.parts import ServerModel
from hsplitlora_flwr.transport.codecs import pack, unpack
from simulations.benchmarks.common import Row, Setup
from simulations.benchmarks.step import real_rows

WIRES = ("bfloat16", "float16", "int8")
PLAIN = "int8, not rotated"
"""What the wire ``int8`` would be without its rotation."""
BATCH_SIZE = 8


def narrow(setup: Setup) -> Iterator[Row]:
    """The error that the wire makes on real text, against float32, at four split points of an unadapted model.

    All figures are norms of differences over norms; means over the tokens of a batch where a token is named.

    - ``activation``: the cut activation of a token as it arrives. The median, as a few tokens are very large.
    - ``loss``: how far the server's loss moves by that.
    - ``gradient``: how far the gradient of the cut activation moves by that.
    - ``down``: what sending that gradient on the same wire adds to it, a token.
    """
    model, batch = load_causal_lm(setup.model), next(training_batches(real_rows(setup), BATCH_SIZE, seed=0))
    blocks = int(read_config(setup.model).num_hidden_layers)
    ways = {wire: _over(wire) for wire in WIRES} | {PLAIN: _token_scale}
    for split in sorted({max(blocks * part // 30, 1) for part in (1, 7, 15, 25)}):
        client, server = split_model(model, split)
        real = batch.attention_mask.bool()
        with torch.no_grad():
            cut = client(batch.input_ids, batch.attention_mask)
        loss, gradient = _step(server, cut, batch)
        for wire, send in ways.items():
            arrived = send(cut)
            moved, other = _step(server, arrived, batch)
            yield {
                "split": split,
                "wire": wire,
                "activation": float(_errors(arrived, cut)[real].median()),
                "loss": moved / loss - 1,
                "gradient": float((other - gradient)[real].norm() / gradient[real].norm()),
                "down": float(_errors(send(gradient), gradient)[real].nanmean()),
            }


def _over(wire: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: unpack(*pack(tensor, wire), tensor.dtype, "cpu")


def _token_scale(tensor: Tensor) -> Tensor:
    """There and back with one scale for a token, its largest number over 127."""
    scale = (tensor.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(tensor.dtype).tiny)
    return (tensor / scale).round() * scale


def _errors(there: Tensor, here: Tensor) -> Tensor:
    """Of every token, ``(batch, seq)``; nan where it is zero."""
    errors: Tensor = (there - here).norm(dim=-1) / here.norm(dim=-1)
    return errors


def _step(server: ServerModel, cut: Tensor, batch: Batch) -> tuple[float, Tensor]:
    leaf = cut.detach().requires_grad_()
    loss = server(leaf, batch.attention_mask, batch.labels).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient
