"""The client's side of split fine-tuning: forward to the cut, send, receive the gradient, backward.

A client that trains nothing computes forward alone: it keeps no graph, no gradient comes back, and it goes on with the
next step while the server trains on the last one::

    trains          forward 0 . . . . backward 0  forward 1 . . . . backward 1
    forward alone   forward 0  forward 1  . . .   forward 2  . . .                   two micro-batches ahead at most

Where the labels stay with it, the loss of a step needs what the server makes of that step, so there each one waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from hsplitlora_flwr.copies import to_device
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import attach_changes, draw_masks, merge_changes, takes_changes
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.loading import load_causal_lm, load_client_parts
from hsplitlora_flwr.models.parts import ClientModel, HeadModel, ModelPart, WholeModel
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import whole_model
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.training.cut import SeededCut
from hsplitlora_flwr.training.decorrelation import penalty_gradient
from hsplitlora_flwr.training.memory import RoomForPeaks
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.codecs import pack, unpack
from hsplitlora_flwr.transport.frames import Activation, Enough, Finish, Frame, Gradient, Hidden, HiddenGradient, Loss
from hsplitlora_flwr.transport.link import Link

P = TypeVar("P", bound=ModelPart)


@dataclass
class _Step:
    """A client's step under way: its micro-batches, and what of them waits for the server."""

    micro_batches: Sequence[Batch] = ()
    label_tokens: int = 0
    tokens: int = 0
    cuts: dict[int, Tensor] = field(default_factory=dict)
    server_grad_norm_sq: float = 0.0

    @classmethod
    def of(cls, batch: Batch, micro_batch_size: int) -> _Step:
        parts = batch.micro_batches(micro_batch_size) if micro_batch_size else [batch]
        return cls(parts, batch.label_tokens, int(batch.attention_mask.sum()))

    def ends_with(self, index: int) -> bool:
        return index == len(self.micro_batches) - 1


@dataclass
class TrainingRecord:
    """What a client's round was: a loss per step, labelled and real tokens, seconds."""

    losses: list[float] = field(default_factory=list)
    label_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


def load_client(
    path: str,
    split: int,
    dtype: str,
    device: str,
    changes: Mapping[str, Change],
    *,
    quantise: str = "none",
    head: bool = False,
) -> tuple[ClientModel, HeadModel | None]:
    """The client's part with the accumulated update: in the weights where they hold it exactly, else beside them.

    Parameters
    ----------
    path, split, dtype, device, quantise, head
        As for :func:`hsplitlora_flwr.models.load_client_parts`.
    changes : Mapping[str, Change]
        The update by absolute layer name.
    """
    model, tail = load_client_parts(path, split, dtype, device, quantise, head=head)
    return _with_changes(model, changes, quantise), tail


def load_whole(
    path: str, dtype: str, device: str, changes: Mapping[str, Change], *, quantise: str = "none"
) -> WholeModel:
    """The whole model with the accumulated update, for methods that do not split; parameters as above."""
    model = load_causal_lm(path, dtype, device, quantise)
    return _with_changes(whole_model(model, find_family(model.config)), changes, quantise)


def _with_changes(model: P, changes: Mapping[str, Change], quantise: str) -> P:
    if takes_changes(model.dtype, quantise):
        weights = dict(model.linears())
        merge_changes(model, changes, lambda name: cast(Tensor, weights[name].weight))
    else:
        attach_changes(model, changes)
    return model


class ClientTrainer:
    """The client's half of one training step after another.

    A step is :meth:`begin`, then for every micro-batch :meth:`forward` and :meth:`backward`, then :meth:`step`. What
    carries the frames stands outside: :func:`train_client` for a stream, :func:`take_turn` for messages. Forward alone
    it is :meth:`begin`, :meth:`forward` and :meth:`step`; losses are heard of (:meth:`hear`) when they come.

    Parameters
    ----------
    model : ClientModel
        The client's part, with its adapters; none during a probe.
    optimizer : AdapterOptimizer
        Over those adapters.
    batches : Iterator[Batch]
        One per step.
    first_step : int
        Global step of the first batch.
    head : HeadModel, optional
        Norm, head and loss, where labels stay with the client.
    micro_batch_size : int
        Rows that travel at once; gradients accumulate over the batch. 0 = the whole batch.
    up : str
        Codec of what it sends; see :func:`hsplitlora_flwr.transport.codecs.pack`.
    down : str, optional
        Codec of what the server sends; see :func:`hsplitlora_flwr.transport.codecs.unpack`.
    transform : SeededCut, optional
        What is done to the cut activation before it leaves.
    decorrelate : float
        Weight of the penalty of :mod:`hsplitlora_flwr.training.decorrelation`.
    forward_only : bool
        The part has no adapters, and nothing of its forward pass is kept.
    scorer : Scorer, optional
        Scores the weights in the first steps.

    Attributes
    ----------
    global_step : int
        The step that comes next.
    record : TrainingRecord
        Of the steps so far.
    """

    def __init__(
        self,
        model: ClientModel,
        optimizer: AdapterOptimizer,
        batches: Iterator[Batch],
        *,
        first_step: int,
        head: HeadModel | None = None,
        micro_batch_size: int = 0,
        up: str = "float32",
        down: str | None = None,
        transform: SeededCut | None = None,
        decorrelate: float = 0.0,
        forward_only: bool = False,
        scorer: Scorer | None = None,
    ) -> None:
        self.model, self.optimizer, self.head, self.forward_only = model, optimizer, head, forward_only
        self._scorer = scorer or Scorer(model, end=0)
        self.global_step = first_step
        self.record = TrainingRecord()
        self._grad_norm_sq: Tensor | float = 0.0
        self.batches, self._micro_batch_size, self._up = batches, micro_batch_size, up
        self._down, self._transform, self._decorrelate = down, transform, decorrelate
        self._device = model.device
        self._room = RoomForPeaks()
        self._step = _Step()
        self._unheard: deque[_Step] = deque()  # steps whose loss is not known yet
        self._loss = 0.0

    @property
    def grad_norm_sq(self) -> float:
        """Squared norm of this side's gradient in the last step; its device is waited for when somebody asks."""
        return float(self._grad_norm_sq)

    @grad_norm_sq.setter
    def grad_norm_sq(self, value: float) -> None:
        self._grad_norm_sq = value

    @property
    def runs_ahead(self) -> bool:
        """Whether a step needs nothing of the server's answers to the one before."""
        return self.forward_only and self.head is None

    def begin(self) -> int:
        """Take the next batch; returns its number of micro-batches."""
        batch = next(self.batches)
        self._room.make_for(batch)
        self._step = _Step.of(batch, self._micro_batch_size)
        self._unheard.append(self._step)
        return len(self._step.micro_batches)

    def forward(self, index: int) -> Activation:
        """Compute a micro-batch up to the cut."""
        step, micro = self._step, self._step.micro_batches[index]
        draw_masks(self.model, self.global_step, index)
        with torch.no_grad() if self.forward_only else self._scorer.watching(self.global_step):
            cut = self.model(*(to_device(each, self._device) for each in (micro.input_ids, micro.attention_mask)))
            if self._transform:
                cut = self._transform(cut, self.global_step, index)
        if not self.forward_only:
            step.cuts[index] = cut
        labels = micro.labels if self.head is None else torch.empty(0, dtype=torch.int64)
        values, scale = pack(cut.detach(), self._up)
        return Activation(
            self.global_step,
            values,
            scale,
            micro.attention_mask,
            labels,
            step.label_tokens,
            step.ends_with(index),
            self.grad_norm_sq,
        )

    def predict(self, index: int, hidden: Hidden) -> HiddenGradient:
        """Where labels stay: the loss of what the server made of a micro-batch, and its gradient."""
        assert self.head is not None
        micro = self._step.micro_batches[index]
        shape = (*micro.input_ids.shape, int(self.model.decoder.config.hidden_size))
        state = unpack(hidden.hidden, hidden.scale, self.model.dtype, self._device, self._down, shape).requires_grad_()
        output = self.head(state, micro.labels, self._step.label_tokens)
        output.loss.backward()
        assert state.grad is not None
        return HiddenGradient(*pack(state.grad, self._up), float(output.loss.detach()))

    def backward(self, index: int, answer: Frame) -> None:
        """Take a micro-batch's :class:`Gradient` back through the blocks, into the adapters; forward alone there is its
        :class:`Loss` and nothing to do."""
        last = self._step.ends_with(index)
        if isinstance(answer, Loss):
            self.hear(answer, last)
            return
        assert isinstance(answer, Gradient)
        cut = self._step.cuts.pop(index)
        if cut.requires_grad:  # not when no block of the client has an adapter
            gradient = unpack(answer.gradient, answer.scale, cut.dtype, cut.device, self._down, cut.shape)
            if self._decorrelate:
                gradient = gradient + self._penalty(cut, self._step.micro_batches[index])
            with self._scorer.watching(self.global_step):  # what is computed again is scored too
                cut.backward(gradient)
        self._step.server_grad_norm_sq = answer.grad_norm_sq
        self._add(answer.loss, last)

    def _penalty(self, cut: Tensor, micro: Batch) -> Tensor:
        """The gradient of the penalty on what left, by the share of the step's tokens."""
        ids, mask = (to_device(each, self._device) for each in (micro.input_ids, micro.attention_mask))
        embeddings = self.model.decoder.get_input_embeddings()(ids)
        weight = self._decorrelate * int(micro.attention_mask.sum()) / self._step.tokens
        return penalty_gradient(cut, embeddings, mask, weight)

    def hear(self, answer: Frame, last: bool) -> None:
        """Take note of a micro-batch's :class:`Loss`, forward alone; ``last`` says that its step had no more."""
        assert isinstance(answer, Loss)
        self._add(answer.total, last)

    def _add(self, loss: float, last: bool) -> None:
        self._loss += loss
        if last:
            step = self._unheard.popleft()
            self.record.losses.append(self._loss)
            self.record.label_tokens += step.label_tokens
            self.record.tokens += step.tokens
            self._loss = 0.0

    def step(self) -> None:
        """Move the adapters, once every micro-batch of the batch has been through."""
        norm = self.optimizer.grad_norm().double()
        self._grad_norm_sq = norm * norm
        self.optimizer.step(self.global_step, torch.sqrt(self._grad_norm_sq + self._step.server_grad_norm_sq))
        self.global_step += 1

    def drop(self) -> None:
        """Give the step up that is under way: the server takes no more (:class:`Enough`)."""
        self._step, self._loss = _Step(), 0.0
        self._unheard.clear()

    def finish(self) -> Finish:
        """What lets the server take its last step."""
        return Finish(self.grad_norm_sq)


def train_client(trainer: ClientTrainer, link: Link, steps: int, in_flight: int = 1) -> TrainingRecord:
    """Train the client's adapters for ``steps`` steps, together with the server behind ``link``.

    Parameters
    ----------
    trainer : ClientTrainer
    link : Link
        To the server.
    steps : int
        Number of steps.
    in_flight : int
        Micro-batches that may be under way at once: the client computes the next while the last one is on the wire or
        at the server. Gradients are added up in the same order whatever it is. A client that computes forward alone has
        one more, of whatever step comes next.
    """
    started = time.perf_counter()
    if trainer.runs_ahead:
        _run_ahead(trainer, link, steps, in_flight + 1)
    else:
        for _ in range(steps):
            if not _take_step(trainer, link, in_flight):
                break
    link.send(trainer.finish())
    link.receive()
    trainer.record.seconds += time.perf_counter() - started
    return trainer.record


def _take_step(trainer: ClientTrainer, link: Link, in_flight: int) -> bool:
    """A step; False if the server takes no more."""
    count, sent, predicted, done = trainer.begin(), 0, 0, 0
    while done < count:
        while sent < min(count, done + in_flight):
            link.send(trainer.forward(sent))
            sent += 1
        answer = link.receive()
        if isinstance(answer, Enough):
            for _ in range(sent - 1):
                link.receive()
            trainer.drop()
            return False
        if isinstance(answer, Hidden):
            link.send(trainer.predict(predicted, answer))
            predicted += 1
        else:
            trainer.backward(done, answer)
            done += 1
    trainer.step()
    return True


def _run_ahead(trainer: ClientTrainer, link: Link, steps: int, most: int) -> None:
    """Send the micro-batches of all steps, as many as ``most`` before the server has trained on the first of them."""
    waiting: deque[bool] = deque()  # for its loss, each; whether it is the last one of its step
    enough = False

    def hear() -> bool:
        answer, last = link.receive(), waiting.popleft()
        if not isinstance(answer, Enough):
            trainer.hear(answer, last)
        return isinstance(answer, Enough)

    for _ in range(steps):
        count = trainer.begin()
        for index in range(count):
            if len(waiting) == most:
                enough = hear() or enough
            if enough:
                break
            link.send(trainer.forward(index))
            waiting.append(index == count - 1)
        if enough:
            break
        trainer.step()
    while waiting:
        hear()


def take_turn(trainer: ClientTrainer, answers: Sequence[Frame], last_step: int) -> list[Frame]:
    """From the server's answers to the frames that it needs next, for a client that goes away between turns.

    The micro-batches of a step share a turn. No activation outlives it, so where there is a backward pass the forward
    pass is computed again before it; the same masks are dropped.

    Parameters
    ----------
    trainer : ClientTrainer
        At the step that the answers belong to.
    answers : Sequence[Frame]
        One for every frame of the turn before; none at the start of a round.
    last_step : int
        Global step after which training ends, with a :class:`Finish`.
    """
    count = trainer.begin()
    if answers and isinstance(answers[0], Enough):
        trainer.drop()
        return [trainer.finish()]
    if answers and isinstance(answers[0], Hidden):
        return [trainer.predict(index, answer) for index, answer in enumerate(cast(Sequence[Hidden], answers))]
    if answers:
        for index, answer in enumerate(answers):
            if not trainer.forward_only:
                trainer.forward(index)
            trainer.backward(index, answer)
        trainer.step()
        if trainer.global_step == last_step:
            return [trainer.finish()]
        count = trainer.begin()
    with torch.no_grad():
        return [trainer.forward(index) for index in range(count)]
