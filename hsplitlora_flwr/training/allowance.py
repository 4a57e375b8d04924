"""What a client's task allows it to ask of the server, and how far it has come.

A client's machine is not the server's. Every frame is checked against the task before anything is computed or changed.
So whatever a client sends, it costs the server no more than its task, and a refused client has changed nothing but its
own half of the round, which then does not count.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsplitlora_flwr.models.parts import IGNORED, BodyModel, ServerModel
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from hsplitlora_flwr.transport.codecs import check_codec, packed_bytes, packed_shape
from hsplitlora_flwr.transport.frames import HEADER_BYTES, Activation, Finish

_ANY = sys.maxsize


class Refused(ValueError):
    """A client's frame does not belong to its task; the text says what it is and what is allowed."""


@dataclass(frozen=True)
class Allowance:
    """What a client's task allows; what is not said is not bounded.

    Parameters
    ----------
    first_step : int
        Global step that it begins with.
    steps : int or None
        Steps that it takes, no fewer and no more; None leaves their number to the client.
    examples : int
        Examples of a step at most, in all of its micro-batches; of an evaluation, those of all frames.
    examples_at_once : int
        Examples of a frame at most.
    tokens : int
        Tokens of an example at most.
    in_flight : int
        Frames at most that a message holds, and hidden states that wait for their gradients where labels stay with the
        client.
    up : str or None
        Codec; see :func:`hsplitlora_flwr.transport.codecs.pack`. None takes any.
    forward_only : bool
        The client trains nothing: no gradient goes down to it, and it has none of its own to clip by.
    partial : bool
        Where the time of the round is over, the steps that were taken until then count.
    """

    first_step: int = 0
    steps: int | None = None
    examples: int = _ANY
    examples_at_once: int = _ANY
    tokens: int = _ANY
    in_flight: int = _ANY
    up: str | None = None
    forward_only: bool = False
    partial: bool = True

    def frame_bytes(self, hidden: int) -> int:
        """Bytes that no frame exceeds, for a model of this hidden size."""
        tokens = self.examples_at_once * self.tokens
        # the activation in float64 at most, its scale, the attention mask and the labels; and the header
        numbers = tokens * (8 * hidden + 4)
        if self.up is not None:
            numbers = max(numbers, packed_bytes((self.examples_at_once, self.tokens, hidden), self.up))
        return numbers + tokens * (8 + 8) + HEADER_BYTES

    def check(self, frame: Activation) -> None:
        """Raise :class:`Refused` or ``WireError`` if a frame is larger than allowed, or of another codec."""
        examples, tokens = frame.attention_mask.shape
        if examples > self.examples_at_once or tokens > self.tokens:
            raise Refused(
                f"a micro-batch of {examples} examples x {tokens} tokens; "
                f"the task allows {self.examples_at_once} examples x {self.tokens} tokens"
            )
        self.check_codec(frame.cut)
        self.check_grad_norm_sq(frame)

    def check_grad_norm_sq(self, frame: Activation | Finish) -> None:
        """Raise :class:`Refused` unless what a client says of its gradient is the squared norm of one, and 0 where it
        trains nothing."""
        grad_norm_sq = frame.previous_grad_norm_sq
        if not 0 <= grad_norm_sq < math.inf:
            raise Refused(f"previous_grad_norm_sq is {grad_norm_sq}, which is no squared norm; lower train.lr")
        if grad_norm_sq and self.forward_only:
            raise Refused(f"previous_grad_norm_sq is {grad_norm_sq}, and the client trains nothing")

    def check_codec(self, values: Tensor) -> None:
        """Raise ``WireError`` unless numbers came by the codec that was agreed on."""
        if self.up is not None:
            check_codec(values, self.up)

    def check_finish(self, step: Step) -> None:
        """Raise :class:`Refused` unless ``step`` is the last one."""
        taken = step.number - self.first_step + 1
        if self.steps is not None and taken != self.steps:
            raise Refused(f"it ends after {taken} of {self.steps} steps")


TRUSTED = Allowance()
"""For a client whose frames need only fit together and follow one another."""


@dataclass(frozen=True)
class Step:
    """A step of training, as far as its micro-batches have come.

    Parameters
    ----------
    number : int
        Global step.
    label_tokens : int
        Labelled tokens of all its micro-batches, as the first one says: what their losses are divided by.
    micro_batches, examples, tokens, labelled : int
        What has come of it; tokens are those that are no padding, and labelled ones those that a loss is computed of.
    closed : bool
        Its last micro-batch has come.
    """

    number: int
    label_tokens: int = 0
    micro_batches: int = 0
    examples: int = 0
    tokens: int = 0
    labelled: int = 0
    closed: bool = False

    def with_micro_batch(self, frame: Activation, allowance: Allowance) -> Step:
        """The step with one micro-batch more.

        The number of labelled tokens must be known from the first micro-batch on, since its gradients are added up
        right away. So it is taken for true until the last one, which is refused if the labels do not add up to it; and
        without its last micro-batch no step is taken. Where labels stay with the client there are none to count.

        Raises
        ------
        Refused
            If the micro-batch does not belong to this step, or the task has no such step.
        """
        if self.closed:
            raise Refused(f"step {self.number} has had its last micro-batch, and its gradients are due")
        if frame.step != self.number:
            raise Refused(f"step {frame.step} came where step {self.number} is due")
        end = None if allowance.steps is None else allowance.first_step + allowance.steps
        if end is not None and self.number >= end:
            raise Refused(f"step {self.number} came after the last one, {end - 1}")
        if self.micro_batches and frame.label_tokens != self.label_tokens:
            raise Refused(
                f"a micro-batch of step {self.number} says that the step has {frame.label_tokens} labelled tokens, "
                f"those before it said {self.label_tokens}"
            )
        step = replace(
            self,
            label_tokens=frame.label_tokens,
            micro_batches=self.micro_batches + 1,
            examples=self.examples + len(frame.attention_mask),
            tokens=self.tokens + int(frame.attention_mask.sum()),
            labelled=self.labelled + _labelled(frame),
            closed=frame.last,
        )
        if step.examples > allowance.examples:
            raise Refused(f"step {self.number} has {step.examples} examples; the task allows {allowance.examples}")
        most = allowance.examples * (allowance.tokens - 1)
        if step.label_tokens > most:
            raise Refused(
                f"step {self.number} says that it has {step.label_tokens} labelled tokens; at most {most} fit"
            )
        if frame.labels.numel() and not _adds_up(step):
            raise Refused(
                f"step {self.number} has {step.labelled} labelled tokens in {step.micro_batches} micro-batches, "
                f"but said {step.label_tokens}"
            )
        return step


def _adds_up(step: Step) -> bool:
    return step.labelled == step.label_tokens if step.closed else step.labelled <= step.label_tokens


def _labelled(frame: Activation) -> int:
    """How many tokens of a frame have a loss; the one at position 0 of a row is never predicted."""
    return int((frame.labels[:, 1:] != IGNORED).sum()) if frame.labels.numel() else 0


def check_activation(
    frame: Activation,
    model: ServerModel | BodyModel,
    codec: str | None = None,
    bottleneck: Bottleneck | None = None,
) -> None:
    """Raise :class:`Refused` unless the tensors of a frame fit together and to the model; ``codec`` as in
    :class:`Allowance`, ``bottleneck`` where it came through one."""
    mask, labels = frame.attention_mask, frame.labels
    shape = tuple(mask.shape)
    width = bottleneck.width if bottleneck else int(model.decoder.config.hidden_size)
    predicts = isinstance(model, ServerModel)
    if len(shape) != 2 or tuple(labels.shape) != (shape if predicts else (0,)):
        raise Refused(
            f"attention mask {shape} must be (batch, seq), and labels {tuple(labels.shape)} the same, or (0,) where "
            "they stay"
        )
    wanted = packed_shape((*shape, width), codec)
    if tuple(frame.cut.shape) != wanted:
        raise Refused(f"cut activation {tuple(frame.cut.shape)} must be {wanted}")
    if frame.label_tokens < 1:
        raise Refused("a batch without labelled tokens has no loss")
    _check_mask(mask)
    if predicts:
        _check_labels(labels, int(model.decoder.config.vocab_size))


def _check_mask(mask: Tensor) -> None:
    """Rows of tokens and padding, at least one token in each."""
    if mask.dtype != torch.int64 or bool(((mask != 0) & (mask != 1)).any()):
        raise Refused("an attention mask holds int64 numbers, 1 for tokens and 0 for padding; this one does not")
    if mask.numel() == 0 or not bool(mask.any(dim=1).all()):
        raise Refused(f"attention mask {tuple(mask.shape)} has a row without a token, or no row")


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    unknown = ((labels < 0) | (labels >= vocabulary)) & (labels != IGNORED)
    if labels.dtype != torch.int64 or bool(unknown.any()):
        raise Refused(f"labels are int64 token ids from 0 to {vocabulary - 1}, or {IGNORED} where there is none")
