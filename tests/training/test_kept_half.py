"""A half that is kept over rounds is several rounds of a plain loop whose server's adapters and optimizer go on.

The other side of the comparison is :mod:`tests.plain`, and dense sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Update, aggregate
from hsplitlora_flwr.lora.kept import KeptHalf
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.training.allowance import TRUSTED
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import SharedHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.training.turns import Turns
from tests.plain import SERVER, PlainRound, block_of
from tests.tiny import random_batches, tiny_model
from tests.training.test_exactness import Loopback, wire_of

STEPS, SCALE = 3, 1.5
ADAMW = TrainConfig(rounds=4, steps=STEPS, lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01, clip=0.05)
SGD = replace(ADAMW, optimizer="sgd", momentum=0.9, lr=5.0)
WEIGHTS = {"a": 1.0, "b": 5.0, "c": 2.5}
ROUNDS = (  # split points, and the rank of the half
    ({"a": 1, "b": 3, "c": 2}, 2),
    ({"a": 1, "b": 3, "c": 2}, 2),
    ({"b": 2, "c": 2}, 2),  # a is gone: blocks 2 and 3 are all that there is of the half, and nobody else's
    ({"a": 1, "b": 3, "c": 3}, 2),  # and block 1 starts anew
    ({"a": 1, "b": 3, "c": 3}, 3),  # as does all with another rank
)


class Exact(AccumulatedUpdate):
    """The accumulated update in float64, which the real one keeps in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.total: dict[str, Tensor] = {}

    def without(self, adapters: Update) -> dict[str, Change]:
        less = {name: self.total.get(name, torch.zeros(())) - b @ a for name, (b, a) in adapters.items()}
        return {name: Change(matrix=matrix) for name, matrix in (self.total | less).items()}


def changed(total: Mapping[str, Tensor]) -> PreTrainedModel:
    model = tiny_model("llama")
    for name, matrix in total.items():
        model.get_submodule(name).weight.data += matrix
    return model


@dataclass
class Round:
    """One round, and what both calculations start it from."""

    number: int
    splits: Mapping[str, int]
    specs: Mapping[str, AdapterSpec]

    @property
    def shares(self) -> dict[str, float]:
        total = sum(WEIGHTS[client] for client in self.splits)
        return {client: WEIGHTS[client] / total for client in self.splits}

    def own(self, client: str) -> dict[str, AdapterSpec]:
        return {name: spec for name, spec in self.specs.items() if block_of(name) < self.splits[client]}

    def trained_by(self, name: str) -> list[int]:
        return [i for i, split in enumerate(self.splits.values()) if split <= block_of(name)]

    @property
    def above(self) -> dict[str, AdapterSpec]:
        return {name: spec for name, spec in self.specs.items() if self.trained_by(name)}


def split_round(round_: Round, kept: KeptHalf, accumulated: Exact, train: TrainConfig) -> None:
    """A round by the product's parts."""
    kept.begin(round_.above)
    beside = {name: change.dense() for name, change in kept.beside(accumulated).items()}
    clients, servers = {}, {}
    model, first = changed(beside), round_.number * STEPS
    part = split_model(model, min(round_.splits.values()))[1]
    turns = Turns(list(round_.splits), "arrival")
    half = SharedHalf(part, round_.above, f"{round_.number}/server", {}, train, turns, kept.tensors)
    for number, (client, split) in enumerate(round_.splits.items()):
        lower, upper = split_model(changed(accumulated.total), split)[0], split_model(model, split)[1]
        half.attach(upper)
        optimizer = AdapterOptimizer(inject(lower, round_.specs, f"{round_.number}/{client}"), train)
        batches = islice(random_batches(number), first, None)
        clients[client] = ClientTrainer(lower.train(), optimizer, batches, first_step=first, up=wire_of(model))
        allowed = replace(TRUSTED, first_step=first)
        servers[client] = ServerTrainer(upper.train(), half.seat(client), down=wire_of(model), allowance=allowed)
        train_client(clients[client], Loopback(servers[client]), STEPS)
    shared = kept.update(half.adapters(), {name: round_.trained_by(name) for name in round_.above})
    update = aggregate([extract(each.model) for each in clients.values()], list(round_.shares.values()), shared=shared)
    kept.end(half.tensors(), half.adapters(), [])
    for name, (b, a) in update.items():
        accumulated.total[name] = accumulated.total.get(name, torch.zeros(())) + b @ a


def plain_round(
    round_: Round, before: tuple[Round, PlainRound] | None, total: dict[str, Tensor], train: TrainConfig
) -> PlainRound:
    """The same round written out; ``total`` grows by what it adds."""
    starts, scales = {}, {}
    for owner in (*round_.splits, SERVER):
        specs = round_.above if owner == SERVER else round_.own(owner)
        model = split_model(tiny_model("llama"), 1)
        for part in model:
            inject(part, specs, f"{round_.number}/{'server' if owner == SERVER else owner}")
        found = extract(model[0]) | extract(model[1])
        starts[owner] = {name: (b, a / SCALE) for name, (b, a) in found.items()}
        scales[owner] = dict.fromkeys(found, SCALE)
    first = round_.number * STEPS
    written_out = PlainRound(changed(total), starts, round_.splits, scales, train, first, by_step=False)
    going_on = [name for name, spec in round_.above.items() if before and before[0].above.get(name) == spec]
    if before:
        written_out.go_on(before[1], going_on)
    batches = {client: islice(random_batches(i), first, None) for i, client in enumerate(round_.splits)}
    written_out.run(batches, STEPS)
    shares = round_.shares
    for name in round_.specs:
        change = torch.zeros(())
        if name in round_.above:
            b, a = written_out.adapters(SERVER)[name]
            together = sum(list(shares.values())[i] for i in round_.trained_by(name))
            change = together * (b @ a - written_out.known.get(name, torch.zeros(())))
        for client in round_.splits:
            if name in round_.own(client):
                b, a = written_out.adapters(client)[name]
                change = change + shares[client] * b @ a
        total[name] = total.get(name, torch.zeros(())) + change
    return written_out


@pytest.mark.parametrize("train", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_rounds_of_a_kept_half_are_a_plain_loop(train: TrainConfig) -> None:
    """Unlike cuts and weights, clients that come and go, layers that leave the half and return, and another rank."""
    names = [name for part in split_model(tiny_model("llama"), 1) for name, _ in part.linears()]
    kept, accumulated, total = KeptHalf(), Exact(), dict[str, Tensor]()
    before: tuple[Round, PlainRound] | None = None
    for number, (splits, rank) in enumerate(ROUNDS):
        ranks = {name: rank if block_of(name) else 1 for name in names}
        specs = {name: AdapterSpec(each, SCALE * each) for name, each in ranks.items()}
        round_ = Round(number, splits, specs)
        split_round(round_, kept, accumulated, train)
        before = round_, plain_round(round_, before, total, train)
        for name, expected in total.items():
            torch.testing.assert_close(accumulated.total[name], expected, rtol=0, atol=1e-9)
            assert expected.abs().max() > 1e-7, "all have moved"
        assert max(float(matrix.abs().max()) for matrix in total.values()) > 1e-3


def test_what_is_kept_matters() -> None:
    """Neither another start nor an optimizer that starts anew ends in the same adapters."""
    names = [name for part in split_model(tiny_model("llama"), 1) for name, _ in part.linears()]
    specs = {name: AdapterSpec(2, 2 * SCALE) for name in names}

    def total(ending: str) -> Tensor:
        kept, accumulated = KeptHalf(), Exact()
        for number in range(2):
            split_round(Round(number, {"a": 1, "b": 2}, specs), kept, accumulated, ADAMW)
            kept.tensors = {key: tensor for key, tensor in kept.tensors.items() if key.endswith(ending)}
        return accumulated.total[names[-1]]

    assert torch.equal(total(""), total(""))
    assert (total("") - total("/adapter")).abs().max() > 1e-6, "without its optimizer"
    assert (total("") - total("nothing")).abs().max() > 1e-6, "with fresh adapters"
