"""A round of split training written out: no cut, no server, no stream, and none of the product's training code.

Adapters are plain tensors that hooks add to an unsplit model: below a client's split point its own, above it those of
the half that all share, or its own as well. Each owner has a stock optimizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.training.schedule import learning_rate

Pair = tuple[Tensor, Tensor]
SERVER = "server"


def block_of(name: str) -> int:
    """The block of a layer, from its absolute name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


class PlainRound:
    """The clients of a round and what they train.

    Parameters
    ----------
    model : PreTrainedModel
        The unsplit model with the update so far in its weights.
    adapters : Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
        ``(B, A)`` at the start by owner, a client or :data:`SERVER`, and layer; the scale is not in them.
    splits : Mapping[str, int]
        Split points by client, in the order of a step. Above them a client has what the server owns.
    scales : Mapping[str, Mapping[str, float]]
        ``s`` by owner and layer.
    train : TrainConfig
    first_step : int
        Global step of the round's first.
    by_step : bool
        Clients take turns step by step; else one does its whole round after another.
    freeze_a : bool
        Only ``B`` trains.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, Mapping[str, Pair]],
        splits: Mapping[str, int],
        scales: Mapping[str, Mapping[str, float]],
        train: TrainConfig,
        first_step: int = 0,
        by_step: bool = True,
        freeze_a: bool = False,
    ) -> None:
        self.model, self.splits, self.scales, self.config = model, splits, scales, train
        self.first_step, self.by_step = first_step, by_step
        self.factors = {
            owner: {
                name: (b.detach().clone().requires_grad_(), a.detach().clone().requires_grad_(not freeze_a))
                for name, (b, a) in own.items()
            }
            for owner, own in adapters.items()
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            owner: torch.optim.AdamW(self._trained(owner), weight_decay=train.weight_decay)
            if train.optimizer == "adamw"
            else torch.optim.SGD(self._trained(owner), weight_decay=train.weight_decay, momentum=train.momentum)
            for owner in self.factors
            if self.factors[owner]
        }
        self.known: dict[str, Tensor] = {}  # what of the server's adapters the weights have already
        self._active: dict[str, tuple[Tensor, Tensor, float, Tensor | None]] = {}
        for name in {name for own in self.factors.values() for name in own}:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            if name not in self._active:
                return output
            b, a, scale, known = self._active[name]
            output = output if known is None else output - args[0] @ known.T
            return output + scale * (args[0] @ a.T) @ b.T

        return add

    def go_on(self, before: PlainRound, names: Iterable[str], in_weights: bool = True) -> None:
        """The server's adapters on these layers are those of an earlier round, with what its optimizer keeps of them.

        ``in_weights``: what they had become then is part of the weights since.
        """
        optimizer = self.optimizers[SERVER]
        for name in names:
            pairs = zip(self.factors[SERVER][name], before.factors[SERVER][name], strict=True)
            for mine, theirs in pairs:
                mine.data.copy_(theirs.data)
                state = before.optimizers[SERVER].state.get(theirs, {})
                optimizer.state[mine] = {
                    key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
                }
            if in_weights:
                b, a = before.adapters(SERVER)[name]
                self.known[name] = b @ a

    def run(self, batches: Mapping[str, Iterator[Batch]], steps: int) -> dict[str, list[float]]:
        """Train; the loss of every step by client."""
        before = dict.fromkeys(self.splits, 0.0)
        losses: dict[str, list[float]] = {client: [] for client in self.splits}
        turns: Any = itertools.product(range(steps), self.splits)
        if not self.by_step:
            turns = ((step, client) for client in self.splits for step in range(steps))
        shared = bool(self.factors.get(SERVER))
        for step, client in turns:
            self._active = {
                name: (*pair, self.scales[client][name], None) for name, pair in self.factors[client].items()
            }
            for name, pair in self.factors.get(SERVER, {}).items():
                if block_of(name) >= self.splits[client]:
                    self._active[name] = (*pair, self.scales[SERVER][name], self.known.get(name))
            batch = next(batches[client])
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
            loss.backward()
            losses[client].append(loss.item())
            mine, together = self._square(client), self._square(SERVER) if shared else 0.0
            self._step(client, step, mine + together)
            if shared:  # of several, the client's norm of the step before is the last that the server knows
                self._step(SERVER, step, together + (before[client] if len(self.splits) > 1 else mine))
            before[client] = mine
        return losses

    def adapters(self, owner: str) -> dict[str, Pair]:
        """``(B, s A)`` now."""
        scales = self.scales[owner]
        return {name: (b.detach(), scales[name] * a.detach()) for name, (b, a) in self.factors[owner].items()}

    def _trained(self, owner: str) -> list[Tensor]:
        return [factor for pair in self.factors[owner].values() for factor in pair if factor.requires_grad]

    def _square(self, owner: str) -> float:
        return sum(float(f.grad.double().square().sum()) for f in self._trained(owner) if f.grad is not None)

    def _step(self, owner: str, step: int, square: float) -> None:
        if owner not in self.optimizers:
            return
        if self.config.clip:
            factor = min(1.0, self.config.clip / (math.sqrt(square) + 1e-6))
            for parameter in self._trained(owner):
                if parameter.grad is not None:
                    parameter.grad *= factor
        self.optimizers[owner].param_groups[0]["lr"] = learning_rate(self.config, self.first_step + step)
        self.optimizers[owner].step()
        self.optimizers[owner].zero_grad()
