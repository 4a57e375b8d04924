"""What a client sends is held against its task: what does not belong is refused, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.training.allowance import Allowance, Refused
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import MicroBatch, ServerEvaluator, ServerTrainer, StepReport
from hsplitlora_flwr.transport.codecs import WireError, pack
from hsplitlora_flwr.transport.frames import (
    Activation,
    Finish,
    Finished,
    Frame,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
    Ping,
)
from tests.tiny import random_batches, tiny_model

NONE = torch.empty(0)
FIRST, STEPS, ROWS, AT_ONCE, TOKENS, HIDDEN, VOCABULARY = 6, 3, 4, 2, 11, 32, 97
TASK = Allowance(
    first_step=FIRST, steps=STEPS, examples=ROWS, examples_at_once=AT_ONCE, tokens=TOKENS, in_flight=2, up="float32"
)


class Served:
    """A trainer with what it reported, and frames for it."""

    def __init__(
        self,
        labels: Literal["server", "client"] = "server",
        task: Allowance = TASK,
        train: TrainConfig = TrainConfig(lr=1e-2),  # noqa: B008 (frozen)
        dtype: torch.dtype = torch.float64,
    ) -> None:
        _, model, *_ = split_model(tiny_model("llama", dtype=dtype), 2, labels)
        specs = {name: AdapterSpec(2, 4.0) for name, _ in model.linears()}
        optimizer = AdapterOptimizer(inject(model, specs, "seed"), train)
        self.reports: list[StepReport] = []
        self.trainer = ServerTrainer(model.train(), OwnHalf(optimizer), self.reports.append, allowance=task)
        self._stay = labels == "client"

    def state(self) -> list[Tensor]:
        """All that a step could have changed."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        return [factor for pair in extract(self.trainer.model).values() for factor in pair] + gradients

    def frames(self, step: int, square: float = 0.25) -> list[Activation]:
        """The micro-batches of an honest step."""
        batch = next(random_batches(step, ROWS, TOKENS))
        cut = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))
        return [
            Activation(
                step,
                cut[at : at + AT_ONCE],
                NONE,
                batch.attention_mask[at : at + AT_ONCE],
                torch.empty(0, dtype=torch.int64) if self._stay else batch.labels[at : at + AT_ONCE],
                batch.label_tokens,
                at + AT_ONCE == ROWS,
                square,
            )
            for at in range(0, ROWS, AT_ONCE)
        ]

    def take(self, *frames: Frame) -> list[Frame]:
        return [self.trainer(frame) for frame in frames]

    def steps(self, count: int) -> None:
        for step in range(FIRST, FIRST + count):
            self.take(*self.frames(step))

    def refuses(self, frame: Frame, says: str) -> None:
        before, reports = self.state(), len(self.reports)
        with pytest.raises((Refused, WireError), match=says):
            self.trainer(frame)
        after = self.state()
        assert len(after) == len(before) and all(map(torch.equal, before, after))
        assert len(self.reports) == reports and not self.trainer.finished


def test_a_client_that_keeps_to_its_task() -> None:
    served = Served()
    served.steps(STEPS)
    assert isinstance(served.trainer(Finish(0.25)), Finished)
    assert served.trainer.finished
    assert [report.step for report in served.reports] == [6, 7, 8]
    batches = [next(random_batches(step, ROWS, TOKENS)) for step in (6, 7, 8)]
    assert [report.label_tokens for report in served.reports] == [batch.label_tokens for batch in batches]
    assert [report.tokens for report in served.reports] == [int(batch.attention_mask.sum()) for batch in batches]


def test_a_client_that_trains_nothing_has_no_gradient() -> None:
    """What it says of one would shorten the server's steps."""
    served = Served(task=replace(TASK, forward_only=True))
    first, last = served.frames(FIRST, square=0.0)
    served.refuses(
        replace(first, previous_grad_norm_sq=0.25), r"previous_grad_norm_sq is 0\.25, and the client trains nothing"
    )
    assert [type(answer) for answer in served.take(first, last)] == [Loss, Loss]
    served.refuses(Finish(0.25), "the client trains nothing")


@pytest.mark.parametrize("step", [-50, 0, FIRST - 1, FIRST + 1, FIRST + STEPS, 2**62])
def test_a_task_begins_with_its_first_step(step: int) -> None:
    served = Served()
    served.refuses(replace(served.frames(FIRST)[0], step=step), f"step {step} came where step 6 is due")


@pytest.mark.parametrize(("step", "due"), [(FIRST, 7), (FIRST + 2, 7), (-50, 7)])
def test_steps_follow_one_another(step: int, due: int) -> None:
    served = Served()
    served.steps(1)
    served.refuses(served.frames(step)[0], f"step {step} came where step {due} is due")
    served.take(*served.frames(due))  # what was refused is as if it had not come


def test_a_step_has_one_last_micro_batch() -> None:
    served = Served()
    first, last = served.frames(FIRST)
    served.take(first)
    served.refuses(replace(first, step=FIRST + 1), "step 7 came where step 6 is due")
    served.take(last)
    served.refuses(last, "step 6 came where step 7 is due")


def test_nothing_trains_after_the_last_step() -> None:
    served = Served()
    served.steps(STEPS)
    served.refuses(served.frames(FIRST + STEPS)[0], "step 9 came after the last one, 8")
    served.trainer(Finish(0.25))
    before = served.state()
    for frame in (
        served.frames(FIRST + STEPS)[0],
        served.frames(FIRST)[0],
        Finish(0.25),
        HiddenGradient(NONE, NONE, 1),
    ):
        with pytest.raises(Refused, match="came after the end of the training"):
            served.trainer(frame)
    assert all(map(torch.equal, before, served.state()))


@pytest.mark.parametrize("taken", range(STEPS))
def test_an_end_before_the_last_step(taken: int) -> None:
    served = Served()
    served.steps(taken)
    served.refuses(Finish(0.25), f"ends after {taken} of 3 steps" if taken else "in the middle of step 6")
    served.take(served.frames(FIRST + taken)[0])
    served.refuses(Finish(0.25), f"in the middle of step {FIRST + taken}")


SIZES: list[tuple[str, Callable[[Activation], Activation], str]] = [
    ("rows", lambda f: _of_shape(f, 3, TOKENS), "3 examples x 11 tokens; the task allows 2 examples x 11 tokens"),
    ("tokens", lambda f: _of_shape(f, 2, TOKENS + 1), "2 examples x 12 tokens; the task allows 2 examples x 11 tokens"),
    ("a row of all", lambda f: _of_shape(f, 1, 2 * TOKENS), "1 examples x 22 tokens; the task allows"),
    ("no rows", lambda f: _of_shape(f, 0, TOKENS), r"attention mask \(0, 11\)"),
    ("no tokens", lambda f: _of_shape(f, 2, 0), r"attention mask \(2, 0\)"),
]


def _of_shape(frame: Activation, rows: int, tokens: int) -> Activation:
    ids = torch.ones(rows, tokens, dtype=torch.long)
    return replace(frame, cut=torch.zeros(rows, tokens, HIDDEN), attention_mask=ids, labels=ids, label_tokens=1)


VALUES: list[tuple[str, Callable[[Activation], Activation], str]] = [
    ("mask of two", lambda f: replace(f, attention_mask=2 * f.attention_mask), "1 for tokens and 0 for padding"),
    ("negative mask", lambda f: replace(f, attention_mask=-f.attention_mask), "1 for tokens and 0 for padding"),
    ("int8 mask", lambda f: replace(f, attention_mask=f.attention_mask.to(torch.int8)), "holds int64 numbers"),
    ("float mask", lambda f: replace(f, attention_mask=f.attention_mask.float()), "holds int64 numbers"),
    ("mask of nothing", lambda f: replace(f, attention_mask=0 * f.attention_mask), "a row without a token"),
    ("label too high", lambda f: replace(f, labels=_with(f.labels, VOCABULARY)), "token ids from 0 to 96, or -100"),
    ("label too low", lambda f: replace(f, labels=_with(f.labels, -1)), "token ids from 0 to 96, or -100"),
    ("label far off", lambda f: replace(f, labels=_with(f.labels, -(2**63))), "token ids from 0 to 96, or -100"),
    ("float labels", lambda f: replace(f, labels=f.labels.float()), "labels are int64"),
    ("nan", lambda f: replace(f, cut=_with(f.cut, math.nan)), "not finite"),
    ("inf", lambda f: replace(f, cut=_with(f.cut, math.inf)), "not finite"),
    ("wire of bf16", lambda f: replace(f, cut=f.cut.bfloat16()), "torch.bfloat16 where the codec float32"),
    ("wire of fp64", lambda f: replace(f, cut=f.cut.double()), "torch.float64 where the codec float32"),
    ("wire of int8", lambda f: _packed(f), "torch.int8 where the codec float32"),
    ("bytes", lambda f: replace(f, cut=f.cut.to(torch.uint8)), "torch.uint8 where the codec float32"),
    ("scale beside floats", lambda f: replace(f, scale=torch.ones(2, TOKENS)), "as float32 is"),
    ("no label tokens", lambda f: replace(f, label_tokens=0), "without labelled tokens"),
    ("negative label tokens", lambda f: replace(f, label_tokens=-7), "without labelled tokens"),
    ("label tokens beyond the batch", lambda f: replace(f, label_tokens=41), "41 labelled tokens; at most 40 fit"),
    ("endless label tokens", lambda f: replace(f, label_tokens=2**62), "at most 40 fit"),
    ("fewer label tokens than labels", lambda f: replace(f, label_tokens=1), "said 1"),
    *(
        (f"square of {square}", lambda f, square=square: replace(f, previous_grad_norm_sq=square), "no squared norm")
        for square in (math.nan, math.inf, -math.inf, -1e-300)
    ),
]


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def _packed(frame: Activation) -> Activation:
    values, scale = pack(frame.cut, "int8")
    return replace(frame, cut=values, scale=scale)


@pytest.mark.parametrize(
    ("bad", "says"), [case[1:] for case in SIZES + VALUES], ids=[case[0] for case in SIZES + VALUES]
)
@pytest.mark.parametrize("at", ["first", "later"])
def test_a_micro_batch_that_does_not_belong(at: str, bad: Callable[[Activation], Activation], says: str) -> None:
    served = Served()
    if at == "first":
        frame = served.frames(FIRST)[0]
    else:  # where it would also make the server take the step before
        served.steps(1)
        frame = served.frames(FIRST + 1)[0]
    served.refuses(bad(frame), says)
    served.take(frame)


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (2,), (2, 3), (0, 3), (2, 0), (2, 3, HIDDEN), (1, TOKENS), (1, TOKENS, HIDDEN), (2, 3, 0)]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from([*FLOATS, torch.int64, torch.int8, torch.uint8])), draw(st.sampled_from(SHAPES))
    numbers = [1e30, math.inf, math.nan] if dtype in FLOATS else [-100, 97, 127]
    return torch.full(shape, draw(st.sampled_from([0, 1, 2, 96, *numbers]))).to(dtype)


@pytest.fixture(scope="module")
def evaluators() -> list[ServerEvaluator]:
    return [ServerEvaluator(Served(labels).trainer.model) for labels in ("server", "client")]


@settings(max_examples=300, deadline=None)
@given(tensors(), tensors(), tensors(), tensors(), st.integers(-1, 50))
def test_any_tensors_are_refused_or_fit(
    evaluators: list[ServerEvaluator], cut: Tensor, scale: Tensor, mask: Tensor, labels: Tensor, label_tokens: int
) -> None:
    for evaluator in evaluators:
        with suppress(Refused, WireError, FloatingPointError):
            evaluator(Activation(FIRST, cut, scale, mask, labels, label_tokens, True, 0.0))


def test_a_step_has_the_rows_of_a_batch() -> None:
    served = Served()
    first, _ = served.frames(FIRST)
    more = replace(first, label_tokens=40)
    served.take(more, more)
    served.refuses(more, "step 6 has 6 examples; the task allows 4")


@pytest.mark.parametrize("more", [-1, 1])
def test_labels_are_counted_and_the_step_of_a_lie_is_not_taken(more: int) -> None:
    served = Served()
    first, last = (replace(frame, label_tokens=frame.label_tokens + more) for frame in served.frames(FIRST))
    served.take(first)
    served.refuses(last, f"step 6 has {last.label_tokens - more} labelled tokens in 2 micro-batches, but said")
    served.refuses(served.frames(FIRST + 1)[0], "step 7 came where step 6 is due")
    served.refuses(Finish(0.0), "in the middle of step 6")


@pytest.mark.parametrize("more", [-1, 1])
def test_the_number_of_labels_is_one_for_all_micro_batches(more: int) -> None:
    served = Served()
    first, last = served.frames(FIRST)
    served.take(first)
    served.refuses(replace(last, label_tokens=last.label_tokens + more), f"{last.label_tokens + more} labelled tokens")
    served.take(last)


@pytest.mark.parametrize("square", [math.nan, math.inf, -1.0])
def test_a_last_word_that_is_no_squared_norm(square: float) -> None:
    served = Served()
    served.steps(STEPS)
    served.refuses(Finish(square), f"previous_grad_norm_sq is {square}")


@pytest.mark.parametrize("frame", [Finished(), Loss(1.0), Ping(NONE, 0), Gradient(NONE, NONE, 0.0, 0.0)])
def test_what_a_client_does_not_send(frame: Frame) -> None:
    Served().refuses(frame, f"a client does not send {type(frame).__name__}")
    with pytest.raises(Refused, match="a client that evaluates does not send"):
        ServerEvaluator(Served().trainer.model)(frame)


@pytest.mark.parametrize("what", ["loss", "cut", "adapter"])
def test_a_step_whose_gradient_is_not_finite_is_not_taken(what: str) -> None:
    served = Served()
    served.steps(1)
    honest = served.trainer._through

    def diverged(work: MicroBatch) -> torch.Tensor:
        loss = honest(work)
        assert work.cut.grad is not None
        if what == "cut":
            work.cut.grad[0, 0, 0] = math.inf
        elif what == "adapter":
            next(p for p in work.model.parameters() if p.grad is not None).grad.fill_(1e200)  # type: ignore[union-attr]
        return loss * math.nan if what == "loss" else loss

    first, last = served.frames(FIRST + 1)
    served.take(first)
    before = extract(served.trainer.model)
    served.trainer._through = diverged
    with pytest.raises((FloatingPointError, WireError), match=r"lower train\.lr"):
        served.trainer(last)
    served.trainer._through = honest
    for frame in (last, *served.frames(FIRST + 2), Finish(0.25)):
        with pytest.raises(Refused):
            served.trainer(frame)
    after = extract(served.trainer.model)
    assert all(torch.equal(one, other) for name in before for one, other in zip(before[name], after[name], strict=True))
    assert len(served.reports) == 1


def test_adapters_that_are_not_finite_end_the_training() -> None:
    sgd = TrainConfig(lr=1e38, weight_decay=1e10, optimizer="sgd", clip=0.0)
    served = Served(task=replace(TASK, steps=1), train=sgd, dtype=torch.float32)  # which ends at 3e38
    served.steps(1)
    with pytest.raises(FloatingPointError, match="the largest adapter after step 6 is inf"):
        served.trainer(Finish(0.25))
    assert not served.trainer.finished


# Where labels stay with the client


def back(hidden: Frame, loss: float = 0.5) -> HiddenGradient:
    assert isinstance(hidden, Hidden)
    return HiddenGradient(torch.ones_like(hidden.hidden), NONE, loss)


def test_labels_that_stay() -> None:
    served = Served("client")
    for step in range(FIRST, FIRST + STEPS):
        first, last = served.take(*served.frames(step))
        served.take(back(first), back(last))
    served.trainer(Finish(0.25))
    assert served.trainer.finished
    assert [(report.step, report.loss) for report in served.reports] == [(6, 1.0), (7, 1.0), (8, 1.0)]


def test_no_more_hidden_states_wait_than_may_be_under_way() -> None:
    served = Served("client", replace(TASK, examples=40))
    frame = served.frames(FIRST)[0]
    hidden = [served.trainer(frame), served.trainer(frame)]
    for _ in range(200):
        served.refuses(frame, "2 hidden states wait for their gradients, as many as the task allows")
    served.trainer(back(hidden[0]))
    served.trainer(frame)
    assert len(served.trainer._waiting) == 2


@pytest.mark.parametrize("answered", [0, 1])
def test_a_step_is_not_over_while_its_gradients_are_due(answered: int) -> None:
    served = Served("client", replace(TASK, in_flight=3))
    served.take(*map(back, served.take(*served.frames(FIRST))[:answered]))
    served.refuses(served.frames(FIRST + 1)[0], "step 6 has had its last micro-batch, and its gradients are due")
    served.refuses(Finish(0.25), "in the middle of step 6")
    assert not served.reports


BACK: list[tuple[str, Callable[[HiddenGradient], HiddenGradient], str]] = [
    ("shape", lambda f: replace(f, gradient=f.gradient[:1]), r"the gradient \(1, 11, 32\) must be like the state"),
    ("nan", lambda f: replace(f, gradient=_with(f.gradient, math.nan)), "not finite"),
    ("inf", lambda f: replace(f, gradient=_with(f.gradient, math.inf)), "not finite"),
    ("wire", lambda f: replace(f, gradient=f.gradient.bfloat16()), "torch.bfloat16 where the codec float32"),
    *(
        (f"loss of {loss}", lambda f, loss=loss: replace(f, loss=loss), f"the loss is {loss}")
        for loss in (math.nan, math.inf, -1.0)
    ),
]


@pytest.mark.parametrize(("bad", "says"), [case[1:] for case in BACK], ids=[case[0] for case in BACK])
def test_a_gradient_that_does_not_belong(bad: Callable[[HiddenGradient], HiddenGradient], says: str) -> None:
    served = Served("client")
    served.refuses(HiddenGradient(NONE, NONE, 0.0), "no hidden state that was sent")
    good = back(served.trainer(served.frames(FIRST)[0]))
    served.refuses(bad(good), says)
    served.take(good)
    served.refuses(good, "no hidden state that was sent")


# Evaluation


@pytest.mark.parametrize("labels", ["server", "client"])
def test_an_evaluation_has_the_rows_of_its_task(labels: Literal["server", "client"]) -> None:
    served = Served(labels)
    evaluator = ServerEvaluator(served.trainer.model, allowance=replace(TASK, examples=3))
    frame = served.frames(FIRST)[0]
    assert isinstance(evaluator(frame), Loss if labels == "server" else Hidden)
    with pytest.raises(Refused, match="4 examples to evaluate; the task allows 3"):
        evaluator(frame)
    one = replace(frame, cut=frame.cut[:1], attention_mask=frame.attention_mask[:1])
    evaluator(replace(one, labels=frame.labels[:1]))
    with pytest.raises(Refused, match="the task allows 3"):
        evaluator(replace(one, labels=frame.labels[:1]))


@pytest.mark.parametrize(("bad", "says"), [case[1:] for case in SIZES], ids=[case[0] for case in SIZES])
def test_an_evaluation_of_other_shapes(bad: Callable[[Activation], Activation], says: str) -> None:
    served = Served()
    with pytest.raises(Refused, match=says):
        ServerEvaluator(served.trainer.model, allowance=TASK)(bad(served.frames(FIRST)[0]))
