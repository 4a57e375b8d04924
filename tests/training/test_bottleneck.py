"""Training through a bottleneck, whatever the family and the way: the gradients are those of one model in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.allowance import Allowance, Refused
from hsplitlora_flwr.training.client import ClientTrainer, take_turn, train_client
from hsplitlora_flwr.training.cut import CutTransform, SeededCut, chained
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerEvaluator, ServerTrainer
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from hsplitlora_flwr.transport.frames import Frame
from tests.tiny import CONFIGS, random_batches, tiny_model

TRAIN = TrainConfig(optimizer="sgd", clip=0.0, lr=1.0)  # so that a step moves by the gradient
WIDTH = 5


def bottleneck(hidden: int) -> Bottleneck:
    draws = torch.Generator().manual_seed(7)
    shapes = (hidden,), (WIDTH, hidden), (WIDTH, hidden)
    return Bottleneck(*(torch.randn(*shape, generator=draws, dtype=torch.float64) / hidden**0.5 for shape in shapes))


class Run:
    """Both sides of a run through the bottleneck, with adapters that already do something."""

    def __init__(
        self,
        name: str,
        labels: Literal["server", "client"] = "server",
        micro_batch_size: int = 0,
        checkpointing: bool = False,
        trains: bool = True,
    ) -> None:
        self.client, self.server, *head = split_model(tiny_model(name), 2, labels)
        self.head = head[0] if head else None
        specs = {layer: AdapterSpec(3, 6.0) for part in (self.client, self.server) for layer, _ in part.linears()}
        self.own = inject(self.client, specs, "seed") if trains else []
        self.others = inject(self.server, specs, "seed")
        draws = torch.Generator().manual_seed(1)
        for parameter in (*self.own, *self.others):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) / 9)
        self.narrow = bottleneck(int(self.client.decoder.config.hidden_size))
        self.start = [parameter.detach().clone() for parameter in (*self.own, *self.others)]
        self.wanted = self.whole_gradients()
        for part in (self.client.train(), self.server.train()) if checkpointing else ():
            checkpoint_blocks(part)
        narrowed = CutTransform("width 5", lambda cut, _: self.narrow.narrow(cut), bottleneck=self.narrow)
        halved = CutTransform("half", lambda code, _: code / 2)
        self.trainer = ClientTrainer(
            self.client.train(),
            AdapterOptimizer(self.own, TRAIN),
            self.batches(),
            first_step=0,
            head=self.head,
            micro_batch_size=micro_batch_size,
            up="float64",
            transform=SeededCut(chained(narrowed, halved) or narrowed, "seed"),
            forward_only=not trains,
        )
        self.answers = ServerTrainer(
            self.server.train(),
            OwnHalf(AdapterOptimizer(self.others, TRAIN)),
            down="float64",
            allowance=Allowance(forward_only=not trains),
            bottleneck=self.narrow,
        )

    def batches(self) -> Iterator[Batch]:
        return random_batches()

    def whole_gradients(self) -> list[Tensor]:
        """Of one step, by autograd through client, matrices and server in one graph."""
        batch, parameters = next(self.batches()), [*self.own, *self.others]
        cut = self.client(batch.input_ids, batch.attention_mask)
        code = (cut - self.narrow.mean) @ self.narrow.encoder.T / 2
        widened = code @ self.narrow.decoder + self.narrow.mean
        if self.head is None:
            loss = self.server(widened, batch.attention_mask, batch.labels, batch.label_tokens).loss
        else:
            hidden = self.server(widened, batch.attention_mask)
            loss = self.head(hidden, batch.labels, batch.label_tokens).loss
        return list(torch.autograd.grad(loss, parameters))

    def compare(self) -> None:
        """Once both sides have taken their step."""
        for start, parameter, wanted in zip(self.start, (*self.own, *self.others), self.wanted, strict=True):
            assert wanted.abs().max() > 0
            torch.testing.assert_close(start - parameter, wanted, rtol=1e-7, atol=1e-13)


class Link:
    """Hands frames over, and notes in how many numbers a token crossed."""

    def __init__(self, trainer: ServerTrainer) -> None:
        self._trainer, self._waiting, self.widths = trainer, list[Frame](), set[int]()

    def send(self, frame: Frame) -> None:
        self._waiting.append(frame)

    def receive(self) -> Frame:
        frame = self._waiting.pop(0)
        answer = self._trainer(frame)
        crossed = (getattr(frame, "cut", None), getattr(answer, "gradient", None))
        self.widths |= {tensor.shape[-1] for tensor in crossed if tensor is not None}
        return answer


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_one_graph(name: str) -> None:
    run = Run(name)
    train_client(run.trainer, link := Link(run.answers), 1)
    assert link.widths == {WIDTH}
    run.compare()


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(("micro_batch_size", "checkpointing"), [(0, True), (3, False), (1, True)])
@pytest.mark.parametrize("trains", [True, False])
def test_so_they_are_on_every_way(
    labels: Literal["server", "client"], micro_batch_size: int, checkpointing: bool, trains: bool
) -> None:
    run = Run("llama", labels, micro_batch_size, checkpointing, trains)
    train_client(run.trainer, Link(run.answers), 1, in_flight=2 if micro_batch_size else 1)
    run.compare()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_so_they_are_in_turns(labels: Literal["server", "client"]) -> None:
    run = Run("gpt2", labels, 2)
    answers: list[Frame] = []
    while not run.answers.finished:
        frames = take_turn(run.trainer, answers, 1)
        run.trainer.batches = run.batches()  # each turn is of a client that knows nothing
        answers = [run.answers(frame) for frame in frames]
    run.compare()


def test_what_comes_in_another_width_is_refused() -> None:
    run, wide = Run("llama"), Run("llama")
    wide.answers._bottleneck = None
    run.trainer.begin()
    sent = run.trainer.forward(0)
    with pytest.raises(Refused, match=r"cut activation \(4, 11, 5\) must be \(4, 11, \d+\)"):
        wide.answers(sent)
    with pytest.raises(Refused, match="cut activation"):
        ServerEvaluator(wide.server)(sent)
    assert ServerEvaluator(run.server, bottleneck=run.narrow)(sent)
