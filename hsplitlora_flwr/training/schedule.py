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
from hsplitlora_flwr.lora.optimizers import OPTIMIZERS


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

    Weight decay only leads towards zero; how far a step goes is the optimizer's to say.

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
    if train.lr * train.weight_decay > 1:
        return math.inf
    rates = math.fsum(learning_rate(train, step) for step in range(first_step, first_step + steps))
    return OPTIMIZERS[train.optimizer].farthest(train, rates, entries)


class AdapterOptimizer:
    """The optimizer over the adapters of one side; what it keeps of them lives as long as they do.

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
        self._optimizer = OPTIMIZERS[train.optimizer].make(over, train)

    def grad_norm(self) -> Tensor:
        """Norm of this side's gradient: a scalar on its device, for which nothing waits; 0 where there is none."""
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def magnitude(self) -> float:
        """Largest absolute value in the adapters, NaN where one is; 0 where there are none."""
        if not self._parameters:
            return 0.0
        return float(nn.utils.get_total_norm([p.detach() for p in self._parameters], norm_type=math.inf))

    def step(self, step: int, grad_norm: Tensor | float) -> None:
        """Take a global step and clear the gradients.

        Parameters
        ----------
        step : int
            Global step, from 0.
        grad_norm : Tensor or float
            Norm of both sides' gradients together (:meth:`grad_norm` is that of this side), by which they are clipped.
        """
        if self._train.clip and self._parameters:
            if not isinstance(grad_norm, Tensor):  # made where the gradients are, as a copy would be waited for
                grad_norm = torch.full((), grad_norm, dtype=torch.float64, device=self._parameters[0].device)
            nn.utils.clip_grads_with_norm_(self._parameters, self._train.clip, grad_norm.double())
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, step)
        self._optimizer.step()
        self.drop_gradients()

    def may_overflow(self, step: int) -> bool:
        """Whether a step of finite gradients may leave adapters that are not: where nothing bounds how far it goes."""
        return farthest(self._train, step, 1, 1) == math.inf

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be taken, or has been."""
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The adapters and what the optimizer keeps of them, for :meth:`restore` elsewhere: ``name/adapter`` and, for
        AdamW, ``name/exp_avg`` and the like; not copies."""
        state = self._optimizer.state_dict()["state"]  # of the placeholder too, where an optimizer begins with one
        rows = {name: state.get(place, {}) for place, name in enumerate(self._names)}
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
        own = self._optimizer.state_dict()
        self._optimizer.load_state_dict(own | {"state": own["state"] | rows})
