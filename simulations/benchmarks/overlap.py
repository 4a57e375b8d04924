"""``overlap``: micro-batches in flight over slow links."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.memory import return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from simulations.benchmarks.common import SHAPES, Apart, Row, Sample, Setup, specs, spread_batches
from simulations.shaping import SlowLink, shaped

LINKS = ((SlowLink(100, 20), "float32"), (SlowLink(100, 20), "bfloat16"), (SlowLink(5, 20), "float32"))
"""(link, numbers on the wire)."""
MICRO_BATCHES = ((1, 1), (4, 1), (4, 2), (4, 4))
"""(micro-batches of a step, in flight)."""
TURNS = 4


@dataclass(frozen=True)
class Exchange:
    """One way of taking the steps of the benchmark ``overlap``.

    Parameters
    ----------
    link : SlowLink or None
        None for the plain loopback.
    wire : str
        Numbers on the wire, both ways.
    micro_batches : int
        Of a step.
    in_flight : int
        How many of them may be under way at once.
    """

    link: SlowLink | None
    wire: str
    micro_batches: int
    in_flight: int


@dataclass(frozen=True)
class ExchangeRun:
    """The client process of the benchmark ``overlap``."""

    path: str
    split: int
    threads: int
    streams: Sequence[tuple[Exchange, Endpoint, str]]
    """For every exchange where its server is, and its token."""

    def measure(self) -> list[tuple[list[float], float, float]]:
        """For every stream: seconds of its steps after the first one, and bytes of a step up and down."""
        return_freed_memory()
        torch.set_num_threads(self.threads)
        config = read_config(self.path)
        model, _ = load_client(self.path, self.split, "float32", "cpu", {})
        optimizer = AdapterOptimizer(inject(model, specs(name for name, _ in model.linears()), ""), TrainConfig())
        model.train()
        rows, length = SHAPES[0]
        sides: list[tuple[_TimedTrainer, StreamLink, int]] = []
        with ExitStack() as stack:
            for exchange, endpoint, token in self.streams:
                batches = spread_batches(rows, length, int(config.vocab_size))
                size = rows // exchange.micro_batches
                trainer = _TimedTrainer(
                    model, optimizer, batches, first_step=0, micro_batch_size=size, up=exchange.wire
                )
                link = stack.enter_context(StreamLink(endpoint, token, exchange.in_flight))
                sides.append((trainer, link, exchange.in_flight))
            for _ in range(TURNS):
                for trainer, link, in_flight in sides:
                    train_client(trainer, link, 1, in_flight)
        return [(side.seconds[1:], link.bytes_up / TURNS, link.bytes_down / TURNS) for side, link, _ in sides]


class _TimedTrainer(ClientTrainer):
    """Notes how long each step took, from its batch to its end; the server takes its optimizer's step after that."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: list[float] = []

    def begin(self) -> int:
        self._started = time.perf_counter()
        return super().begin()

    def step(self) -> None:
        super().step()
        self.seconds.append(time.perf_counter() - self._started)


def overlap(setup: Setup) -> Iterator[Row]:
    """A step over shaped links, client and server in two processes, each on half of the cores of this machine.

    A row compares a step, ``step_s``, with what it would take if only one of its two parts took time:

    - ``compute_s``: the same exchange over the plain loopback with float32 numbers, TLS and all, so with as many
      micro-batches in flight. What the two sides compute at the same time counts once, as it does on two machines.
    - ``wire_s``: the same exchange between sides that compute in no time; see :func:`wire_seconds`.

    Figures are medians over turns that all exchanges take one after another, so that they meet the same machine, and
    ``spread_s`` is the distance between the quartiles of these steps.
    """
    base = SharedBase(setup.model)
    split = max(int(base.model.config.num_hidden_layers) // 3, 1)
    part = base.server_part(split).train()
    optimizer = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
    threads = max(all_cores() // 2, 1)
    loopback = [Exchange(None, "float32", *each) for each in MICRO_BATCHES]
    slow = [Exchange(link, wire, *each) for link, wire in LINKS for each in MICRO_BATCHES]
    most = max(in_flight for _, in_flight in MICRO_BATCHES)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"), in_flight=most)
    with ExitStack() as stack:
        stack.callback(stream.stop)
        near = {
            link: stack.enter_context(shaped(stream.endpoint.address, link)) for link in {link for link, _ in LINKS}
        }
        streams = []
        for each in loopback + slow:
            token = stream.admit(ServerTrainer(part, OwnHalf(optimizer), threads=lambda: threads, down=each.wire))
            endpoint = replace(stream.endpoint, address=near[each.link]) if each.link else stream.endpoint
            streams.append((each, endpoint, token))
        with Apart(ExchangeRun, setup.model, split, threads, streams) as client:
            measured = client.call("measure")
    figures = dict(zip(loopback + slow, measured, strict=True))
    for each in slow:
        seconds, up, down = figures[each]
        alone, _, _ = figures[replace(each, link=None, wire="float32")]
        steps = Sample(seconds)
        compute_s, step_s = Sample(alone).median, steps.median
        wire_s = wire_seconds(up, down, each)
        yield {
            "link": f"{each.link} (TCP relay)",
            "wire": each.wire,
            "micro-batches": each.micro_batches,
            "in flight": each.in_flight,
            "up_mb": up / 1e6,
            "down_mb": down / 1e6,
            "compute_s": compute_s,
            "wire_s": wire_s,
            "step_s": step_s,
            "spread_s": steps.spread,
            "step / max(compute, wire)": step_s / max(compute_s, wire_s),
            "step / (compute + wire)": step_s / (compute_s + wire_s),
        }


def wire_seconds(up: float, down: float, exchange: Exchange) -> float:
    """Time of a step between sides that compute in no time, over a duplex link.

    Each direction sends the micro-batches one after another at the link's rate, and what is sent arrives half a round
    trip later. A micro-batch goes up once fewer than ``in_flight`` others are unanswered, and its answer comes down
    once all of it is there. With one in flight nothing overlaps: ``(up + down) / rate + micro_batches * round_trip``.
    With all of them: ``max(up, down) / rate + min(up, down) / rate / micro_batches + round_trip``.

    Parameters
    ----------
    up, down : float
        Bytes of a step, in micro-batches of the same size.
    exchange : Exchange
        Over a shaped link.
    """
    assert exchange.link is not None
    count, delay = exchange.micro_batches, exchange.link.delay
    rising, falling = (exchange.link.seconds(size / count) for size in (up, down))
    sent = answered = 0.0  # when the last byte so far has left the client, and the server
    arrived: list[float] = []  # when each answer was there
    for index in range(count):
        room = arrived[index - exchange.in_flight] if index >= exchange.in_flight else 0.0
        sent = max(sent, room) + rising
        answered = max(answered, sent + delay) + falling
        arrived.append(answered + delay)
    return arrived[-1]
