"""The server's side of split fine-tuning: one frozen base, and for every client of a round adapters of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplitlora_flwr.lora.delta import Change
from hsplitlora_flwr.lora.layers import attach_changes, merge_changes, reset_weights, takes_changes
from hsplitlora_flwr.models.loading import Checkpoint, load_causal_lm
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import (
    ClientModel,
    ModelPart,
    ServerModel,
    WholeModel,
    client_part,
    server_part,
    whole_model,
)
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import Activation, Finish, Finished, Frame, Gradient

P = TypeVar("P", bound=ModelPart)


class SharedBase:
    """The base model on the server: loaded once, shared by all clients of a round and by evaluation.

    Parameters
    ----------
    path, dtype, device : str
        As for :func:`hsplitlora_flwr.models.load_causal_lm`.
    """

    def __init__(self, path: str, dtype: str = "float32", device: str = "cpu") -> None:
        self.model = load_causal_lm(path, dtype, device)
        self.family = find_family(self.model.config)
        self._checkpoint = Checkpoint(path)
        self._in_place = takes_changes(self.model.dtype)
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

    def whole(self) -> WholeModel:
        """All of the model as one part, around the shared tensors."""
        return self._with_changes(whole_model(self.model, self.family))

    def merged(self) -> PreTrainedModel:
        """The whole model with the update in its weights, rounded to their dtype; parts are not to be made any more."""
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


class ServerTrainer:
    """Answers the frames of one client in one round.

    Parameters
    ----------
    model : ServerModel
        The blocks above the client's split point, with that client's adapters.
    optimizer : AdapterOptimizer
        Over those adapters.
    report : Callable[[StepReport], None], optional
        Called after every step.
    threads : Callable[[], int], optional
        CPU threads of one operation, asked for at every frame. Clients train at the same time; together they should not
        take more threads than there are cores, since oversubscribed cores are many times slower than busy ones.
    """

    def __init__(
        self,
        model: ServerModel,
        optimizer: AdapterOptimizer,
        report: Callable[[StepReport], None] = lambda _: None,
        threads: Callable[[], int] = torch.get_num_threads,
    ) -> None:
        self.model = model
        self.finished = False
        self._optimizer = optimizer
        self._report = report
        self._threads = threads
        self._pending: int | None = None  # a step whose gradients wait for the client's norm
        self._loss, self._tokens = 0.0, 0

    def __call__(self, frame: Frame) -> Frame:
        """The answer to a frame: a gradient for an activation.

        Raises
        ------
        ValueError
            If the frame does not belong here, or its tensors do not fit together.
        """
        torch.set_num_threads(self._threads())  # of the calling thread
        if isinstance(frame, Activation):
            self._take_pending(frame.step, frame.previous_square)
            return self._train(frame)
        if isinstance(frame, Finish):
            self._take_pending(-1, frame.previous_square)
            self.finished = True
            return Finished()
        raise ValueError(f"a client does not send frames of kind {type(frame).__name__}")

    def _train(self, frame: Activation) -> Gradient:
        """Forward, loss and backward of one micro-batch."""
        self._check(frame)
        device, dtype = next(self.model.parameters()).device, self.model.dtype
        cut = frame.cut.to(device, dtype).requires_grad_()
        output = self.model(cut, frame.attention_mask.to(device), frame.labels.to(device), frame.label_tokens)
        output.loss.backward()
        assert cut.grad is not None
        loss = float(output.loss.detach())
        self._loss += loss
        self._tokens += int(frame.attention_mask.sum())
        square = 0.0
        if frame.last:
            square = self._optimizer.square()
            self._pending = frame.step
            self._report(StepReport(frame.step, self._loss, frame.label_tokens, self._tokens))
            self._loss, self._tokens = 0.0, 0
        return Gradient(cut.grad.to(frame.cut.dtype), loss, square)

    def _take_pending(self, step: int, client_square: float) -> None:
        """Step the optimizer for the step before, now that the client's gradient norm is known."""
        if self._pending is not None and step != self._pending:
            self._optimizer.step(self._pending, client_square)
            self._pending = None

    def _check(self, frame: Activation) -> None:
        rows, hidden = tuple(frame.labels.shape), int(self.model.decoder.config.hidden_size)
        if frame.labels.ndim != 2 or frame.attention_mask.shape != frame.labels.shape:
            raise ValueError(
                f"attention mask {tuple(frame.attention_mask.shape)} and labels {rows} must be (batch, seq)"
            )
        if tuple(frame.cut.shape) != (*rows, hidden) or not frame.cut.is_floating_point():
            raise ValueError(f"cut activation {tuple(frame.cut.shape)} must be {(*rows, hidden)}, floating point")
        if frame.label_tokens < 1:
            raise ValueError("a batch without labelled tokens has no loss")
