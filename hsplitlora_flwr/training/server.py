"""The server's side of split fine-tuning: one frozen base, and for every client of a round adapters of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplitlora_flwr.lora.delta import Change
from hsplitlora_flwr.lora.layers import attach_changes, draw_masks, merge_changes, reset_weights, takes_changes
from hsplitlora_flwr.models.loading import Checkpoint, load_causal_lm
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import (
    BodyModel,
    ClientModel,
    ModelPart,
    ServerModel,
    WholeModel,
    body_part,
    client_part,
    middle_part,
    server_part,
    whole_model,
)
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import (
    Activation,
    Finish,
    Finished,
    Frame,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
)
from hsplitlora_flwr.transport.wire import pack, unpack

P = TypeVar("P", bound=ModelPart)


class SharedBase:
    """The base model on the server: loaded once, shared by all clients of a round and by evaluation.

    Parameters
    ----------
    path, dtype, device, quantise
        As for :func:`hsplitlora_flwr.models.load_causal_lm`.
    """

    def __init__(
        self, path: str, dtype: str = "float32", device: str | Sequence[str] = "cpu", quantise: str = "none"
    ) -> None:
        self.model = load_causal_lm(path, dtype, device, quantise)
        self.family = find_family(self.model.config)
        self._checkpoint = Checkpoint(path)
        self._in_place = takes_changes(self.model.dtype, quantise)
        self._changes: Mapping[str, Change] = {}

    def update(self, changes: Mapping[str, Change]) -> None:
        """Make every part, existing and to come, compute with ``W_0 + change``; no client may be training.

        Layers without a change are ``W_0`` again, whatever they were before.
        """
        before, self._changes = self._changes, changes
        if self._in_place:
            self._merge([name for name in before if name not in changes])

    def client_part(self, split: int) -> ClientModel:
        """Embeddings and blocks below ``split``, around the shared tensors."""
        return self._with_changes(client_part(self.model, self.family, split))

    def server_part(self, split: int) -> ServerModel:
        """Blocks from ``split`` up, norm and head, around the shared tensors."""
        return self._with_changes(server_part(self.model, self.family, split))

    def body_part(self, split: int) -> BodyModel:
        """Blocks from ``split`` up without norm and head, around the shared tensors."""
        return self._with_changes(body_part(self.model, self.family, split))

    def middle_part(self, first: int, last: int) -> BodyModel:
        """Blocks ``first .. last - 1``, around the shared tensors; ``first`` is at least 1."""
        return self._with_changes(middle_part(self.model, self.family, first, last))

    def whole(self) -> WholeModel:
        """All of the model as one part, around the shared tensors."""
        return self._with_changes(whole_model(self.model, self.family))

    def merged(self) -> PreTrainedModel:
        """The whole model with the update in its weights, rounded to their dtype; parts are not to be made any more.

        Raises
        ------
        TypeError
            If weights are quantised.
        """
        self._merge()
        return self.model

    def _merge(self, reset: Sequence[str] = ()) -> None:
        whole = whole_model(self.model, self.family)
        merge_changes(whole, self._changes, self._original)
        reset_weights(whole, reset, self._original)

    def _with_changes(self, part: P) -> P:
        if not self._in_place:
            attach_changes(part, self._changes)
        return part

    def _original(self, name: str) -> Tensor:
        return self._checkpoint.tensor(f"{name}.weight", self.model.base_model_prefix)


@dataclass(frozen=True)
class StepReport:
    """What the server knows after a step: for progress and records."""

    step: int
    loss: float
    label_tokens: int
    tokens: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one client sent, where it is to go, and what its loss is divided by."""

    model: ServerModel
    cut: Tensor
    attention_mask: Tensor
    labels: Tensor
    normalizer: int


def differentiate(work: MicroBatch) -> float:
    """The loss of a micro-batch; gradients of its cut and of its model's adapters are accumulated."""
    output = work.model(work.cut, work.attention_mask, work.labels, work.normalizer)
    output.loss.backward()
    return float(output.loss.detach())


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
    """Answers the frames of one client in one round.

    Parameters
    ----------
    model : ServerModel or BodyModel
        The blocks above the client's split point, with that client's adapters; with the head, unless labels stay with
        the client.
    optimizer : AdapterOptimizer
        Over those adapters.
    report : Callable[[StepReport], None], optional
        Called after every step.
    threads : Callable[[], int], optional
        CPU threads of one operation, asked for at every frame. Clients train at the same time; together they should not
        take more threads than there are cores, since oversubscribed cores are many times slower than busy ones.
    down : str
        Numbers on the wire; see :func:`hsplitlora_flwr.transport.wire.pack`.
    through : Callable[[MicroBatch], float], optional
        Takes a micro-batch through a ``ServerModel`` and back: :func:`differentiate`, or the
        :class:`hsplitlora_flwr.training.joint.JointPass` of several trainers.
    """

    def __init__(
        self,
        model: ServerModel | BodyModel,
        optimizer: AdapterOptimizer,
        report: Callable[[StepReport], None] = lambda _: None,
        threads: Callable[[], int] = torch.get_num_threads,
        down: str = "float32",
        through: Callable[[MicroBatch], float] = differentiate,
    ) -> None:
        self.model = model
        self.finished = False
        self._optimizer, self._report, self._threads, self._down = optimizer, report, threads, down
        self._through = through
        self._pending: int | None = None  # a step whose gradients wait for the client's norm
        self._index = 0  # of the micro-batch that comes next, in its step
        self._waiting: deque[tuple[Activation, Tensor, Tensor]] = deque()  # cut and hidden state, for their gradient
        self._loss, self._tokens = 0.0, 0

    def __call__(self, frame: Frame) -> Frame:
        """The answer to a frame: for an activation its gradient, or the hidden state that the client predicts from.

        Raises
        ------
        ValueError
            If the frame does not belong here, or its tensors do not fit together.
        """
        torch.set_num_threads(self._threads())  # of the calling thread
        if isinstance(frame, Activation):
            self._take_pending(frame.step, frame.previous_square)
            return self._forward(frame)
        if isinstance(frame, HiddenGradient):
            return self._backward(frame)
        if isinstance(frame, Finish):
            self._take_pending(-1, frame.previous_square)
            self.finished = True
            return Finished()
        raise ValueError(f"a client does not send {type(frame).__name__}")

    def _forward(self, frame: Activation) -> Frame:
        check_activation(frame, self.model)
        draw_masks(self.model, frame.step, self._index)
        self._index = 0 if frame.last else self._index + 1
        cut, mask = receive_cut(frame, self.model)
        cut.requires_grad_()
        if isinstance(self.model, ServerModel):
            work = MicroBatch(self.model, cut, mask, frame.labels.to(cut.device), frame.label_tokens)
            return self._gradient(frame, cut, self._through(work))
        hidden = self.model(cut, mask)
        self._waiting.append((frame, cut, hidden))
        return Hidden(*pack(hidden.detach(), self._down))

    def _backward(self, frame: HiddenGradient) -> Frame:
        if not self._waiting:
            raise ValueError("a gradient came for no hidden state that was sent")
        activation, cut, hidden = self._waiting.popleft()
        gradient = unpack(frame.gradient, frame.scale, hidden.dtype, hidden.device)
        if gradient.shape != hidden.shape:
            raise ValueError(f"the gradient {tuple(gradient.shape)} must be like the state {tuple(hidden.shape)}")
        hidden.backward(gradient)
        return self._gradient(activation, cut, frame.loss)

    def _gradient(self, frame: Activation, cut: Tensor, loss: float) -> Gradient:
        assert cut.grad is not None
        self._loss += loss
        self._tokens += int(frame.attention_mask.sum())
        square = 0.0
        if frame.last:
            square = self._optimizer.square()
            self._pending = frame.step
            self._report(StepReport(frame.step, self._loss, frame.label_tokens, self._tokens))
            self._loss, self._tokens = 0.0, 0
        return Gradient(*pack(cut.grad, self._down), loss, square)

    def _take_pending(self, step: int, client_square: float) -> None:
        """Step the optimizer for the step before, now that the client's gradient norm is known."""
        if self._pending is not None and step != self._pending:
            self._optimizer.step(self._pending, client_square)
            self._pending = None


class ServerEvaluator:
    """Answers the frames of a client that measures its own text; nothing trains.

    Parameters
    ----------
    model : ServerModel or BodyModel
        The blocks above the client's split point.
    down : str
        Numbers on the wire.
    """

    def __init__(self, model: ServerModel | BodyModel, down: str = "float32") -> None:
        self.model = model.eval()
        self._down = down

    @torch.no_grad()
    def __call__(self, frame: Frame) -> Frame:
        """The loss of an activation, or the hidden state where the labels stay with the client."""
        if not isinstance(frame, Activation):
            raise ValueError(f"a client that evaluates does not send {type(frame).__name__}")
        check_activation(frame, self.model)
        cut, mask = receive_cut(frame, self.model)
        if isinstance(self.model, ServerModel):
            return Loss(float(self.model(cut, mask, frame.labels.to(cut.device), 1).loss))
        return Hidden(*pack(self.model(cut, mask), self._down))


def receive_cut(frame: Activation, model: ServerModel | BodyModel) -> tuple[Tensor, Tensor]:
    """The cut activation in the base's dtype, and the attention mask, on the model's device."""
    cut = unpack(frame.cut, frame.scale, model.dtype, model.device)
    return cut, frame.attention_mask.to(model.device)


def check_activation(frame: Activation, model: ServerModel | BodyModel) -> None:
    """Raise ``ValueError`` unless the tensors of a frame fit together and to the model."""
    rows, hidden = tuple(frame.attention_mask.shape), int(model.decoder.config.hidden_size)
    labels = tuple(frame.labels.shape)
    if len(rows) != 2 or labels != (rows if isinstance(model, ServerModel) else (0,)):
        raise ValueError(
            f"attention mask {rows} must be (batch, seq), and labels {labels} the same, or (0,) where they stay"
        )
    if tuple(frame.cut.shape) != (*rows, hidden):
        raise ValueError(f"cut activation {tuple(frame.cut.shape)} must be {(*rows, hidden)}")
    if frame.label_tokens < 1:
        raise ValueError("a batch without labelled tokens has no loss")
