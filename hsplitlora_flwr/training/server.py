"""The server's side of split fine-tuning: one frozen base, and the adapters above each client's cut."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from hsplitlora_flwr.copies import to_device, to_numbers
from hsplitlora_flwr.lora.layers import draw_masks
from hsplitlora_flwr.models.parts import BodyModel, ModelPart, ServerModel
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.training.allowance import TRUSTED, Allowance, Refused, Step, check_activation
from hsplitlora_flwr.training.half import Seat, check_finite
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from hsplitlora_flwr.transport.codecs import pack, packed_shape, unpack
from hsplitlora_flwr.transport.frames import (
    Activation,
    Enough,
    Finish,
    Finished,
    Frame,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
)

P = TypeVar("P", bound=ModelPart)


@dataclass(frozen=True)
class StepReport:
    """What the server knows after a step: for progress and records."""

    step: int
    loss: float
    label_tokens: int
    tokens: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one client sent, where it is to go, and what its loss is divided by; ``alone`` if its part is scored."""

    model: ServerModel
    cut: Tensor
    attention_mask: Tensor
    labels: Tensor
    normalizer: int
    alone: bool = False


def differentiate(work: MicroBatch) -> Tensor:
    """The loss of a micro-batch, a scalar; gradients of its cut and of its model's adapters are accumulated."""
    loss: Tensor = work.model(work.cut, work.attention_mask, work.labels, work.normalizer).loss
    loss.backward()
    return loss.detach()


class CorePool:
    """Takes the frames of several clients as cores become free, first come, first served.

    More passes at once than cores would only share them, and each would hold its activations for longer.

    Parameters
    ----------
    cores : int
        Passes at once.
    """

    def __init__(self, cores: int) -> None:
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="pass")

    def share(self, handler: Callable[[Frame], Frame]) -> Callable[[Frame], Frame]:
        """``handler``, which waits for its turn."""
        return lambda frame: self._threads.submit(handler, frame).result()

    def close(self) -> None:
        """Take no more frames."""
        self._threads.shutdown(wait=False)


class ServerTrainer:
    """Answers the frames of one client in one round, as long as they are those of its task.

    Parameters
    ----------
    model : ServerModel or BodyModel
        The blocks above the client's split point, with that client's adapters; with the head, unless labels stay with
        the client.
    seat : Seat
        Its place at the half of the server that its steps train; see :mod:`hsplitlora_flwr.training.half`.
    report : Callable[[StepReport], None], optional
        Called after every step.
    threads : Callable[[], int], optional
        CPU threads of one operation, asked for at every frame. Clients train at the same time; together they should not
        take more threads than there are cores, since oversubscribed cores are many times slower than busy ones.
    down : str
        Codec of what it sends; see :func:`hsplitlora_flwr.transport.codecs.pack`.
    through : Callable[[MicroBatch], Tensor], optional
        Takes a micro-batch through a ``ServerModel`` and back: :func:`differentiate`, or the
        :class:`hsplitlora_flwr.training.multi_adapter.MultiAdapterPass` of several trainers.
    allowance : Allowance, optional
        What the client's task allows.
    bottleneck : Bottleneck, optional
        Through which the client's activations come.
    time_is_up : Callable[[], bool], optional
        Whether no further step is to begin.
    scorer : Scorer, optional
        Scores the weights in the first steps.

    Attributes
    ----------
    finished : bool
        The client has taken all steps of its task, or all that there was time for, and the adapters are final.
    steps : int
        That it has taken.
    scorer : Scorer
        As given.
    """

    def __init__(
        self,
        model: ServerModel | BodyModel,
        seat: Seat,
        report: Callable[[StepReport], None] = lambda _: None,
        threads: Callable[[], int] = torch.get_num_threads,
        down: str = "float32",
        through: Callable[[MicroBatch], Tensor] = differentiate,
        allowance: Allowance = TRUSTED,
        bottleneck: Bottleneck | None = None,
        time_is_up: Callable[[], bool] = lambda: False,
        scorer: Scorer | None = None,
    ) -> None:
        self.model = model
        self.scorer = scorer or Scorer(model, end=0)
        self.finished = False
        self.steps = 0
        self._time_is_up, self._enough = time_is_up, False
        self._seat, self._report, self._threads, self._down = seat, report, threads, down
        self._through, self._allowance, self._bottleneck = through, allowance, bottleneck
        self._step = Step(allowance.first_step)  # under way
        self._complete = False  # all its gradients are there
        self._before = 0.0  # squared norm of the client's gradient in the step before it
        self._loss = 0.0
        self._serving, self._closed = Lock(), False
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # cut and hidden state, for their gradient

    def __call__(self, frame: Frame) -> Frame:
        """The answer to a frame: for an activation its gradient, or the hidden state that the client predicts from. A
        client that computes forward alone gets the loss in place of the gradient.

        Raises
        ------
        ValueError
            ``Refused`` or ``WireError`` if the frame does not belong to the task, its tensors do not fit together or
            its numbers are none. Nothing has changed then.
        FloatingPointError
            If what follows from it is not finite. No step is taken then.
        """
        try:
            with self._serving:
                return self._answer(frame)
        finally:
            if self._closed:
                self.close()

    def _answer(self, frame: Frame) -> Frame:
        torch.set_num_threads(self._threads())  # of the calling thread
        if self._closed or (self.finished and self._allowance.steps is not None):
            raise Refused(f"{type(frame).__name__} came after the end of the training")
        if isinstance(frame, Activation):
            if self.finished:  # a client that says itself how many steps there are trains anew
                self._step, self.finished = Step(frame.step), False
            return self._forward(frame)
        if isinstance(frame, HiddenGradient):
            return self._backward(frame)
        if isinstance(frame, Finish):
            return self._finish(frame)
        raise Refused(f"a client does not send {type(frame).__name__}")

    def may_answer(self, frames: Sequence[Frame]) -> bool:
        """Whether frames can be answered now, without waiting for another client's step."""
        begins = bool(frames) and isinstance(frames[0], Activation) and (self._complete or not self._step.micro_batches)
        return not begins or self.finished or self._time_is_up() or self._seat.may_begin()

    def close(self) -> None:
        """The client sends no more, finished or not; what it did of a step that is not complete is dropped.

        While a frame is being answered in another thread, that one ends it.
        """
        self._closed = True
        if self._serving.acquire(blocking=False):
            self._seat.leave()
            self._serving.release()
        else:
            self._seat.expel()

    def _forward(self, frame: Activation) -> Frame:
        check_activation(frame, self.model, self._allowance.up, self._bottleneck)
        self._allowance.check(frame)
        if len(self._waiting) >= self._allowance.in_flight:
            raise Refused(f"{len(self._waiting)} hidden states wait for their gradients, as many as the task allows")
        before = Step(self._step.number + 1) if self._complete else self._step
        if self._stops(before):
            return Enough()
        step = before.with_micro_batch(frame, self._allowance)
        cut, mask = receive_cut(frame, self.model, self._allowance.up, self._bottleneck)
        if self._complete:
            self._settle(frame.previous_grad_norm_sq)
        if step.micro_batches == 1:
            self._seat.begin()
            self._before = frame.previous_grad_norm_sq
        self._step = step
        draw_masks(self.model, step.number, step.micro_batches - 1)
        cut.requires_grad_()  # also where it does not go down: weights that are scored want gradients of what they read
        # Layers of a shared half are watched as long as it is this client's turn, which ends with the step.
        with self.scorer.watching(step.number):
            if isinstance(self.model, ServerModel):
                alone = self.scorer.is_due(step.number)
                loss = self._through(MicroBatch(self.model, cut, mask, frame.labels, step.label_tokens, alone))
            else:
                hidden = self.model(cut, mask)
        if isinstance(self.model, ServerModel):
            return self._trained(cut, loss)
        self._waiting.append((cut, hidden))
        return Hidden(*pack(hidden.detach(), self._down))

    def _stops(self, step: Step) -> bool:
        """Whether a step is not begun any more; its other micro-batches, which may be under way, are answered alike."""
        if not step.micro_batches and self._time_is_up():
            if not (self.steps and self._allowance.partial):
                raise Refused(f"the time of the round was over after {self.steps} of its steps (clients.deadline)")
            self._enough = True
        return self._enough

    def _backward(self, frame: HiddenGradient) -> Frame:
        if not self._waiting:
            raise Refused("a gradient came for no hidden state that was sent")
        cut, hidden = self._waiting[0]
        up = self._allowance.up
        if tuple(frame.gradient.shape) != packed_shape(hidden.shape, up):
            raise Refused(f"the gradient {tuple(frame.gradient.shape)} must be like the state {tuple(hidden.shape)}")
        if not 0 <= frame.loss < math.inf:
            raise Refused(f"the loss is {frame.loss}; lower train.lr or set train.clip")
        self._allowance.check_codec(frame.gradient)
        gradient = unpack(frame.gradient, frame.scale, hidden.dtype, hidden.device, up, hidden.shape)
        self._waiting.popleft()
        with self.scorer.watching(self._step.number):
            hidden.backward(gradient)
        return self._trained(cut, torch.tensor(frame.loss, dtype=torch.float64))

    def _trained(self, cut: Tensor, loss: Tensor) -> Frame:
        """The answer when a micro-batch has been through; the adapters move if it was the last of its step."""
        assert cut.grad is not None
        gradient = None
        if not self._allowance.forward_only:
            of_sent = self._bottleneck.narrow_gradient(cut.grad) if self._bottleneck else cut.grad
            gradient = pack(of_sent, self._down)  # refuses what is not finite
        if self._step.closed and not self._waiting:
            part, norm = to_numbers(loss, self._seat.grad_norm())
            self._take_step(self._loss + part, norm * norm)
            self._loss = 0.0
        else:
            part, norm = float(loss), 0.0
            self._loss += part
        return Loss(part) if gradient is None else Gradient(*gradient, part, norm * norm)

    def _take_step(self, loss: float, grad_norm_sq: float) -> None:
        """A step's micro-batches have all been through, with this loss and squared norm of the gradient."""
        step = self._step
        check_finite("the loss of step", step.number, loss)
        self._seat.complete(step.number, grad_norm_sq, self._before)
        self._complete = True
        self.steps += 1
        self._report(StepReport(step.number, loss, step.label_tokens, step.tokens))

    def _finish(self, frame: Finish) -> Finished:
        self._allowance.check_grad_norm_sq(frame)
        if not self._complete:
            raise Refused(f"it ends in the middle of step {self._step.number}")
        if not self._enough:
            self._allowance.check_finish(self._step)
        self._settle(frame.previous_grad_norm_sq)
        self.finished = True
        self._seat.leave()
        return Finished()

    def _settle(self, client_square: float) -> None:
        """The client's gradient norm of the complete step is known."""
        self._seat.settle(client_square)
        self._complete = False


class ServerEvaluator:
    """Answers the frames of a client that measures its own text; nothing trains.

    Parameters
    ----------
    model : ServerModel or BodyModel
        The blocks above the client's split point.
    down : str
        Codec of what it sends.
    allowance : Allowance, optional
        What the client's task allows.
    bottleneck : Bottleneck, optional
        Through which the client's activations come.
    """

    def __init__(
        self,
        model: ServerModel | BodyModel,
        down: str = "float32",
        allowance: Allowance = TRUSTED,
        bottleneck: Bottleneck | None = None,
    ) -> None:
        self.model = model.eval()
        self._down, self._allowance, self._bottleneck = down, allowance, bottleneck
        self._examples = 0

    def may_answer(self, frames: Sequence[Frame]) -> bool:
        """Always: nothing that others train is moved."""
        return True

    def close(self) -> None:
        """The client sends no more."""

    @torch.no_grad()
    def __call__(self, frame: Frame) -> Frame:
        """The loss of an activation, or the hidden state where the labels stay with the client.

        Raises
        ------
        ValueError
            ``Refused`` or ``WireError`` if the frame does not belong to the task, or its tensors do not fit together.
        FloatingPointError
            If the loss is not finite.
        """
        if not isinstance(frame, Activation):
            raise Refused(f"a client that evaluates does not send {type(frame).__name__}")
        check_activation(frame, self.model, self._allowance.up, self._bottleneck)
        self._allowance.check(frame)
        examples = self._examples + len(frame.attention_mask)
        if examples > self._allowance.examples:
            raise Refused(f"{examples} examples to evaluate; the task allows {self._allowance.examples}")
        cut, mask = receive_cut(frame, self.model, self._allowance.up, self._bottleneck)
        self._examples = examples
        if isinstance(self.model, ServerModel):
            loss = float(self.model(cut, mask, frame.labels, 1).loss)
            check_finite("the loss of example", examples, loss)
            return Loss(loss)
        return Hidden(*pack(self.model(cut, mask), self._down))


def receive_cut(
    frame: Activation,
    model: ServerModel | BodyModel,
    codec: str | None = None,
    bottleneck: Bottleneck | None = None,
) -> tuple[Tensor, Tensor]:
    """The cut activation in the base's dtype, and the attention mask, on the model's device; ``codec`` as for
    :func:`hsplitlora_flwr.transport.codecs.unpack`.

    Raises
    ------
    WireError
        If the activation is not finite, or is none of a codec.
    """
    width = bottleneck.width if bottleneck else int(model.decoder.config.hidden_size)
    shape = (*frame.attention_mask.shape, width)
    sent = unpack(frame.cut, frame.scale, model.dtype, model.device, codec, shape)
    return bottleneck.widen(sent) if bottleneck else sent, to_device(frame.attention_mask, model.device)
