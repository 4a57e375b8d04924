"""Whose adapters a client's steps train on the server, and when they move.

Either a client has a half of its own, or one half serves all of a round::

    client 0, split 2    blocks 0-1 | 2 3 4 5 6 7 ...  norm, head
    client 1, split 5    blocks 0-4       | 5 6 7 ...  norm, head      one adapter and one optimizer state a block,
    client 2, split 3    blocks 0-2   | 3 4 5 6 7 ...  norm, head      from the lowest split point up

The shared half learns from every step, in turn (:mod:`hsplitlora_flwr.training.turns`), instead of once a round from a
mean; and there is one of it in memory. A step that is not finite, or larger than the others' by far, is refused before
it moves what all share.

**Clipping.** Both sides clip by the norm of both sides' gradients together. The client learns of the server's with the
gradient of the cut, and takes its step by the norm of this step. Word of the client's own comes back with its next
activation only. A client that is alone with a half moves it then, so its training is unsplit training to the last
digit. Where others wait for the half it moves at once, by the server's gradient of this step and the client's of the
step before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.multi_adapter import adapted_layers
from hsplitlora_flwr.models.parts import BodyModel, ServerModel
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.turns import Turns

OUTLIER = 1000.0
"""A step is refused if the norm of its clipped gradient is more than this many times the largest of the others' last.

Honest norms differ by a factor of a hundred if one client's text is learnt by heart and another's is new."""
USUAL = 1.0
"""A norm that counts among the others' until more than half of a round's clients have one, so that the first client
does not decide what the others may send."""


class Seat(Protocol):
    """A client's place at the half that its steps train."""

    def may_begin(self) -> bool:
        """Whether a step can begin now."""

    def begin(self) -> None:
        """Before the first micro-batch of a step; waits until it can."""

    def grad_norm(self) -> Tensor:
        """Norm of the gradients so far: a scalar tensor, for which no device is waited for."""

    def complete(self, step: int, grad_norm_sq: float, before: float) -> None:
        """All gradients of a global step are there.

        Parameters
        ----------
        step : int
            The global step.
        grad_norm_sq : float
            Their squared norm.
        before : float
            Squared norm of the client's own gradient in its step before.

        Raises
        ------
        FloatingPointError
            If the gradient is not finite or far too large; then nothing has moved.
        """

    def settle(self, grad_norm_sq: float) -> None:
        """The squared norm of the client's own gradient in the complete step."""

    def leave(self) -> None:
        """The client sends no more; gradients of an incomplete step are dropped."""

    def expel(self) -> None:
        """As :meth:`leave`, but called while the client's own thread may be in a step, which that thread then ends."""


class OwnHalf:
    """The seat of a client with a half of its own.

    Parameters
    ----------
    optimizer : AdapterOptimizer
        Over the adapters of its half.
    """

    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._optimizer = optimizer
        self._step, self._grad_norm_sq = 0, 0.0  # of the gradients that are complete

    def may_begin(self) -> bool:
        """Always."""
        return True

    def begin(self) -> None:
        """Nothing to wait for."""

    def grad_norm(self) -> Tensor:
        """Of the half."""
        return self._optimizer.grad_norm()

    def complete(self, step: int, grad_norm_sq: float, before: float) -> None:
        """Keep the gradients until :meth:`settle`."""
        self._step, self._grad_norm_sq = step, check_grad_norm_sq(step, grad_norm_sq)

    def settle(self, grad_norm_sq: float) -> None:
        """Move the adapters."""
        move(self._optimizer, self._step, self._grad_norm_sq + grad_norm_sq)

    def leave(self) -> None:
        """Nothing to give back."""

    def expel(self) -> None:
        """Nothing either."""


class SharedHalf:
    """One adapter a layer and one optimizer, for all clients of a round.

    Parameters
    ----------
    part : ServerModel or BodyModel
        From the lowest split point up; gets the adapters.
    specs : Mapping[str, AdapterSpec]
        Of its layers, by absolute name.
    seed : str
        Fixes where they start; see :func:`hsplitlora_flwr.lora.layers.inject`.
    start : Mapping[str, Factors]
        Adapters to go on from.
    train : TrainConfig
        Optimizer, schedule and clipping.
    turns : Turns
        Of the round's clients.
    kept : Mapping[str, Tensor]
        Adapters that go on with their optimizer, as :meth:`tensors` gave them.
    freeze_a : bool
        Train ``B`` alone.
    norms : dict[str, float], optional
        Of clients' last gradients in the rounds before, clipped; those of this round are put into it.

    Attributes
    ----------
    steps : Counter[str]
        Steps that each client has moved the adapters by.
    """

    def __init__(
        self,
        part: ServerModel | BodyModel,
        specs: Mapping[str, AdapterSpec],
        seed: str,
        start: Mapping[str, Factors],
        train: TrainConfig,
        turns: Turns,
        kept: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        freeze_a: bool = False,
        norms: dict[str, float] | None = None,
    ) -> None:
        trained = inject(part, specs, seed, start, freeze_a=freeze_a)
        self._part, self._layers = part.train(), adapted_layers(part)
        roles = "B" if freeze_a else "AB"
        self.optimizer = AdapterOptimizer(trained, train, [f"{name}:{role}" for name in self._layers for role in roles])
        self.optimizer.restore(kept)
        self.steps = Counter[str]()
        self.turns = turns
        self._alone = len(turns.clients) == 1
        self._clip = train.clip or math.inf
        self._norms = {} if norms is None else norms

    def attach(self, part: ServerModel | BodyModel) -> None:
        """Put the adapters on a client's part, which begins at its own split point."""
        for name, _ in list(part.linears()):
            if name in self._layers:
                part.replace(name, self._layers[name])

    def seat(self, client: str) -> Seat:
        """A client's place."""
        return OwnHalf(self.optimizer) if self._alone else _SharedSeat(self, client)

    def adapters(self) -> dict[str, Factors]:
        """``(B, s A)`` by absolute layer name, as :func:`hsplitlora_flwr.lora.layers.extract` gives them."""
        return extract(self._part)

    def tensors(self) -> dict[str, Tensor]:
        """What another round's half goes on from: ``layer:A/adapter``, ``layer:B/exp_avg`` and so on, not copies."""
        return self.optimizer.tensors()

    def take_step(self, client: str, step: int, grad_norm_sq: float, before: float) -> None:
        """Move the adapters by a client's gradient, if it is one; squared norms as for :meth:`Seat.complete`."""
        norm = min(math.sqrt(check_grad_norm_sq(step, grad_norm_sq)), self._clip)
        self._norms[client] = self._check_size(client, step, norm)
        move(self.optimizer, step, grad_norm_sq + before)
        self.steps[client] += 1

    def _check_size(self, client: str, step: int, norm: float) -> float:
        """``norm``, if a step's gradient is not far larger than the others', of whom most are taken to be honest."""
        others = [self._norms[name] for name in self.turns.clients if name != client and name in self._norms]
        known = 2 * len(others) > len(self.turns.clients)
        usual = max(others if known else [USUAL, *others])
        if usual and norm > OUTLIER * usual:
            whose = "of the others" if known else "that is usual; set train.clip"
            raise FloatingPointError(
                f"the gradient of step {step} has norm {norm:.3g}, over {OUTLIER:g} times the {usual:.3g} {whose}"
            )
        return norm


class _SharedSeat:
    """The seat of one of several clients."""

    def __init__(self, half: SharedHalf, client: str) -> None:
        self._half, self._client = half, client

    def may_begin(self) -> bool:
        return self._half.turns.try_take(self._client)

    def begin(self) -> None:
        self._half.turns.take(self._client)

    def grad_norm(self) -> Tensor:
        return self._half.optimizer.grad_norm()

    def complete(self, step: int, grad_norm_sq: float, before: float) -> None:
        self._half.take_step(self._client, step, grad_norm_sq, before)
        self._half.turns.done(self._client)

    def settle(self, grad_norm_sq: float) -> None:
        """Nothing: the adapters have moved."""

    def leave(self) -> None:
        if self._half.turns.holder == self._client:  # in the middle of a step, whose gradients are nobody's
            self._half.optimizer.drop_gradients()
        self._half.turns.leave(self._client)

    def expel(self) -> None:
        self._half.turns.expel(self._client)


def move(optimizer: AdapterOptimizer, step: int, grad_norm_sq: float) -> None:
    """Take a global step, clipped by the squared norm of both sides; fails if adapters are no longer finite."""
    optimizer.step(step, math.sqrt(grad_norm_sq))
    if optimizer.may_overflow(step):  # elsewhere nothing has to wait for the device
        check_finite("the largest adapter after step", step, optimizer.magnitude())


def check_grad_norm_sq(step: int, grad_norm_sq: float) -> float:
    """The squared norm of a step's gradient, if it is finite."""
    return check_finite("the squared norm of the gradient of step", step, grad_norm_sq)


def check_finite(what: str, number: int, value: float) -> float:
    """``value``, if it is a finite number; else ``FloatingPointError``, which says what it is and of which step."""
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} {number} is {value}: training diverged; lower train.lr or set train.clip")
    return value
