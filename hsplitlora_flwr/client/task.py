"""A client while it takes part in a round: its part of the model in memory, and its way through a task.

The same participant works over the stream, from start to end in one go, and over messages, turn by turn, each in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from hsplitlora_flwr.data.collate import Batch, Tokens, evaluation_batches, training_batches
from hsplitlora_flwr.evaluation.perplexity import ClientEvaluator, Evaluation, evaluate, evaluate_client
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import extract, inject
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.messages import EVALUATE, PROBE, Description, Outcome, Progress, Task
from hsplitlora_flwr.models.placement import pick_device
from hsplitlora_flwr.models.split import ClientModel, HeadModel, WholeModel
from hsplitlora_flwr.planning.importance import scoring
from hsplitlora_flwr.training.client import (
    ClientTrainer,
    TrainingRecord,
    load_client,
    load_whole,
    take_turn,
    train_client,
)
from hsplitlora_flwr.training.cut import SeededCut
from hsplitlora_flwr.training.recompute import recompute_blocks
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.whole import train_whole
from hsplitlora_flwr.transport.frames import Finish, Frame
from hsplitlora_flwr.transport.link import Link


@dataclass(frozen=True)
class OwnText:
    """A client's examples: what it trains on, and what it keeps apart to be measured on."""

    train: Sequence[Tokens]
    held_out: Sequence[Tokens]


class Participant:
    """A client in one task.

    Parameters
    ----------
    task : Task
        What to do; its tensors are the parameters below.
    text : OwnText
        The client's examples.
    changes : Mapping[str, Change]
        The accumulated update of its layers.
    seed : int
        Of the order of its batches.
    start : Mapping[str, Factors], optional
        Adapters to go on from; see :class:`~hsplitlora_flwr.messages.Task`.
    transform : SeededCut, optional
        What is done to the cut activation before it leaves, where the model is cut.
    """

    def __init__(
        self,
        task: Task,
        text: OwnText,
        changes: Mapping[str, Change],
        seed: int,
        start: Mapping[str, Factors] | None = None,
        transform: SeededCut | None = None,
    ) -> None:
        config, train = task.config, task.config.train
        device, path, dtype = pick_device(config.model.device), config.model.path, config.model.dtype
        quantise = config.model.quantise
        self.task, self.text, self._seed, self._transform = task, text, seed, transform
        self.model: ClientModel | WholeModel
        self.head: HeadModel | None = None
        if task.method.split:
            self.model, self.head = load_client(
                path, task.split, dtype, device, changes, quantise=quantise, head=task.labels_stay
            )
        else:
            self.model = load_whole(path, dtype, device, changes, quantise=quantise)
        adapters = inject(self.model, task.specs, task.seed, start, freeze_a=task.method.freeze_a)
        self.optimizer = AdapterOptimizer(adapters, train)
        self.model.train()
        if task.recompute:
            recompute_blocks(self.model)
        # |W * gradient| is not additive over parts of a batch, so a probe takes the batch whole
        self._micro_batch_size = 0 if task.kind == PROBE else train.micro_batch_size
        self._record = TrainingRecord()
        self._importance: dict[str, float] = {}
        self._trainer: ClientTrainer | None = None
        self._evaluator: ClientEvaluator | None = None
        self._found: Evaluation | None = None
        if isinstance(self.model, ClientModel) and task.kind == EVALUATE:
            wires = config.transport.up, config.transport.down
            self._evaluator = ClientEvaluator(self.model, self.head, self._held_out(), *wires, transform)
        elif isinstance(self.model, ClientModel):
            self._trainer = self._make_trainer(self.model, task.first_step)
            self._record = self._trainer.record

    @property
    def is_whole(self) -> bool:
        """The model is not cut."""
        return isinstance(self.model, WholeModel)

    def work_alone(self) -> None:
        """Do the task with a model that is not cut."""
        assert isinstance(self.model, WholeModel)
        if self.task.kind == EVALUATE:
            self._found = evaluate(self.model, self._held_out())
            return
        self._record = train_whole(
            self.model,
            self.optimizer,
            self._batches(self.task.first_step),
            first_step=self.task.first_step,
            steps=self.task.steps,
            micro_batch_size=self._micro_batch_size,
        )

    def work(self, link: Link) -> None:
        """Do the task over an open stream."""
        if self._evaluator:
            self._found = evaluate_client(self._evaluator, link)
            return
        assert self._trainer
        with self._scoring() as self._importance:
            train_client(self._trainer, link, self.task.steps, self.task.config.transport.in_flight)

    def take_turn(self, answers: Sequence[Frame]) -> tuple[list[Frame], bool]:
        """Go on from the server's answers, with the frames that it needs next; True when those are the last."""
        if self._evaluator:
            if not answers:
                return [self._evaluator.ask(index) for index in range(len(self._evaluator))], False
            for index, answer in enumerate(answers):
                self._evaluator.take(index, answer)
            self._found = self._evaluator.found()
            return [], True
        assert self._trainer
        with self._scoring() as scores:
            frames = take_turn(self._trainer, answers, self.task.first_step + self.task.steps)
        self._importance = {name: self._importance.get(name, 0.0) + score for name, score in scores.items()}
        return frames, isinstance(frames[0], Finish)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next turn needs of this one, as tensors and as what JSON holds."""
        if self._trainer is None:
            return {}, {}
        text = {
            "global-step": self._trainer.global_step,
            "square": self._trainer.square,
            "record": asdict(self._trainer.record),
            "importance": self._importance,
        }
        return self.optimizer.tensors(), text

    def restore(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        if self._trainer is None:
            return
        assert isinstance(self.model, ClientModel)
        self.optimizer.restore(tensors)
        self._trainer = self._make_trainer(self.model, int(text["global-step"]))
        self._trainer.square = float(text["square"])
        self._trainer.record = self._record = TrainingRecord(**text["record"])
        self._importance = dict(text["importance"])

    def outcome(self, progress: Progress, description: Description) -> Outcome:
        """The result of the task."""
        record = self._record
        found = {"nll": self._found.nll, "label-tokens": self._found.tokens} if self._found else {}
        return Outcome(
            adapters=extract(self.model),
            importance=self._importance,
            losses=record.losses,
            metrics={
                "resident-parameters": self.model.resident_parameters() + self._parameters_of_head(),
                "tokens": record.tokens,
                "label-tokens": record.label_tokens,
                **progress.metrics(record.seconds),
                **found,
            },
            description=description,
        )

    def _make_trainer(self, model: ClientModel, first_step: int) -> ClientTrainer:
        return ClientTrainer(
            model,
            self.optimizer,
            self._batches(first_step),
            first_step=first_step,
            head=self.head,
            micro_batch_size=self._micro_batch_size,
            up=self.task.config.transport.up,
            down=self.task.config.transport.down,
            transform=self._transform,
            forward_only=self.task.forward_only,
        )

    def _held_out(self) -> list[Batch]:
        return list(evaluation_batches(self.text.held_out, self.task.config.evaluation.batch_size))

    def _batches(self, first_step: int) -> Iterator[Batch]:
        return training_batches(self.text.train, self.task.config.train.batch_size, self._seed, first_step)

    def _scoring(self) -> AbstractContextManager[dict[str, float]]:
        scores = self.task.kind == PROBE and not self.task.forward_only
        return scoring(self.model) if scores else nullcontext({})

    def _parameters_of_head(self) -> int:
        """Parameters of the head that the blocks' part does not hold: with tied embeddings it has none of its own."""
        held = {id(parameter) for parameter in self.model.parameters()}
        return sum(p.numel() for p in self.head.parameters() if id(p) not in held) if self.head else 0
