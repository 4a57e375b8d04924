"""Important weight identification (HSplitLoRA, section IWI; METHOD.md, section 1).

The importance of a weight is the resource-normalised gradient-weight product

    I_m = (1 / c_m) * sum over entries of |W_m * dLoss/dW_m|

on a probe batch; ``c_m`` is what one unit of rank on ``m`` costs. ``W`` is frozen, so its gradient exists nowhere: a
hook forms it a few rows at a time, reduces them to a number and drops them. Each side scores what it holds. The scores
of all clients make the global importance (:func:`combine`), which is smoothed over rounds (:func:`smooth`) and compared
with the one that the plan was made for (:func:`drift`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hsplitlora_flwr.lora.layers import AdaptedLinear, dense_weight, shape_of
from hsplitlora_flwr.models.split import ClientModel, ModelPart

ROWS = 1024
"""Rows of ``dLoss/dW`` that exist at a time: few beside the matrix of a large model, enough for a fast product."""


@contextmanager
def scoring(part: ModelPart, resource: str = "parameters", rank: int = 8) -> Iterator[dict[str, float]]:
    """Score the linear layers of ``part`` during the backward passes inside the block.

    The scores of several backward passes add up. ``|W * gradient|`` is not additive over parts of a batch: the scores
    of its micro-batches sum to at least the score of the whole, so a probe takes its batches whole. Biases and norms
    are not scored.

    ``W`` is the frozen weight with the accumulated update, merged or attached, and without an adapter in training. Such
    an adapter takes part in the forward and backward passes, so the gradient is that of the adapted model.

    Parameters
    ----------
    part : ModelPart
        Either side, with or without adapters.
    resource, rank
        What ``c_m`` counts; as for :func:`unit_cost`.

    Yields
    ------
    dict[str, float]
        The importance by absolute layer name; filled by the backward passes.
    """
    scores: dict[str, float] = {}
    costs = unit_cost(part, resource, rank)
    hooks = [
        linear.register_forward_hook(partial(_watch, scores=scores, name=name, cost=costs[name]))
        for name, linear in part.linears()
    ]
    if isinstance(part, ClientModel):
        # Adapters or not, gradients are to reach every weight: they flow because the embeddings ask for them.
        part.decoder.enable_input_require_grads()
    try:
        yield scores
    finally:
        if isinstance(part, ClientModel):
            part.decoder.disable_input_require_grads()
        for hook in hooks:
            hook.remove()


def unit_cost(part: ModelPart, resource: str = "parameters", rank: int = 8) -> dict[str, float]:
    """What one unit of rank on each weight of ``part`` costs, ``c_m``.

    An adapter's own cost is proportional to ``in + out`` in parameters and in FLOPs alike. What differs in FLOPs is how
    far the frozen backward pass must reach. It runs through block ``j`` of a client only if a weight below ``j`` has an
    adapter; on the server it reaches the cut in any case. So:

    - ``parameters``: ``in + out``.
    - ``flops``, per token: ``6 (in + out)`` for the products with ``A`` and ``B``, the gradients of both, and the
      gradient of the input; on a client, in addition, an equal share of the frozen backward pass through each block
      above the weight's own: ``F_j / (rank * n_j)`` for every block ``j > b(m)``, where ``F_j = 2 sum of in * out``
      over the block's linear layers and ``n_j`` is the number of weights below it. This is the Shapley value of the
      backward pass among the units of rank when every weight holds ``rank`` of them (the "airport game" of Littlechild
      and Owen, 1973). The way inside the weight's own block, attention scores, norms and activation functions are not
      counted.

    Parameters
    ----------
    part : ModelPart
        Either side.
    resource : {"parameters", "flops"}
        What is counted.
    rank : int
        Rank of the adapters that share the backward pass; only ``flops`` depends on it.

    Returns
    -------
    dict[str, float]
        By absolute layer name.

    Raises
    ------
    ValueError
        If ``resource`` is unknown or ``rank`` is below 1.
    """
    if resource not in ("parameters", "flops"):
        raise ValueError(f"resource={resource!r} is not known; choose 'parameters' or 'flops'")
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    shapes = {name: shape_of(_base(linear)) for name, linear in part.linears()}
    if resource == "parameters":
        return {name: float(sum(shape)) for name, shape in shapes.items()}
    own = {name: 6.0 * sum(shape) for name, shape in shapes.items()}
    if not isinstance(part, ClientModel):
        return own
    blocks = [
        [name for name in shapes if name.startswith(f"{part.family.block_name(index)}.")]
        for index in range(len(part.blocks))
    ]
    costs: dict[str, float] = {}
    below, reach = len(shapes), 0.0
    for names in reversed(blocks):
        costs |= {name: own[name] + reach for name in names}
        below -= len(names)
        if below:
            reach += 2.0 * sum(math.prod(shapes[name]) for name in names) / (rank * below)
    return costs


def combine(measured: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """The global importance ``J_m = sum_i p_i J_im``, normalised to sum 1 over all weights.

    Parameters
    ----------
    measured : Iterable[tuple[float, Mapping[str, float]]]
        For each client its share ``p_i`` and its importance by absolute layer name, both sides together.

    Raises
    ------
    ValueError
        If an importance is not a finite number.
    """
    total: dict[str, float] = {}
    for share, scores in measured:
        for name, score in scores.items():
            total[name] = total.get(name, 0.0) + share * score
    return _normalised(total)


def smooth(
    previous: Mapping[str, float], measured: Mapping[str, float], t: int, beta_max: float, half_time: float
) -> dict[str, float]:
    """The importance smoothed over rounds, ``J_m(t) = beta_m(t) J_m(t-1) + (1 - beta_m(t)) I_m(t)``.

    ``beta_m(t) = beta_max * t / (t + half_time) * exp(-|I_m(t) - J_m(t-1)| / J_m(t-1))``: the past weighs more as
    training goes on, and less for a weight whose importance has just moved (METHOD.md, section 1).

    Parameters
    ----------
    previous, measured : Mapping[str, float]
        ``J(t-1)`` and ``I(t)`` by absolute layer name; both are normalised to sum 1 first. A weight that ``previous``
        does not have starts at its measured value; one that was not measured keeps its past.
    t : int
        Number of measurements before this one; at 0 the past has no weight.
    beta_max : float
        Largest weight of the past, in ``[0, 1)``.
    half_time : float
        Measurements after which half of ``beta_max`` is reached.

    Returns
    -------
    dict[str, float]
        ``J(t)``, normalised to sum 1.

    Raises
    ------
    ValueError
        If an importance is not a finite number, or ``t``, ``beta_max`` or ``half_time`` is out of range.
    """
    if t < 0 or not 0 <= beta_max < 1 or not half_time > 0:
        raise ValueError(
            f"t={t}, beta_max={beta_max}, half_time={half_time}: needed are t >= 0, 0 <= beta_max < 1 and half_time > 0"
        )
    past, present = _normalised(previous), _normalised(measured)
    stage = beta_max * t / (t + half_time)
    smoothed = past | present
    for name, j in past.items():
        if j > 0 and name in present:
            i = present[name]
            beta = stage * math.exp(-abs(i - j) / j)
            smoothed[name] = beta * j + (1 - beta) * i
    return _normalised(smoothed)


def drift(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """The total variation distance of two importances, 0 to 1.

    Parameters
    ----------
    a, b : Mapping[str, float]
        By absolute layer name; both are normalised to sum 1 first. A weight that one of them lacks counts as 0 there.

    Raises
    ------
    ValueError
        If an importance is not a finite number.
    """
    a, b = _normalised(a), _normalised(b)
    return sum(abs(a.get(name, 0.0) - b.get(name, 0.0)) for name in a.keys() | b.keys()) / 2


@torch.no_grad()
def gradient_weight_product(linear: nn.Module, inputs: Tensor, gradient: Tensor) -> float:
    """The sum over entries of ``|W * dLoss/dW|`` of one layer.

    Parameters
    ----------
    linear : nn.Module
        A linear layer, with or without adapter and attached update.
    inputs, gradient : Tensor
        What it read, ``(..., in)``, and ``dLoss/dy`` at its output, ``(..., out)``.
    """
    x, g, weight = inputs.flatten(0, -2), gradient.flatten(0, -2), dense_weight(_base(linear))
    total = g.new_zeros((), dtype=torch.promote_types(g.dtype, torch.float32))
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        product = g[:, rows].T @ x  # these rows of dLoss/dW
        total += product.mul_(_effective(linear, weight, rows)).abs_().sum(dtype=total.dtype)
        del product  # before the next one is formed
    return float(total)


def _watch(
    linear: nn.Module, args: tuple[Any, ...], output: Tensor, *, scores: dict[str, float], name: str, cost: float
) -> Tensor:
    def score(inputs: Tensor, gradient: Tensor) -> None:
        scores[name] = scores.get(name, 0.0) + gradient_weight_product(linear, inputs, gradient) / cost

    if not output.requires_grad:
        return output
    watched: Tensor = _Watched.apply(output, args[0].detach(), score)  # type: ignore[no-untyped-call]
    return watched


class _Watched(torch.autograd.Function):
    """Hands a layer's input and the gradient of its output to ``score``; autograd keeps the input, as any other."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, score: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.score = score
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.score(inputs, gradients[0])
        return gradients[0], None, None


def _effective(linear: nn.Module, weight: Tensor, rows: slice) -> Tensor:
    """Those rows of the weight with the update that is attached to it."""
    change = linear.change if isinstance(linear, AdaptedLinear) else None
    if change is None:
        return weight[rows]
    if change.matrix is not None:
        return weight[rows] + change.matrix[rows]
    assert change.factors is not None
    b, a = change.factors
    return torch.addmm(weight[rows].to(b.dtype), b[rows], a)


def _base(linear: nn.Module) -> nn.Module:
    return linear.base if isinstance(linear, AdaptedLinear) else linear


def _normalised(importance: Mapping[str, float]) -> dict[str, float]:
    """Scaled to sum 1; uniform where every weight has none."""
    for name, value in importance.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the importance of {name} is {value}: the probe's loss or gradients are not finite; lower train.lr, "
                "or use a wider model.dtype"
            )
    total = sum(importance.values())
    if not total > 0:
        return {name: 1 / len(importance) for name in importance}
    return {name: value / total for name, value in importance.items()}
