"""Learning rate, clipping and optimizer: the same on both sides of the cut.

Both sides compute the rate from the global step, so neither can run ahead of the other, and both clip by the norm of
both sides' gradients together, as one optimizer over the whole model would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hsplitlora_flwr.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of a global step, counted from 0 over all rounds: warm-up, then constant or decay to 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    total = train.rounds * train.steps
    done = min((step - train.warmup_steps) / max(total - train.warmup_steps, 1), 1.0)
    if train.schedule == "linear":
        return train.lr * (1 - done)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * done))
    return train.lr


def farthest(train: TrainConfig, first_step: int, steps: int, entries: int) -> float:
    """The farthest that steps can take a tensor from where it started, as a Frobenius norm, whatever the gradients are.

    Weight decay only leads towards zero. By the inequality of Cauchy and Schwarz a step of Adam moves an entry by no
    more than the learning rate times ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``, which is 7.3. A step of SGD is as
    long as its gradient, which clipping bounds, and momentum adds up to ``1 / (1 - momentum)`` of them.

    Parameters
    ----------
    first_step, steps : int
        The first global step, and how many there are.
    entries : int
        Of the tensor.

    Returns
    -------
    float
        Infinite where nothing bounds it: SGD without ``train.clip``, or with both momentum and weight decay.
    """
    decay = train.weight_decay
    if train.lr * decay > 1 or (train.optimizer == "sgd" and (not train.clip or (train.momentum and decay))):
        return math.inf
    rates = math.fsum(learning_rate(train, step) for step in range(first_step, first_step + steps))
    if train.optimizer == "adamw":
        b1, b2 = _BETAS
        return rates * (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2)) * math.sqrt(entries)
    return rates * train.clip / (1 - train.momentum)


_BETAS = 0.9, 0.999
"""Of AdamW: how much of the past the means of the gradient and of its square keep."""


class AdapterOptimizer:
    """AdamW or SGD over the adapters of one side; what it keeps of them lives as long as they do.

    Parameters
    ----------
    parameters : Sequence[nn.Parameter]
        The adapters; there may be none.
    train : TrainConfig
        Optimizer, learning rate, schedule, weight decay and clipping.
    names : Sequence[str], optional
        Of the parameters, where they are known by other than their place.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], train: TrainConfig, names: Sequence[str] | None = None
    ) -> None:
        self._parameters = list(parameters)
        self._names = [str(place) for place in range(len(self._parameters))] if names is None else list(names)
        self._train = train
        # torch refuses an optimizer over nothing; a placeholder without gradient is never moved
        over = self._parameters or [nn.Parameter(torch.zeros(0))]
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(over, lr=train.lr, betas=_BETAS, weight_decay=train.weight_decay)
            if train.optimizer == "adamw"
            else torch.optim.SGD(over, lr=train.lr, weight_decay=train.weight_decay, momentum=train.momentum)
        )

    def square(self) -> float:
        """Squared norm of this side's gradient."""
        return sum((float(p.grad.double().square().sum()) for p in self._parameters if p.grad is not None), 0.0)

    def magnitude(self) -> float:
        """Largest absolute value in the adapters, NaN where one is; 0 where there are none."""
        if not self._parameters:
            return 0.0
        return float(torch.nn.utils.get_total_norm([p.detach() for p in self._parameters], norm_type=math.inf))

    def step(self, step: int, other_square: float) -> None:
        """Take a global step and clear the gradients.

        Parameters
        ----------
        step : int
            Global step, from 0.
        other_square : float
            Squared norm of the other side's gradient in this step.
        """
        if self._train.clip:
            norm = torch.tensor(math.sqrt(self.square() + other_square), dtype=torch.float64)
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._train.clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, step)
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be taken, or has been."""
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The adapters and what the optimizer keeps of them, for :meth:`restore` elsewhere: ``name/adapter`` and, for
        AdamW, ``name/exp_avg`` and the like; not copies."""
        rows = {self._names[place]: row for place, row in self._optimizer.state_dict()["state"].items()}
        kept = {f"{name}/{what}": torch.as_tensor(value) for name, row in rows.items() for what, value in row.items()}
        return {f"{name}/adapter": p.detach() for name, p in zip(self._names, self._parameters, strict=True)} | kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` gave; the adapters have the same shapes, and others than these start anew.

        What the optimizer kept goes on changing in the given tensors.
        """
        places = {name: place for place, name in enumerate(self._names)}
        rows: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            if what == "adapter":
                self._parameters[places[name]].data.copy_(tensor)
            else:
                rows.setdefault(places[name], {})[what] = tensor
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": rows})
