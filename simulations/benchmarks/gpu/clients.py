"""``clients``: several clients of a large model, together, one after another, and as one run of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.copies import to_numbers
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import AdapterSpec, inject
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning import CostModel, Workload
from hsplitlora_flwr.training.multi_adapter import MultiAdapterPass
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import MicroBatch, differentiate
from simulations.benchmarks.common import RANK, Sample, take_turns
from simulations.benchmarks.gpu.cases import Case, Figure, Place
from simulations.benchmarks.gpu.device import PeakBytes, shares, waits
from simulations.benchmarks.gpu.models import PlainPeft, RandomBase, random_batch

MODEL = LlamaConfig(num_hidden_layers=32, max_position_embeddings=4096)
"""LLaMA-2-7B."""
SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=10,
    num_attention_heads=4,
    max_position_embeddings=64,
)
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Of weak clients and a strong server."""
SHAPES = ((1, 128), (2, 256))
"""Rows and tokens of a client's batch: one that leaves a large GPU idle, and one that fills it with eight of them."""
TURNS = 5
USABLE = 0.95
"""Share of the device's free memory that a prediction may take."""
SPEC = AdapterSpec(RANK, 2.0 * RANK)


class Clients:
    """Clients with different splits, both halves of them on the device of a base, with a batch each.

    Parameters
    ----------
    base : RandomBase
        It stays as it is.
    place : Place
        Where it lies.
    batches : Sequence[Batch]
        As many as there are :data:`SPLITS`.
    whole : bool
        With the clients' own halves, for :meth:`steps`.
    """

    def __init__(self, base: RandomBase, place: Place, batches: Sequence[Batch], *, whole: bool) -> None:
        self._batches = batches
        self._tokens = [(b.input_ids.to(place.device), b.attention_mask.to(place.device)) for b in batches]
        self._upper = [base.server_part(split).train() for split in SPLITS]
        self._lower = [base.client_part(split).train() for split in SPLITS if whole]
        layers = dict.fromkeys(base.linears(), SPEC)
        adapters = [[inject(part, layers, "") for part in parts] for parts in (self._lower, self._upper)]
        self.adapters = [parameter for side in adapters for own in side for parameter in own]
        self._below, self._above = ([AdapterOptimizer(own, TrainConfig()) for own in side] for side in adapters)
        self._joint = MultiAdapterPass(base)
        for part in self._upper:
            self._joint.enter(part)
        hidden = int(base.model.config.hidden_size)
        self._cuts = [
            torch.randn(*ids.shape, hidden, dtype=base.model.dtype, device=place.device) for ids, _ in self._tokens
        ]
        self._step = 0
        self.losses: list[float] = []

    def servers(self, *, together: bool) -> None:
        """A step of all server halves alone, from cut activations that are there."""
        everybody = range(len(SPLITS))
        for some in [everybody] if together else [[one] for one in everybody]:
            losses = self._differentiate(some, [self._cuts[client].requires_grad_() for client in some], together)
            for client in some:
                self._cuts[client].grad = None
                self._above[client].step(self._step, self._above[client].grad_norm())
            to_numbers(*losses)
        self._step += 1

    def steps(self, *, together: bool) -> None:
        """A step of all clients: their own halves one by one, those of the server in one pass or one by one."""
        everybody = range(len(SPLITS))
        losses = []
        for some in [everybody] if together else [[one] for one in everybody]:
            cuts = [self._lower[client](*self._tokens[client]) for client in some]
            arrived = [cut.detach().requires_grad_() for cut in cuts]
            found = self._differentiate(some, arrived, together)
            for client, cut, leaf in zip(some, cuts, arrived, strict=True):
                cut.backward(leaf.grad)
                both = self._below[client], self._above[client]
                norm = torch.hypot(*(optimizer.grad_norm() for optimizer in both))
                for optimizer in both:
                    optimizer.step(self._step, norm)
            losses += to_numbers(*found)
        self._step += 1
        self.losses.append(sum(losses) / len(losses))

    def _differentiate(self, some: Iterable[int], cuts: Sequence[Tensor], together: bool) -> list[Tensor]:
        works = [
            MicroBatch(
                self._upper[client],
                cut,
                self._tokens[client][1],
                self._batches[client].labels,
                self._batches[client].label_tokens,
            )
            for client, cut in zip(some, cuts, strict=True)
        ]
        return self._joint.differentiate(works) if together else [differentiate(work) for work in works]


def clients(place: Place, quantise: str) -> Iterator[Case]:
    """A case for every shape of a batch; all are over one base, which is made with the first of them."""
    config, shapes = (SMALL, ((1, 16),)) if place.small else (MODEL, SHAPES)
    base = cache(lambda: RandomBase(config, "bfloat16", place, quantise))
    for rows, length in shapes:
        yield Case(
            f"{len(SPLITS)} clients x {rows} x {length}", partial(_figures, place, base, config, quantise, rows, length)
        )


def _figures(
    place: Place, base_of: Callable[[], RandomBase], config: PretrainedConfig, quantise: str, rows: int, length: int
) -> Iterator[Figure]:
    workload = Workload(rows, length, "bfloat16", half="per_client", quantise=quantise)
    cost = CostModel(config, find_family(config), workload, adapter_rank=RANK)
    base = base_of()
    free = place.free_bytes()
    predicted, needed = _server_bytes(cost), _all_bytes(cost) - cost.total_weight_bytes
    if free is not None and needed > USABLE * free:
        yield Figure.not_run(f"{needed / 1e9:.1f} GB are needed beside the base, {free / 1e9:.1f} GB are free")
        return
    batches = [random_batch(config, rows, length, client) for client in range(len(SPLITS))]
    tokens, turns = len(SPLITS) * rows * length, 1 if place.small else TURNS

    group = Clients(base, place, batches, whole=False)
    together, in_turn = (partial(group.servers, together=each) for each in (True, False))
    with PeakBytes(place, [*base.model.parameters(), *base.model.buffers(), *group.adapters]) as peak:
        for _ in range(2):  # states of the optimizers come with the first step
            together()
    yield Figure("predicted_device_gb", predicted / 1e9, note="servers' halves together")
    yield Figure("measured_device_gb", peak.bytes / 1e9)
    yield Figure("predicted / measured", predicted / peak.bytes, at_least=0.95, at_most=1.05)
    halves = take_turns([partial(place.seconds, side) for side in (together, in_turn)], turns)
    yield from _speeds("servers' halves", halves, tokens)
    yield from waits(place, together)
    ranks = _ranks(cost)
    above, below = (sum(flops(split, ranks) for split in SPLITS) for flops in (cost.server_flops, cost.client_flops))
    yield from shares(place, above, halves[0].median)

    group = Clients(base, place, batches, whole=True)
    plain, first = PlainPeft(base, SPEC, TrainConfig()), list[float]()
    steps: list[Callable[[], object]] = [
        partial(group.steps, together=True),
        partial(group.steps, together=False),
        lambda: first.append(float(plain.step(batches))),
    ]
    figures = take_turns([partial(place.seconds, side) for side in steps], turns)
    yield from _speeds("whole steps", figures[:2], tokens)
    ratio = figures[2] / figures[0]
    yield Figure("peft_tokens_per_s", tokens / figures[2].median, note="all rows in one batch, one adapter")
    yield Figure("together / peft", ratio.median, at_least=0.9, note=f"whole steps; spread {ratio.spread:.3g}")
    yield Figure("error_of_the_first_loss", abs(group.losses[0] / first[0] - 1), at_most=1e-2)
    yield from shares(place, above + below, figures[0].median)
    rate, whole = above / halves[0].median, (above + below) / figures[2].median
    yield Figure("together / peft, by operation", rate / whole, at_least=0.9, note="servers' halves")


def _speeds(what: str, figures: Sequence[Sample], tokens: int) -> Iterator[Figure]:
    together, in_turn = figures
    ratio = in_turn / together
    yield Figure("together_tokens_per_s", tokens / together.median, note=what)
    yield Figure("in_turn_tokens_per_s", tokens / in_turn.median, note=what)
    yield Figure("together / in turn", ratio.median, at_least=2.0, note=f"{what}; spread {ratio.spread:.3g}")


def _ranks(cost: CostModel) -> dict[str, int]:
    return {layer.name: RANK for layer in cost.layers}


def _server_bytes(cost: CostModel) -> int:
    """What the cost model says of a server's device: the base, adapters, and passes; frames are on the host."""
    ranks = _ranks(cost)
    own = (cost.adapter_bytes(ranks, split, cost.num_blocks) + cost.pass_bytes(split, ranks) for split in SPLITS)
    return cost.total_weight_bytes + sum(own)


def _all_bytes(cost: CostModel) -> int:
    """The same with the clients' halves."""
    ranks = _ranks(cost)
    below = (cost.adapter_bytes(ranks, 0, split) + cost.kept_bytes(ranks, 0, split) for split in SPLITS)
    return _server_bytes(cost) + sum(below)
