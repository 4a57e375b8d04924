"""What a hostile client with a valid token sends over its stream, and what the server should say to it.

The task is of :data:`STEPS` steps of :data:`ROWS` rows, :data:`AT_ONCE` of them in a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hsplitlora_flwr.transport.codecs import pack
from hsplitlora_flwr.transport.frames import Activation, Finish, Frame, HiddenGradient, Loss, Ping, encode
from tests.tiny import random_batches

STEPS, ROWS, AT_ONCE, TOKENS, HIDDEN, SPLIT = 3, 4, 2, 11, 32, 2
NONE = torch.empty(0)

Sent = Iterable[Frame | bytes]
Attack = tuple[Callable[[], Sent], str]
"""What is sent, and a pattern of what should be said."""


def steps(labels: str = "server") -> list[list[Activation]]:
    """What an honest client might send, by step and micro-batch."""
    stay, made = labels == "client", []
    for step, batch in zip(range(STEPS + 1), random_batches(5, ROWS, TOKENS), strict=False):
        values = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))
        made.append(
            [
                Activation(
                    step,
                    values[at : at + AT_ONCE],
                    NONE,
                    batch.attention_mask[at : at + AT_ONCE],
                    torch.empty(0, dtype=torch.int64) if stay else batch.labels[at : at + AT_ONCE],
                    batch.label_tokens,
                    at + AT_ONCE == ROWS,
                    0.125,
                )
                for at in range(0, ROWS, AT_ONCE)
            ]
        )
    return made


def first(**changes: Any) -> list[Frame]:
    """The first micro-batch of a task, with something else in it."""
    return [replace(steps()[0][0], **changes)]


def shaped(rows: int, tokens: int) -> list[Frame]:
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    return first(cut=torch.zeros(rows, tokens, HIDDEN), attention_mask=ids, labels=ids, label_tokens=1)


def told(frame: Frame, number: bytes, instead: bytes) -> bytes:
    """A frame that says something that none of ours can: another number of as many characters."""
    data = encode(frame)
    assert data.count(number) == 1 and len(number) == len(instead)
    return data.replace(number, instead)


def honest_until(step: int, micro_batch: int = 0, labels: str = "server") -> list[Frame]:
    made = steps(labels)
    frames = [frame for each in made[:step] for frame in each] + made[step][:micro_batch]
    return [each for frame in frames for each in ([frame, GRADIENT] if labels == "client" else [frame])]


ONE, MASK = steps()[0][0], steps()[0][0].attention_mask
VALUES, LABELS = ONE.cut, ONE.labels
GRADIENT = HiddenGradient(torch.full_like(VALUES, 1e-3), NONE, 0.125)


def but(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


ON_TRAINING: dict[str, Attack] = {
    # steps
    "a step before all": (lambda: first(step=-50), "step -50 came where step 0 is due"),
    "a step far ahead": (lambda: first(step=10**9), "step 1000000000 came where step 0 is due"),
    "a step again": (lambda: [*honest_until(1), *steps()[0]], "step 0 came where step 1 is due"),
    "a step left out": (lambda: [*honest_until(1), *steps()[2]], "step 2 came where step 1 is due"),
    "a step in a step": (lambda: [*honest_until(0, 1), *steps()[1]], "step 1 came where step 0 is due"),
    "a step too many": (lambda: honest_until(STEPS, 1), "step 3 came after the last one, 2"),
    "an end too soon": (lambda: [*honest_until(1), Finish(0.5)], "ends after 1 of 3 steps"),
    "an end at once": (lambda: [Finish(0.5)], "in the middle of step 0"),
    "an end in a step": (lambda: [*honest_until(2, 1), Finish(0.5)], "in the middle of step 2"),
    "more after the end": (
        lambda: [*honest_until(STEPS), Finish(0.5), *steps()[STEPS]],
        "Activation came after the end of the training",
    ),
    # sizes
    "no last micro-batch": (lambda: [replace(ONE, label_tokens=40)] * 9, "has 6 examples; the task allows 4"),
    "many rows": (lambda: shaped(3, 1), "3 examples x 1 tokens; the task allows 2 examples x 11 tokens"),
    "long rows": (lambda: shaped(1, 22), "1 examples x 22 tokens; the task allows"),
    "a large frame": (lambda: shaped(500, TOKENS), "Activation has .* bytes; at most .* are accepted here"),
    "no rows": (lambda: shaped(0, TOKENS), "without a token"),
    "another width": (lambda: first(cut=VALUES[..., :7]), r"cut activation \(2, 11, 7\) must be \(2, 11, 32\)"),
    # labels and masks
    "too few label tokens": (lambda: first(label_tokens=1), "but said 1"),
    "too many label tokens": (lambda: first(label_tokens=2**62), "at most 40 fit"),
    "a lie about label tokens": (
        lambda: [replace(frame, label_tokens=frame.label_tokens + 1) for frame in steps()[0]],
        "labelled tokens in 2 micro-batches, but said",
    ),
    "two minds about label tokens": (
        lambda: [ONE, replace(steps()[0][1], label_tokens=ONE.label_tokens + 1)],
        "those before it said",
    ),
    "a token beyond the vocabulary": (lambda: first(labels=but(LABELS, 257)), "token ids from 0 to 256"),
    "a negative token": (lambda: first(labels=but(LABELS, -1)), "token ids from 0 to 256"),
    "a mask of twos": (lambda: first(attention_mask=2 * MASK), "1 for tokens and 0 for padding"),
    "a mask of nothing": (lambda: first(attention_mask=0 * MASK), "a row without a token"),
    "a mask of floats": (lambda: first(attention_mask=MASK.float()), "holds int64 numbers"),
    # numbers
    "nan": (lambda: first(cut=but(VALUES, math.nan)), "not finite"),
    "inf": (lambda: first(cut=but(VALUES, math.inf)), "not finite"),
    "numbers that overflow": (lambda: first(cut=torch.full_like(VALUES, 3e38)), r"lower train\.lr"),
    "another wire": (lambda: first(cut=VALUES.double()), "torch.float64 where the codec float32"),
    "int8 with a scale of nan": (
        lambda: first(cut=pack(VALUES, "int8")[0], scale=but(pack(VALUES, "int8")[1], math.nan)),
        "torch.int8 where the codec float32",
    ),
    "a square of nan": (lambda: [told(Finish(0.5), b"0.5", b"NaN")], "'previous_grad_norm_sq' is nan"),
    "a square of inf": (lambda: [told(ONE, b"0.125", b"1e999")], "'previous_grad_norm_sq' is inf"),
    "a negative square": (lambda: first(previous_grad_norm_sq=-1.0), "previous_grad_norm_sq is -1.0"),
    "a last square below zero": (lambda: [*honest_until(STEPS), Finish(-1.0)], "previous_grad_norm_sq is -1.0"),
    "a last square of nan": (
        lambda: [*honest_until(STEPS), told(Finish(0.5), b"0.5", b"NaN")],
        "'previous_grad_norm_sq' is nan",
    ),
    # what is no frame of a client
    "a server's frame": (lambda: [Loss(1.0)], "a client does not send Loss"),
    "a gradient for nothing": (lambda: [HiddenGradient(VALUES, NONE, 1.0)], "no hidden state that was sent"),
    "noise": (lambda: [b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n"], "not a frame"),
    "a frame of a petabyte": (lambda: [b"HSPL\3\0" + (9).to_bytes(4, "little") + b"\0" * 6 + b"\4\0"], "at most"),
    "a deep header": (lambda: [b"HSPL\3\0\x60\xea\0\0\x72\xea\0\0\0\0\0\0" + b"[" * 60000], "not JSON"),
    "a frame cut short": (lambda: [encode(ONE)[:500]], "goes on with 500 after 0"),
    "a frame in crumbs": (lambda: [encode(ONE)[:500], encode(ONE)[500:600], encode(ONE)[600:]], "goes on with 500"),
    "many pings": (lambda: [Ping(torch.empty(0, dtype=torch.uint8), 0)] * 99, "more than 64 pings"),
    "a ping for a gigabyte": (lambda: [Ping(torch.empty(0, dtype=torch.uint8), 2**30)], "a ping asks for"),
}


def back(**changes: Any) -> list[Frame]:
    return [steps("client")[0][0], replace(GRADIENT, **changes)]


WHERE_LABELS_STAY: dict[str, Attack] = {
    "no gradient ever": (lambda: [replace(steps("client")[0][0], label_tokens=40)] * 200, "1 hidden states wait"),
    "a gradient of nan": (lambda: back(gradient=but(VALUES, math.nan)), "not finite"),
    "a gradient that overflows": (lambda: back(gradient=torch.full_like(VALUES, 3e38)), "not finite|is inf|is nan"),
    "a gradient of another shape": (lambda: back(gradient=VALUES[:1]), "must be like the state"),
    "a gradient of another wire": (lambda: back(gradient=VALUES.bfloat16()), "where the codec float32"),
    "a loss below zero": (lambda: back(loss=-1.0), "the loss is -1.0"),
    "a loss of nan": (lambda: [back()[0], told(back()[1], b"0.125", b"  NaN")], "'loss' is nan"),
    "a gradient twice": (lambda: [*back(), back()[1]], "no hidden state that was sent"),
    "an end with gradients due": (lambda: [back()[0], Finish(0.5)], "in the middle of step 0"),
    "labels all the same": (lambda: first(), r"or \(0,\) where they stay"),
    "a gradient of nan in the second step": (
        lambda: [*honest_until(1, 1, "client"), steps("client")[1][1], replace(GRADIENT, gradient=VALUES * math.nan)],
        "not finite",
    ),
    "a step again with gradients": (
        lambda: [*honest_until(2, 0, "client"), *steps("client")[1]],
        "step 1 came where step 2 is due",
    ),
}

ON_EVALUATION: dict[str, Attack] = {
    "rows without end": (lambda: [ONE] * 50, "4 examples to evaluate; the task allows 3"),
    "training": (lambda: [Finish(0.5)], "a client that evaluates does not send Finish"),
    "long evaluation": (lambda: shaped(1, 12), "1 examples x 12 tokens; the task allows"),
    "nan to evaluate": (lambda: first(cut=but(VALUES, math.nan)), "not finite"),
    "no token to evaluate": (lambda: first(labels=but(LABELS, 10**6)), "token ids from 0 to 256"),
}


def accepted(sent: Sent, labels: str = "server") -> int:
    """How many whole steps of an honest client it begins with."""
    bytes_of = [each if isinstance(each, bytes) else encode(each) for each in sent]
    honest = [[*map(encode, honest_until(step, labels=labels))] for step in range(STEPS + 1)]
    return max(step for step, frames in enumerate(honest) if bytes_of[: len(frames)] == frames)
