"""Invariant S3: clients that train one half of a server in turn are a plain loop over the same batches in one process.

The other side of every comparison is :mod:`tests.plain`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from threading import Event
from typing import Any, TypeVar

import pytest
import torch
from transformers import PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.multi_adapter import adapted_layers
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.allowance import Allowance
from hsplitlora_flwr.training.client import ClientTrainer, take_turn, train_client
from hsplitlora_flwr.training.half import SharedHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.training.turns import Turns
from hsplitlora_flwr.transport.frames import Frame
from tests.plain import SERVER, PlainRound
from tests.tiny import CONFIGS, random_batches, tiny_model
from tests.training.test_exactness import Labels, Loopback, wire_of

STEPS = 4
TRAIN = TrainConfig(rounds=1, steps=STEPS, lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01, clip=0.05)
SPLITS = {"a": 2, "b": 1, "c": 3}
SCALE = 1.5

R = TypeVar("R", bound=PlainRound)


def own_specs(names: Sequence[str], client: int) -> dict[str, AdapterSpec]:
    """Ranks that differ between clients and layers, and layers without an adapter."""
    ranks = itertools.islice(itertools.cycle([2, 4, 0, 3, 1]), client, None)
    return {name: AdapterSpec(rank, SCALE * rank) for name, rank in zip(names, ranks, strict=False) if rank}


def shared_specs(names: Sequence[str]) -> dict[str, AdapterSpec]:
    ranks = itertools.cycle([3, 0, 2, 5])
    return {name: AdapterSpec(rank, SCALE * rank) for name, rank in zip(names, ranks, strict=False) if rank}


def names_of(model: PreTrainedModel) -> list[str]:
    return [name for part in split_model(model, 1) for name, _ in part.linears()]


class Telling(Loopback):
    """Tells others when it has sent a frame."""

    def __init__(self, trainer: ServerTrainer, sent: Event) -> None:
        super().__init__(trainer)
        self._has_sent = sent

    def send(self, frame: Frame) -> None:
        super().send(frame)
        self._has_sent.set()


class Split:
    """All clients of a round and the half that they share, in one process."""

    def __init__(
        self,
        family: str,
        labels: Labels = "server",
        micro_batch_size: int = 0,
        order: str = "fixed",
        checkpointing: bool = False,
        splits: Mapping[str, int] = SPLITS,
        train: TrainConfig = TRAIN,
        norms: dict[str, float] | None = None,
        frozen: Collection[str] = (),
        one_way: Collection[str] | None = None,
        dropout: float = 0.0,
        scored: int = 0,
    ) -> None:
        one_way = frozen if one_way is None else one_way
        self.family, self.base, self.splits = family, tiny_model(family), splits
        names = names_of(self.base)
        self.turns = Turns(list(splits), order)
        _, part, *_ = split_model(self.base, min(splits.values()), labels)
        shared = {name: replace(spec, dropout=dropout) for name, spec in shared_specs(names).items()}
        self.half = SharedHalf(part, shared, "server", {}, train, self.turns, norms=norms)
        self.clients: dict[str, ClientTrainer] = {}
        self.servers: dict[str, ServerTrainer] = {}
        self.scorers: dict[str, tuple[Scorer, Scorer]] = {}
        for number, (client, split) in enumerate(splits.items()):
            lower, upper, *head = split_model(self.base, split, labels)
            self.half.attach(upper)
            if checkpointing:
                checkpoint_blocks(upper)
            specs = {} if client in frozen else own_specs(names, number)
            below, above = (Scorer(part, end=scored, adapted=True) for part in (lower, upper))
            self.scorers[client] = below, above
            self.clients[client] = ClientTrainer(
                lower.train(),
                AdapterOptimizer(inject(lower, specs, client), train),
                random_batches(number),
                first_step=0,
                head=head[0].train() if head else None,
                micro_batch_size=micro_batch_size,
                up=wire_of(self.base),
                forward_only=client in one_way,
                scorer=below,
            )
            self.servers[client] = ServerTrainer(
                upper.train(),
                self.half.seat(client),
                down=wire_of(self.base),
                allowance=Allowance(forward_only=client in one_way),
                scorer=above,
            )

    def train_over_streams(self, slow: str = "") -> None:
        """Every client in a thread of its own; a slow one begins when all others have sent a frame."""
        sent = {client: Event() for client in self.splits}

        def one(client: str) -> None:
            torch.set_num_threads(1)
            if client == slow:
                assert all(event.wait(300) for other, event in sent.items() if other != slow)
            train_client(self.clients[client], Telling(self.servers[client], sent[client]), STEPS)

        with ThreadPoolExecutor(len(self.splits)) as threads:
            for future in [threads.submit(one, client) for client in self.splits]:
                future.result(300)

    def train_in_messages(self) -> None:
        """One thread takes whatever message can be answered now, as the exchange of a round does."""
        waiting = {client: self._turn(client, []) for client in reversed(self.splits)}
        while waiting:
            for client, frames in list(waiting.items()):
                server = self.servers[client]
                if server.may_answer(frames):
                    answers = [server(frame) for frame in frames]
                    waiting[client] = [] if server.finished else self._turn(client, answers)
            waiting = {client: frames for client, frames in waiting.items() if frames}

    def _turn(self, client: str, answers: Sequence[Frame]) -> list[Frame]:
        """A turn begins with the batch of its step, whatever the turns before it took."""
        trainer, number = self.clients[client], list(self.splits).index(client)
        trainer.batches = itertools.islice(random_batches(number), trainer.global_step, None)
        return take_turn(trainer, answers, STEPS)

    def adapters(self) -> dict[str, dict[str, Factors]]:
        assert all(server.finished for server in self.servers.values())
        return {name: extract(each.model) for name, each in self.clients.items()} | {SERVER: self.half.adapters()}


def written_out(split: Split, train: TrainConfig = TRAIN, kind: type[R] = PlainRound) -> R:  # type: ignore[assignment]
    """The same round, which has not begun."""
    found = {name: extract(each.model) for name, each in split.clients.items()} | {SERVER: split.half.adapters()}
    starts = {owner: {name: (b, a / SCALE) for name, (b, a) in own.items()} for owner, own in found.items()}
    scales = {owner: dict.fromkeys(own, SCALE) for owner, own in starts.items()}
    return kind(tiny_model(split.family), starts, split.splits, scales, train)


def plain(split: Split, train: TrainConfig = TRAIN) -> dict[str, dict[str, Factors]]:
    """The adapters after the same round, written out."""
    same = written_out(split, train)
    same.run({client: random_batches(number) for number, client in enumerate(split.splits)}, STEPS)
    return {owner: same.adapters(owner) for owner in same.factors}


def assert_equal(got: Mapping[str, Mapping[str, Factors]], expected: Mapping[str, Mapping[str, Factors]]) -> None:
    assert got.keys() == expected.keys()
    for owner, adapters in expected.items():
        assert got[owner].keys() == adapters.keys(), owner
        for name, pair in adapters.items():
            for mine, theirs in zip(got[owner][name], pair, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=lambda t, w=(owner, name): f"{w}: {t}")


@cache
def reference(frozen: str = "") -> dict[str, dict[str, Factors]]:
    return plain(Split("llama", frozen=frozen))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_of_several_clients_is_a_plain_loop(family: str) -> None:
    split = Split(family)
    expected = plain(split)
    split.train_over_streams()
    assert_equal(split.adapters(), expected)
    assert split.half.steps == dict.fromkeys(SPLITS, STEPS)
    assert all(b.abs().max() > 1e-7 for own in expected.values() for b, _ in own.values()), "all have moved"


@pytest.mark.parametrize("slow", ["a", "c"])
@pytest.mark.parametrize(
    "changes",
    [
        {"labels": "client"},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3, "labels": "client"},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_whoever_is_slow_and_whatever_travels_the_round_is_the_same(changes: dict[str, Any], slow: str) -> None:
    split = Split("llama", **changes)
    split.train_over_streams(slow)
    assert_equal(split.adapters(), reference())


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_messages_take_the_same_turns(labels: Labels, micro_batch_size: int) -> None:
    split = Split("llama", labels, micro_batch_size)
    split.train_in_messages()
    assert_equal(split.adapters(), reference())


@pytest.mark.parametrize("family", CONFIGS)
def test_clients_that_train_nothing_take_turns_with_those_that_do(family: str) -> None:
    split = Split(family, frozen="bc")
    expected = plain(split)
    split.train_over_streams()
    assert_equal(split.adapters(), expected)
    assert not expected["b"] and not expected["c"] and expected["a"], "both forms are there"
    assert all(b.abs().max() > 1e-7 for own in expected.values() for b, _ in own.values()), "all have moved"


@pytest.mark.parametrize("frozen", ["a", "c", "abc"])
@pytest.mark.parametrize(
    "changes",
    [
        {"labels": "client"},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3, "labels": "client"},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_whoever_trains_nothing_and_whatever_travels(changes: dict[str, Any], frozen: str) -> None:
    split = Split("llama", frozen=frozen, **changes)
    split.train_over_streams(slow="a")
    assert_equal(split.adapters(), reference(frozen))


@pytest.mark.parametrize("frozen", ["a", "c", "abc"])
@pytest.mark.parametrize(("micro_batch_size", "labels"), [(1, "server"), (3, "client")])
def test_messages_of_clients_that_train_nothing(micro_batch_size: int, labels: Labels, frozen: str) -> None:
    split = Split("llama", labels, micro_batch_size, frozen=frozen)
    split.train_in_messages()
    assert_equal(split.adapters(), reference(frozen))


def test_masks_do_not_depend_on_whether_gradients_come_down() -> None:
    """Clients without an adapter: some get the gradient of their cut, which nothing uses, and others get none."""
    ends = [
        Split("llama", frozen="abc", one_way=one_way, dropout=dropout, micro_batch_size=2)
        for one_way, dropout in (("abc", 0.3), ("", 0.3), ("", 0.0))
    ]
    for split in ends:
        split.train_over_streams()
    assert_equal(ends[0].adapters(), ends[1].adapters())
    dropped, whole = (split.half.adapters() for split in ends[1:])
    assert all((dropped[name][0] - whole[name][0]).abs().max() > 1e-7 for name in whole), "dropout does something"


def test_without_clipping_and_for_a_single_client() -> None:
    free = replace(TRAIN, clip=0.0)
    split = Split("llama", train=free)
    expected = plain(split, free)
    split.train_over_streams()
    assert_equal(split.adapters(), expected)
    alone = Split("llama", splits={"a": 2})
    expected = plain(alone)
    alone.train_over_streams()
    assert_equal(alone.adapters(), expected)


def test_by_arrival_a_client_after_another_is_the_plain_loop_in_that_order() -> None:
    """What nobody disturbs is one client's whole round after another's: each goes on from the half as it is then."""
    split = Split("llama", order="arrival")
    for client in split.splits:
        train_client(split.clients[client], Loopback(split.servers[client]), STEPS)
    assert split.half.steps == dict.fromkeys(SPLITS, STEPS)
    moved = split.half.adapters()
    again = Split("llama")
    again.train_over_streams()
    assert any(not torch.equal(moved[name][0], again.half.adapters()[name][0]) for name in moved)


class Broken(Exception):
    pass


def test_a_client_that_fails_in_the_middle_of_a_step_leaves_no_part_of_it() -> None:
    """Its micro-batches before the failure are dropped; its whole steps stay."""

    class Fails(Loopback):
        def send(self, frame: Frame) -> None:
            if len(self.seen) == 5:  # two micro-batches a step: one of the third step has been sent
                raise Broken
            self.seen.append(frame)
            super().send(frame)

        seen: list[Frame]

    split, expected = Split("llama", micro_batch_size=2), Split("llama")

    def one(client: str, steps: int) -> None:
        link = Fails(split.servers[client]) if client == "b" else Loopback(split.servers[client])
        link.seen = []  # type: ignore[attr-defined]
        try:
            train_client(split.clients[client], link, steps)
        except Broken:
            split.servers[client].close()

    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(one, client, STEPS) for client in SPLITS]:
            future.result(300)
    assert split.half.steps == {"a": STEPS, "b": 2, "c": STEPS}
    assert expected  # the same round in which b ends after two steps
    link = {client: Loopback(expected.servers[client]) for client in SPLITS}
    for step in range(STEPS):
        for client in SPLITS:
            if client != "b" or step < 2:
                trainer = expected.clients[client]
                trainer.begin()
                link[client].send(trainer.forward(0))
                trainer.backward(0, link[client].receive())
                trainer.step()
            elif step == 2:
                expected.servers[client].close()
    assert_equal({"server": split.half.adapters()}, {"server": expected.half.adapters()})


def test_a_step_that_is_far_larger_than_the_others_is_refused_before_it_moves_what_all_share() -> None:
    split = Split("llama", order="arrival", train=replace(TRAIN, clip=0.0))
    for client in ("a", "b"):
        train_client(split.clients[client], Loopback(split.servers[client]), STEPS)
    before, server, trainer = split.half.adapters(), split.servers["c"], split.clients["c"]
    trainer.begin()
    frame = trainer.forward(0)
    for parameter in server.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * 1e6)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 0 has norm .* times the .* of the others"):
        server(frame)
    server.close()
    assert_equal({"server": split.half.adapters()}, {"server": before})
    assert split.half.steps["c"] == 0


FREE = replace(TRAIN, clip=0.0)


def take(half: SharedHalf, client: str, norm: float) -> None:
    """A step whose gradient has this norm."""
    parameters = [p for layer in adapted_layers(half._part).values() for p in layer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, norm / math.sqrt(sum(p.numel() for p in parameters)))
    found = float(half.optimizer.grad_norm())
    assert found == pytest.approx(norm)
    half.take_step(client, 0, found**2, 0.0)


def refused(half: SharedHalf, client: str, norm: float, says: str) -> None:
    before = half.adapters()
    with pytest.raises(FloatingPointError, match=says):
        take(half, client, norm)
    half.optimizer.drop_gradients()
    assert_equal({"server": half.adapters()}, {"server": before})


def test_no_minority_sets_what_the_others_may_send() -> None:
    """Neither by gradients that are next to nothing, nor by coming first."""
    half = Split("llama", train=FREE).half
    refused(half, "a", 1001.0, "has norm 1e.03, over 1000 times the 1 that is usual; set train.clip")
    take(half, "a", 1e-30)
    take(half, "b", 0.9)  # the only other one says 1e-30
    take(half, "c", 0.5)
    take(half, "a", 499.0)
    half._norms["a"] = 1e-30
    refused(half, "a", 901.0, "over 1000 times the 0.9 of the others")
    pair = Split("llama", train=FREE, splits={"a": 2, "b": 1}).half
    for norm in (1e-30, 0.9):
        take(pair, "a", 1e-30)
        take(pair, "b", norm)


def test_what_is_usual_is_known_from_the_rounds_before() -> None:
    norms: dict[str, float] = {}
    first = Split("llama", train=FREE, norms=norms).half
    for client in SPLITS:
        take(first, client, 1e-3)
    assert norms == pytest.approx(dict.fromkeys(SPLITS, 1e-3))
    refused(Split("llama", train=FREE, norms=norms).half, "a", 1.1, "over 1000 times the 0.001 of the others")
    clipped = Split("llama", norms={}).half
    take(clipped, "a", 1e9)  # counts as what clipping makes of it
    take(clipped, "b", 1e-3)


def test_parts_of_a_half_share_their_adapters() -> None:
    split = Split("llama")
    trained = {
        client: {id(p) for p in server.model.parameters() if p.requires_grad}
        for client, server in split.servers.items()
    }
    assert trained["c"] and trained["c"] < trained["a"] < trained["b"]
