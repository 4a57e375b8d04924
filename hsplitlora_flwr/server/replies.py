"""Checks of a client's last reply, before it counts.

A client's machine is not the server's. Whatever comes from it is compared with what was asked for and with plausible
bounds, so that a bad reply costs that client its round and nobody else anything. Sizes come first, before anything is
parsed, then shapes and types, then values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from hsplitlora_flwr.evaluation.perplexity import MAX_NLL
from hsplitlora_flwr.lora.aggregation import Factors, is_finite
from hsplitlora_flwr.messages import EVALUATE, PROBE, TRAIN, Outcome, ReplyError, Task, reading, record
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.training.schedule import farthest

TRAFFIC = ("bytes-up", "bytes-down")
TRAINING = (
    "resident-parameters",
    "measured-bytes",
    "host-bytes",
    "tokens",
    "label-tokens",
    "seconds",
    "seconds-before",
    *TRAFFIC,
)
FIGURES = {PROBE: TRAFFIC, TRAIN: TRAINING, EVALUATE: ("nll", "label-tokens")}
"""Metrics that the summary needs of a client, by kind of task."""
MOST = 1e18
"""No figure of a client is larger."""
_LEAST = {"tokens": 1, "seconds": 1e-6}
"""Nobody trains on nothing, or in no time."""
_RECORDS, _METRICS = 16, 32
"""Records of a reply and metrics in it: more than there are, so that a later version may add some."""
_PACKET, _TENSOR = 1 << 12, 1 << 9
"""Bytes of a packet besides its tensors, and of the name and shape of each."""
_SAID = 1 << 8
"""Bytes of a score, a loss or a metric as text, with its name."""
_ROUNDING = 1.001
"""Slack of a bound that holds but for rounding."""

Shape = tuple[int, int]


def reply_bytes(task: Task, layers: Iterable[Layer]) -> int:
    """Bytes of a task's reply at most, but for what a client says of itself."""
    asked = Asked.by(task, [layer for layer in layers if layer.block < task.split])
    return asked.nbytes + _SAID * (len(asked.scores) + asked.steps + _METRICS)


def read_outcome(
    records: RecordDict, task: Task, layers: Iterable[Layer], start: Mapping[str, Factors] | None = None
) -> Outcome:
    """The outcome of a task from the content of the client's last reply.

    Parameters
    ----------
    layers : Iterable[Layer]
        Of the model.
    start : Mapping[str, Factors], optional
        What the client's adapters went on from; those that are not named started afresh.

    Raises
    ------
    ReplyError
        If it is not what was asked for.
    """
    with reading("its reply"):
        held = [layer for layer in layers if layer.block < task.split]
        asked = Asked.by(task, held)
        asked.check_sizes(records)
        outcome = Outcome.from_records(records)
        asked.check_figures(outcome)
        if task.kind != TRAIN and outcome.adapters:
            raise ReplyError("its reply holds adapters, and none were asked for")
        if task.kind == TRAIN:
            check_adapters(outcome.adapters, asked.adapters, asked.dtype)
            check_moves(outcome.adapters, start or {}, task)
        elif task.kind == EVALUATE:
            check_evaluation(outcome)
        check_scores(outcome, asked.scores)
        return outcome


@dataclass(frozen=True)
class Asked:
    """What a client was asked for, which is all that its last reply may hold.

    Parameters
    ----------
    adapters : Mapping[str, tuple[Shape, Shape]]
        Shapes of ``(B, A)`` by absolute layer name.
    dtype : torch.dtype
        Of the adapters.
    scores : Collection[str]
        Names of the weights that it was to score.
    steps : int
        Each of which has a loss; of an evaluation 0.
    tokens : int
        That its work has at most.
    figures : Collection[str]
        Metrics that there must be.
    """

    adapters: Mapping[str, tuple[Shape, Shape]]
    dtype: torch.dtype
    scores: Collection[str]
    steps: int
    tokens: int
    figures: Collection[str]

    @classmethod
    def by(cls, task: Task, held: Collection[Layer]) -> Asked:
        """What a task asks a client for that holds these layers."""
        config, ranks = task.config, {name: spec.rank for name, spec in task.specs.items()}
        scored = {layer.name for layer in held if task.kind == PROBE or layer.name in ranks}
        examples = task.steps * config.train.batch_size if task.steps else config.evaluation.client_rows
        return cls(
            adapters={
                layer.name: ((layer.out_features, ranks[layer.name]), (ranks[layer.name], layer.in_features))
                for layer in held
                if layer.name in ranks
            },
            dtype=torch.promote_types(getattr(torch, config.model.dtype), torch.float32),
            scores=scored if task.scored_steps and not task.forward_only else (),
            steps=task.steps,
            tokens=examples * config.data.max_length,
            figures=FIGURES[task.kind],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters at most, in as many packets as there are tensors."""
        factors = [factor for pair in self.adapters.values() for factor in pair]
        tensors = sum(math.prod(shape) * self.dtype.itemsize for shape in factors)
        return tensors + (_TENSOR + _PACKET) * max(len(factors), 1)

    def check_sizes(self, records: RecordDict) -> None:
        """Raise :class:`ReplyError` if anything is larger than what was asked for; nothing is parsed here."""
        _check_count("records", len(records), _RECORDS)
        arrays = record(records, "adapters", ArrayRecord)
        factors = [factor for pair in self.adapters.values() for factor in pair]
        _check_count("arrays", len(arrays), max(len(factors), 1))
        tensors = sum(math.prod(shape) * self.dtype.itemsize for shape in factors)
        most = tensors + _TENSOR * len(factors) + _PACKET * max(len(arrays), 1)
        _check_count("bytes of adapters", sum(len(array.data) for array in arrays.values()), most)
        _check_count("scores", len(record(records, "importance", MetricRecord)), len(self.scores))
        _check_count("metrics", len(record(records, "metrics", MetricRecord)), _METRICS)
        losses = record(records, "losses", MetricRecord).get("losses")
        if not isinstance(losses, list) or len(losses) != self.steps:
            told = f"{len(losses):,}" if isinstance(losses, list) else "no list of"
            raise ReplyError(f"its reply holds {told} losses of {self.steps} steps")

    def check_figures(self, outcome: Outcome) -> None:
        """Raise :class:`ReplyError` unless there are the metrics that the summary needs, and they and the losses can be
        true."""
        for name in self.figures:
            value, most = outcome.metrics.get(name, math.nan), self.tokens if "tokens" in name else MOST
            if not _LEAST.get(name, 0) <= value <= most:
                raise ReplyError(f"it says {name}={value:g}, which must be from {_LEAST.get(name, 0):g} to {most:g}")
        if not all(map(math.isfinite, outcome.losses)):
            raise ReplyError("its losses are not finite; lower train.lr or set train.clip")


def check_adapters(
    adapters: Mapping[str, Factors], shapes: Mapping[str, tuple[Shape, Shape]], dtype: torch.dtype
) -> None:
    """Raise :class:`ReplyError` unless the adapters have these shapes and this dtype, and are finite."""
    if shapes != {name: (tuple(b.shape), tuple(a.shape)) for name, (b, a) in adapters.items()}:
        raise ReplyError("its adapters are not those of its plan")
    if wrong := {factor.dtype for pair in adapters.values() for factor in pair} - {dtype}:
        raise ReplyError(f"its adapters are {', '.join(map(str, wrong))}, and not {dtype}")
    if not all(is_finite(factor) for pair in adapters.values() for factor in pair):
        raise ReplyError("its adapters are not finite; lower train.lr or set train.clip")


def check_moves(adapters: Mapping[str, Factors], start: Mapping[str, Factors], task: Task) -> None:
    """Raise :class:`ReplyError` if an adapter lies farther from its start than any training takes it.

    Parameters
    ----------
    adapters : Mapping[str, Factors]
        ``(B, s A)`` by absolute layer name.
    start : Mapping[str, Factors]
        Where they started, as far as they did not start afresh: with ``B`` at zero, and rows of ``A`` that are no
        longer than 1.
    """
    train = task.config.train
    for name, pair in adapters.items():
        spec = task.specs[name]
        known = start.get(name, (torch.zeros(0), torch.zeros(0)))
        for role, factor, before, scale in zip("BA", pair, known, (1.0, spec.scale), strict=True):
            fresh = spec.scale * math.sqrt(spec.rank) if role == "A" else 0.0
            moved = scale * farthest(train, task.first_step, task.steps, factor.numel())
            length, most = (float(tensor.double().norm()) for tensor in (factor, before))
            most = _ROUNDING * (most + fresh + moved)
            if length > most:
                raise ReplyError(
                    f"its adapter on {name} cannot come from {task.steps} steps of train.lr={train.lr:g}: {role} has a "
                    f"norm of {length:.3g}, and {most:.3g} is the most"
                )


def check_scores(outcome: Outcome, names: Collection[str]) -> None:
    """Raise :class:`ReplyError` unless there is an importance of each of ``names``, and of nothing else."""
    if outcome.importance.keys() != set(names):
        raise ReplyError("its scores are not those of the weights that it was to score")
    if wrong := [name for name, score in outcome.importance.items() if not 0 <= score <= MOST]:
        raise ReplyError(f"its importance of {wrong[0]} is {outcome.importance[wrong[0]]}; lower train.lr")


def check_evaluation(outcome: Outcome) -> None:
    """Raise :class:`ReplyError` unless the loss that it measured has a perplexity."""
    nll, tokens = outcome.metrics["nll"], outcome.metrics["label-tokens"]
    if not (tokens >= 1 and nll / tokens < MAX_NLL):
        raise ReplyError(f"a loss of {nll:g} over {tokens:.0f} tokens has no perplexity")


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise ReplyError(f"its reply holds {count:,} {what}, and at most {most:,} were asked for")
