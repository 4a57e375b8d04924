"""Important weight identification (HSplitLoRA, section IWI; docs/method.md, section 1).

The importance of a weight is the gradient-weight product

    I_m = sum over entries of |W_m * dLoss/dW_m|

on a few batches. The paper divides it by what one unit of rank on ``m`` costs; here only the greedy rule does
(:func:`hsplitlora_flwr.planning.greedy.unit_cost`), because the other planner counts costs as constraints. ``W`` is
frozen, so autograd does not form its gradient: a hook forms it a few rows at a time, reduces them to a number and drops
them. Each side scores the weights that it holds::

    before the first round    a probe: passes without adapters, every weight is scored
    in a later round          its first steps of training: every weight with an adapter, for the plan of the next round

In training the backward pass holds all that a weight with an adapter needs: what the layer read, kept for ``A``, and
the gradient of what it put out. Other weights would have to keep what they read, for which a plan leaves no room; they
stand to the scored ones as they did before (:func:`fill`). In the first step of a fresh adapter ``B`` is zero, so the
score is that of a probe on the same batch. In the next steps, and where a half goes on with what it has learnt, the
gradient is that of the model as it trains; ``W`` stays the frozen weight.

The scores of all clients make the global importance (:func:`combine`), which is smoothed over rounds (:func:`smooth`)
and compared with the one that the current plan was made for (:func:`drift`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hsplitlora_flwr.copies import to_numbers
from hsplitlora_flwr.lora.layers import AdaptedLinear, dense_weight, has_adapter
from hsplitlora_flwr.models.parts import ClientModel, ModelPart

ROWS = 1024
"""Rows of ``dLoss/dW`` that exist at a time: few beside the matrix of a large model, enough for a fast product."""


class Scorer:
    """Scores linear layers of a part in the backward passes of its first steps.

    The scores of several passes add up. ``|W * gradient|`` is not additive over parts of a batch: micro-batches count
    as batches of their own, in a probe and in training alike. Biases and norms are not scored.

    ``W`` is the frozen weight with the accumulated update, merged or attached, and without an adapter in training. Such
    an adapter takes part in the forward and backward passes, so the gradient is that of the adapted model.

    Parameters
    ----------
    part : ModelPart
        Either side, with all the adapters that it is to have.
    end : float
        Global step before which steps are scored; by default all are.
    adapted : bool
        Score weights with an adapter alone: no pass keeps or reaches more than it would without. By default every
        weight is scored, and gradients reach all of them.
    """

    def __init__(self, part: ModelPart, *, end: float = math.inf, adapted: bool = False) -> None:
        self._part, self._end, self._adapted = part, end, adapted
        self._totals: dict[str, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether a global step is one of those that are scored."""
        return step < self._end

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Score what goes forward and backward inside the block, if the global step is one of those that are scored.

        A pass may be divided over several blocks, if activations that are computed again are so in one.
        """
        if not self.is_due(step):
            yield
            return
        part, hooks = self._part, list[RemovableHandle]()
        for name, linear in part.linears():
            if not self._adapted or has_adapter(linear):
                hooks += _Watch(self._totals, name).put_on(linear)
        reach_all = isinstance(part, ClientModel) and not self._adapted
        if reach_all:  # gradients reach every weight because the embeddings ask for them
            part.decoder.enable_input_require_grads()
        try:
            yield
        finally:
            if reach_all:
                part.decoder.disable_input_require_grads()
            for hook in hooks:
                hook.remove()

    def scores(self) -> dict[str, float]:
        """The importance by absolute layer name, as far as there were backward passes; its device is waited for."""
        return dict(zip(self._totals, to_numbers(*self._totals.values()), strict=True)) if self._totals else {}

    def restore(self, scores: Mapping[str, float]) -> None:
        """Go on from what :meth:`scores` gave, in another process."""
        self._totals = {name: torch.tensor(score, dtype=torch.float64) for name, score in scores.items()}


@contextmanager
def scoring(part: ModelPart) -> Iterator[dict[str, float]]:
    """Score all linear layers of ``part`` during the backward passes inside the block; see :class:`Scorer`.

    Yields
    ------
    dict[str, float]
        The importance by absolute layer name; filled at the end of the block.
    """
    scorer, scores = Scorer(part), dict[str, float]()
    with scorer.watching(0):
        yield scores
    scores.update(scorer.scores())


def combine(measured: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """The global importance ``J_m = sum_i p_i J_im / sum_i p_i``, over who scored ``m``, normalised to sum 1.

    Parameters
    ----------
    measured : Iterable[tuple[float, Mapping[str, float]]]
        For each client its share ``p_i`` and its importance by absolute layer name, both sides together.

    Raises
    ------
    ValueError
        If an importance is not a finite number.
    """
    total, scored_by = dict[str, float](), dict[str, float]()
    for share, scores in measured:
        for name, score in scores.items():
            total[name] = total.get(name, 0.0) + share * score
            scored_by[name] = scored_by.get(name, 0.0) + share
    return _normalised({name: score / scored_by[name] if scored_by[name] else 0.0 for name, score in total.items()})


def fill(scores: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """A client's scores with those of the weights that it did not score, as they stand to the others in ``known``.

    Parameters
    ----------
    scores : Mapping[str, float]
        By absolute layer name.
    known : Mapping[str, float]
        The importance before, of every weight.
    """
    before = math.fsum(known.get(name, 0.0) for name in scores)
    scale = math.fsum(scores.values()) / before if before > 0 else 0.0
    return {name: scale * value for name, value in known.items()} | dict(scores)


def complete(importance: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The importance of all these weights: one that nobody scored counts as the mean of the others; sum 1.

    So it is where no client below whose cut it lies had room to score it.
    """
    missing = [name for name in names if name not in importance]
    if not missing:
        return dict(importance)
    mean = sum(importance.values()) / max(len(importance), 1)
    return _normalised(dict.fromkeys(missing, mean) | dict(importance))


def smooth(previous: Mapping[str, float], measured: Mapping[str, float], t: int, rounds: int) -> dict[str, float]:
    """The importance smoothed over rounds, ``J_m(t) = g J_m(t-1) + (1 - g) I_m(t)``.

    ``g = 1 - exp(-I_m(t) t / (J_m(t-1) T))``, the paper's rule at second hand (docs/method.md, section 1): the past
    weighs more as training goes on, up to 0.63 for a steady weight, and more for one whose importance jumps up.

    Parameters
    ----------
    previous, measured : Mapping[str, float]
        ``J(t-1)`` and ``I(t)`` by absolute layer name; both are normalised to sum 1 first. A weight that ``previous``
        does not have, or has at 0, starts at its measured value; one that was not measured keeps its past.
    t : int
        Number of rounds before this one; at 0 the past has no weight.
    rounds : int
        Their number in all, ``T``.

    Returns
    -------
    dict[str, float]
        ``J(t)``, normalised to sum 1.

    Raises
    ------
    ValueError
        If an importance is not a finite number, ``t`` is below 0 or ``rounds`` below 1.
    """
    if t < 0 or rounds < 1:
        raise ValueError(f"t={t}, rounds={rounds}: needed are t >= 0 and rounds >= 1")
    past, present = _normalised(previous), _normalised(measured)
    smoothed = past | present
    for name, j in past.items():
        if j > 0 and name in present:
            i = present[name]
            g = -math.expm1(-i * t / (j * rounds))
            smoothed[name] = g * j + (1 - g) * i
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
def gradient_weight_product(linear: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """The sum over entries of ``|W * dLoss/dW|`` of one layer: a scalar on its device, for which nothing waits.

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
    return total


class _Watch:
    """Adds up the scores of one layer.

    Parameters
    ----------
    totals : dict[str, Tensor]
        Scalars by absolute layer name.
    name : str
        Of the layer.
    """

    def __init__(self, totals: dict[str, Tensor], name: str) -> None:
        self._totals, self._name = totals, name
        self._kept: Tensor | None = None

    def put_on(self, linear: nn.Module) -> list[RemovableHandle]:
        """Watch a layer until the hooks are removed."""
        hooks = [linear.register_forward_hook(self._leave)]
        if isinstance(linear, AdaptedLinear) and has_adapter(linear):
            hooks.append(linear.dropout.register_forward_pre_hook(self._enter))
        return hooks

    def _enter(self, dropout: nn.Module, args: tuple[Any, ...]) -> None:
        """What an adapter reads is kept for its own gradient, which over a base of low precision is a copy in fp32."""
        self._kept = args[0].detach()

    def _leave(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept, self._kept = self._kept, None
        if not output.requires_grad:
            return output

        def note(inputs: Tensor, gradient: Tensor) -> None:
            score = gradient_weight_product(linear, inputs.to(gradient.dtype), gradient).double()
            self._totals[self._name] = self._totals[self._name] + score if self._name in self._totals else score

        inputs = args[0].detach() if kept is None else kept
        watched: Tensor = _Watched.apply(output, inputs, note)  # type: ignore[no-untyped-call]
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
