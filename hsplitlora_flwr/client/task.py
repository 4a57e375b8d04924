"""A client's work on a task: its part of the model in memory, and each step from the first to the last.

A cut model is trained and evaluated over the stream in one go, or over messages turn by turn, each turn in a process of
its own. A model that is not cut needs no server during the task and is trained in one turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hsplitlora_flwr.data.collate import Batch, Tokens, evaluation_batches, training_batches
from hsplitlora_flwr.evaluation.perplexity import ClientEvaluator, Evaluation, evaluate, evaluate_client
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import extract, inject
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.messages import EVALUATE, PROBE, Description, Outcome, Progress, Task
from hsplitlora_flwr.models.parts import ClientModel, HeadModel, WholeModel
from hsplitlora_flwr.models.placement import pick_device
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.client import (
    ClientTrainer,
    TrainingRecord,
    load_client,
    load_whole,
    take_turn,
    train_client,
)
from hsplitlora_flwr.training.cut import SeededCut
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.whole import train_whole
from hsplitlora_flwr.transport.frames import Finish, Frame
from hsplitlora_flwr.transport.link import Link


@dataclass(frozen=True)
class OwnText:
    """A client's examples: what it trains on, and what it keeps apart to be measured on."""

    train: Sequence[Tokens]
    held_out: Sequence[Tokens]


@dataclass(frozen=True)
class Assignment:
    """A task, and what this node does it with.

    Parameters
    ----------
    task : Task
        What to do.
    text : OwnText
        The client's examples.
    seed : int
        Of the order of its batches.
    transform : SeededCut, optional
        What is done to the cut activation before it leaves, where the model is cut.
    """

    task: Task
    text: OwnText
    seed: int
    transform: SeededCut | None = None

    def load_split(self, changes: Mapping[str, Change]) -> tuple[ClientModel, HeadModel | None]:
        """Embeddings and blocks below the cut, with the update; beside them norm and head, where labels stay."""
        task, model = self.task, self.task.config.model
        return load_client(
            model.path,
            task.split,
            model.dtype,
            pick_device(model.device),
            changes,
            quantise=model.quantise,
            head=task.labels_stay,
        )

    def load_whole(self, changes: Mapping[str, Change]) -> WholeModel:
        """All of the model, with the update."""
        model = self.task.config.model
        return load_whole(model.path, model.dtype, pick_device(model.device), changes, quantise=model.quantise)

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """The batches of training from a global step on."""
        return training_batches(self.text.train, self.task.config.train.batch_size, self.seed, first_step)

    def held_out_batches(self) -> list[Batch]:
        """The text that the client is measured on."""
        return list(evaluation_batches(self.text.held_out, self.task.config.evaluation.batch_size))


class ClientTask(ABC):
    """A client in one task.

    Parameters
    ----------
    given : Assignment
    model : ClientModel or WholeModel
        Its part, with the accumulated update and without adapters; gets them.
    start : Mapping[str, Factors]
        Adapters to go on from; see :class:`~hsplitlora_flwr.messages.Task`.
    """

    def __init__(self, given: Assignment, model: ClientModel | WholeModel, start: Mapping[str, Factors]) -> None:
        task = given.task
        self.given, self.task, self.model = given, task, model
        adapters = inject(model, task.specs, task.seed, start, freeze_a=task.method.freeze_a)
        self.optimizer = AdapterOptimizer(adapters, task.config.train)
        model.train()
        if task.checkpointing:
            checkpoint_blocks(model)
        self.record = TrainingRecord()
        self.importance: dict[str, float] = {}
        self.found: Evaluation | None = None

    @abstractmethod
    def work(self, link: Link) -> None:
        """Do the task over an open stream."""

    @abstractmethod
    def take_turn(self, answers: Sequence[Frame]) -> tuple[list[Frame], bool]:
        """Go on from the server's answers, with the frames that it needs next; True when those are the last."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next turn needs of this one, as tensors and as what JSON holds."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave: nothing, unless a task keeps something."""
        assert not tensors and not text

    def outcome(self, progress: Progress, description: Description) -> Outcome:
        """The result of the task."""
        record = self.record
        found = {"nll": self.found.nll, "label-tokens": self.found.tokens} if self.found else {}
        return Outcome(
            adapters=extract(self.model),
            importance=self.importance,
            losses=record.losses,
            metrics={
                "resident-parameters": self.resident_parameters(),
                "tokens": record.tokens,
                "label-tokens": record.label_tokens,
                **progress.metrics(record.seconds),
                **found,
            },
            description=description,
        )

    def resident_parameters(self) -> int:
        """Parameters that the client holds, adapters included."""
        return self.model.resident_parameters()


class SplitTask(ClientTask):
    """A task with the client's part of a cut model; beside it norm and head, where labels stay.

    Parameters
    ----------
    given : Assignment
    changes : Mapping[str, Change]
        The accumulated update of the client's layers; merged, and not kept.
    start : Mapping[str, Factors], optional
        As for :class:`ClientTask`.
    """

    def __init__(
        self, given: Assignment, changes: Mapping[str, Change], start: Mapping[str, Factors] = MappingProxyType({})
    ) -> None:
        self.part, self.head = given.load_split(changes)
        super().__init__(given, self.part, start)

    def resident_parameters(self) -> int:
        """With the head's, that the blocks' part does not hold: with tied embeddings it has none of its own."""
        held = {id(parameter) for parameter in self.part.parameters()}
        beside = self.head.parameters() if self.head else ()
        return super().resident_parameters() + sum(p.numel() for p in beside if id(p) not in held)


class SplitTraining(SplitTask):
    """Train the client's adapters and score its weights on the way, or score them alone."""

    def __init__(
        self, given: Assignment, changes: Mapping[str, Change], start: Mapping[str, Factors] = MappingProxyType({})
    ) -> None:
        super().__init__(given, changes, start)
        end = self.task.first_step + (0 if self.task.forward_only else self.task.scored_steps)
        self._scorer = Scorer(self.part, end=end, adapted=self.task.kind != PROBE)
        self._trainer = self._trainer_from(self.task.first_step)
        self.record = self._trainer.record

    def work(self, link: Link) -> None:
        """All steps, over the stream."""
        train_client(self._trainer, link, self.task.steps, self.task.config.transport.in_flight)
        self.importance = self._scorer.scores()

    def take_turn(self, answers: Sequence[Frame]) -> tuple[list[Frame], bool]:
        """To the next frames that the server must answer."""
        frames = take_turn(self._trainer, answers, self.task.first_step + self.task.steps)
        self.importance = self._scorer.scores()
        return frames, isinstance(frames[0], Finish)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Adapters and optimizer; the step, the norm that the server is to learn of, and what was recorded."""
        text = {
            "global-step": self._trainer.global_step,
            "grad_norm_sq": self._trainer.grad_norm_sq,
            "record": asdict(self._trainer.record),
            "importance": self.importance,
        }
        return self.optimizer.tensors(), text

    def restore(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.optimizer.restore(tensors)
        self._trainer = self._trainer_from(int(text["global-step"]))
        self._trainer.grad_norm_sq = float(text["grad_norm_sq"])
        self._trainer.record = self.record = TrainingRecord(**text["record"])
        self._scorer.restore(text["importance"])

    def _trainer_from(self, first_step: int) -> ClientTrainer:
        task, transport = self.task, self.task.config.transport
        return ClientTrainer(
            self.part,
            self.optimizer,
            self.given.training_batches(first_step),
            first_step=first_step,
            head=self.head,
            micro_batch_size=task.config.train.micro_batch_size,
            up=transport.up,
            down=transport.down,
            transform=self.given.transform,
            decorrelate=0.0 if task.kind == PROBE else task.config.split.decorrelate,
            forward_only=task.forward_only,
            scorer=self._scorer,
        )


class SplitEvaluation(SplitTask):
    """Measure the model on the client's own text, forward only."""

    def __init__(
        self, given: Assignment, changes: Mapping[str, Change], start: Mapping[str, Factors] = MappingProxyType({})
    ) -> None:
        super().__init__(given, changes, start)
        codecs = self.task.config.transport.up, self.task.config.transport.down
        self._evaluator = ClientEvaluator(self.part, self.head, given.held_out_batches(), *codecs, given.transform)

    def work(self, link: Link) -> None:
        """All batches, over the stream."""
        self.found = evaluate_client(self._evaluator, link)

    def take_turn(self, answers: Sequence[Frame]) -> tuple[list[Frame], bool]:
        """All batches in the first turn, all answers in the second."""
        if not answers:
            return [self._evaluator.ask(index) for index in range(len(self._evaluator))], False
        for index, answer in enumerate(answers):
            self._evaluator.take(index, answer)
        self.found = self._evaluator.found()
        return [], True


class WholeModelTask(ClientTask):
    """Train, or measure, a model that is not cut: nobody else is needed."""

    def __init__(
        self, given: Assignment, changes: Mapping[str, Change], start: Mapping[str, Factors] = MappingProxyType({})
    ) -> None:
        self.whole = given.load_whole(changes)
        super().__init__(given, self.whole, start)

    def work(self, link: Link) -> None:
        """There is no stream for it."""
        raise TypeError("a model that is not cut has no use for a stream")

    def take_turn(self, answers: Sequence[Frame]) -> tuple[list[Frame], bool]:
        """All of it."""
        if self.task.kind == EVALUATE:
            self.found = evaluate(self.whole, self.given.held_out_batches())
            return [], True
        first_step = self.task.first_step
        self.record = train_whole(
            self.whole,
            self.optimizer,
            self.given.training_batches(first_step),
            first_step=first_step,
            steps=self.task.steps,
            micro_batch_size=self.task.config.train.micro_batch_size,
        )
        return [], True


def kind_of(task: Task) -> type[SplitTraining | SplitEvaluation | WholeModelTask]:
    """What does a task."""
    if not task.method.split:
        return WholeModelTask
    return SplitEvaluation if task.kind == EVALUATE else SplitTraining
