"""Important weight identification (HSplitLoRA, section IWI).

The importance of a weight is the resource-normalised gradient-weight product

    I_m = (1 / c_m) * sum over entries of |W_m * dLoss/dW_m|,        c_m = in + out,

on a probe batch; ``c_m`` is what one unit of rank on ``m`` costs in parameters. ``W`` is frozen, so its gradient exists
nowhere: a hook forms it for one layer at a time, reduces it to the scalar and drops it. Each side scores what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.lora.layers import shape_of
from hsplitlora_flwr.models.split import ClientModel, ModelPart


@contextmanager
def scoring(part: ModelPart) -> Iterator[dict[str, float]]:
    """Score the linear layers of ``part`` during the backward passes inside the block.

    Several backward passes add up. Biases and norms are not scored.

    Parameters
    ----------
    part : ModelPart
        Either side, without adapters.

    Yields
    ------
    dict[str, float]
        The importance by absolute layer name; filled by the backward passes.
    """
    scores: dict[str, float] = {}
    hooks = [linear.register_forward_hook(partial(_watch, scores=scores, name=name)) for name, linear in part.linears()]
    if isinstance(part, ClientModel):
        # Nothing on the client is trainable during the probe: gradients flow because the embeddings ask for them.
        part.decoder.enable_input_require_grads()
    try:
        yield scores
    finally:
        if isinstance(part, ClientModel):
            part.decoder.disable_input_require_grads()
        for hook in hooks:
            hook.remove()


def _watch(linear: nn.Module, args: tuple[Any, ...], output: Tensor, *, scores: dict[str, float], name: str) -> None:
    inputs: Tensor = args[0].detach()

    def score(gradient: Tensor) -> None:
        x, g = inputs.flatten(0, -2), gradient.flatten(0, -2)
        # dLoss/dW, one matrix, gone when this returns
        product = torch.mm(x.T, g) if isinstance(linear, Conv1D) else torch.mm(g.T, x)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        product.mul_(weight).abs_()
        scores[name] = scores.get(name, 0.0) + float(product.sum(dtype=torch.float64)) / sum(shape_of(linear))

    if output.requires_grad:
        output.register_hook(score)


def combine(measured: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """The global importance ``J_m = sum_i p_i J_im``, normalised to sum 1 over all weights.

    Parameters
    ----------
    measured : Iterable[tuple[float, Mapping[str, float]]]
        For each client its share ``p_i`` and its importance by absolute layer name, both sides together.
    """
    total: dict[str, float] = {}
    for share, scores in measured:
        for name, score in scores.items():
            total[name] = total.get(name, 0.0) + share * score
    norm = sum(total.values())
    if not norm > 0:
        return {name: 1 / len(total) for name in total}
    return {name: score / norm for name, score in total.items()}
