"""Weights are scored in the first steps of training as autograd's dense gradients of the same steps score them.

The other side of the comparisons is :mod:`tests.plain`, which keeps the gradient of every weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import extract, inject
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.planning.importance import Scorer, scoring
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from tests.plain import SERVER, Pair, PlainRound
from tests.tiny import random_batches, tiny_model
from tests.training.test_exactness import Loopback, specs_of, wire_of
from tests.training.test_shared_half import SPLITS, STEPS, Split, assert_equal, plain, written_out

SCORED = 2

Scores = Mapping[str, Mapping[str, float]]


class ScoredRound(PlainRound):
    """Notes what the weights with adapters score in every client's first steps."""

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, Mapping[str, Pair]], *more: Any) -> None:
        super().__init__(model, adapters, *more)  # type: ignore[arg-type]
        names = {name for own in adapters.values() for name in own}
        self.weights = {name: model.get_parameter(f"{name}.weight").requires_grad_() for name in names}
        self.scores: dict[str, dict[str, float]] = {client: {} for client in self.splits}

    def _step(self, owner: str, step: int, square: float) -> None:
        for name, weight in self.weights.items() if owner != SERVER else ():
            assert weight.grad is not None
            if name in self._active and step < SCORED:
                score = float((weight.detach() * weight.grad).abs().sum())
                self.scores[owner][name] = self.scores[owner].get(name, 0.0) + score
            weight.grad = None
        super()._step(owner, step, square)


def expected(split: Split) -> Scores:
    """By client, written out."""
    same = written_out(split, kind=ScoredRound)
    same.run({client: random_batches(number) for number, client in enumerate(split.splits)}, STEPS)
    return same.scores


def found(split: Split) -> Scores:
    """By client, of both sides of its cut."""
    return {name: {**below.scores(), **above.scores()} for name, (below, above) in split.scorers.items()}


def assert_close(scores: Scores, wanted: Scores) -> None:
    assert scores.keys() == wanted.keys() == SPLITS.keys()
    for client, own in wanted.items():
        assert scores[client] == pytest.approx(own, rel=1e-9) and min(own.values()) > 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("llama", {"labels": "client"}),
        ("llama", {"checkpointing": True}),
        ("llama", {"frozen": "b"}),
    ],
    ids=str,
)
def test_first_steps_score_every_weight_with_an_adapter(family: str, changes: dict[str, Any]) -> None:
    """A shared half moves with every client's step, and each client scores what it computed with."""
    split = Split(family, scored=SCORED, **changes)
    wanted, adapters = expected(split), plain(split)
    split.train_over_streams()
    assert_close(found(split), wanted)
    assert_equal(split.adapters(), adapters)


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_messages_score_the_same_to_the_last_bit(micro_batch_size: int) -> None:
    streamed, by_message = (Split("llama", micro_batch_size=micro_batch_size, scored=SCORED) for _ in range(2))
    streamed.train_over_streams()
    by_message.train_in_messages()
    assert found(by_message) == found(streamed)


def test_a_scorer_goes_on_in_another_process_to_the_last_bit() -> None:
    whole, parts = Split("llama", micro_batch_size=2, scored=SCORED), Split("llama", micro_batch_size=2, scored=SCORED)
    whole.train_over_streams()
    turn = parts._turn

    def anew(client: str, answers: Any) -> Any:
        below, _ = parts.scorers[client]
        below.restore(below.scores())
        return turn(client, answers)

    parts._turn = anew  # type: ignore[method-assign]
    parts.train_in_messages()
    assert found(parts) == found(whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_step_of_fresh_adapters_scores_what_a_probe_does(family: str) -> None:
    model, train = tiny_model(family), TrainConfig(rounds=1, steps=1, lr=1e-2)
    specs = specs_of(model)
    scores: dict[bool, dict[str, float]] = {}
    for probe in (True, False):
        client, server = split_model(model, 2)
        fresh = [inject(part, {} if probe else specs, "seed") for part in (client, server)]
        assert all(not b.any() for part in (client, server) for b, _ in extract(part).values())
        below, above = (Scorer(part, adapted=not probe) for part in (client, server))
        optimizers = [AdapterOptimizer(parameters, train) for parameters in fresh]
        wire = wire_of(model)
        trainer = ClientTrainer(client, optimizers[0], random_batches(), first_step=0, up=wire, scorer=below)
        train_client(trainer, Loopback(ServerTrainer(server, OwnHalf(optimizers[1]), down=wire, scorer=above)), 1)
        scores[probe] = {**below.scores(), **above.scores()}
    assert scores[False].keys() == specs.keys() < scores[True].keys(), "a probe scores those without adapter too"
    assert scores[False] == pytest.approx({name: scores[True][name] for name in specs}, rel=1e-12)


def test_training_keeps_nothing_more_for_its_scores() -> None:
    """Neither inputs of weights without an adapter, nor, over a base of low precision, inputs in two dtypes."""
    batch = next(random_batches())
    for dtype in (torch.float32, torch.bfloat16):
        kept = {}
        for end in (0, 1):
            client, _ = split_model(tiny_model("llama", dtype=dtype), 2)
            inject(client, specs_of(tiny_model("llama")), "seed")
            storages: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor, storages: dict[int, torch.Tensor] = storages) -> torch.Tensor:
                storages[tensor.untyped_storage()._cdata] = tensor
                return tensor

            scorer = Scorer(client, end=end, adapted=True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), scorer.watching(0):
                client(batch.input_ids, batch.attention_mask)
            kept[end] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        assert kept[1] == kept[0] > 0
    with scoring(client) as scores:
        pass
    assert scores == {}
