"""``clients``: training speed of clients that train at once against that of one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.memory import return_freed_memory
from hsplitlora_flwr.training.multi_adapter import MultiAdapterPass
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import CorePool, ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from simulations.benchmarks.common import Apart, Row, Sample, Setup, specs, spread_batches

COUNTS = (1, 2, 4, 8)
"""Clients at once."""
SHAPE = (4, 64)
"""(batch size, sequence length)."""
SECONDS = 20.0
"""Of a turn; every client also ends the step that it is at."""
TURNS = 3

Admit = Callable[[SharedBase, StreamServer, Sequence[int]], list[str]]
"""Lets clients of these split points train; returns a token for each."""


def separate(base: SharedBase, stream: StreamServer, splits: Sequence[int]) -> list[str]:
    """Every client has a trainer of its own; as many passes at once as there are cores, and as many threads."""
    count = all_cores()
    cores = CorePool(count)

    def threads() -> int:
        return max(count // max(stream.open_streams, 1), 1)

    tokens = []
    for split in splits:
        part = base.server_part(split).train()
        optimizer = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
        tokens.append(stream.admit(cores.share(ServerTrainer(part, OwnHalf(optimizer), threads=threads))))
    return tokens


def joint(base: SharedBase, stream: StreamServer, splits: Sequence[int]) -> list[str]:
    """Clients that wait share one pass over the base, which has all cores."""
    together, cores = MultiAdapterPass(base), all_cores()
    tokens = []
    for split in splits:
        part = base.server_part(split).train()
        optimizer = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
        together.enter(part)
        tokens.append(stream.admit(ServerTrainer(part, OwnHalf(optimizer), threads=lambda: cores, through=together)))
    return tokens


SERVERS: dict[str, Admit] = {"separate": separate, "joint": joint}
"""How the server takes several clients."""


class Pace(NamedTuple):
    """What clients that trained at once reached: tokens/s of all together, and steps/s of each."""

    tokens: float
    steps: list[float]


def clients(setup: Setup) -> Iterator[Row]:
    """Total tokens/s of 1, 2, 4 and 8 clients that train at once, against that of one.

    Every client is a process of its own with another split point, and trains over the TLS stream against a server in
    this process. All share the cores of this machine: a client takes as many threads as its share of them, one at
    least, and so does the server's half of it. Split points are spread over the model; a token costs the two sides
    together the same wherever the cut is.

    - ``total / one``: tokens/s of all together over those of one client with the same kind of server, which took its
      turn beside them, as all kinds and numbers do; goal: never below 0.95.
    - ``slowest / fastest``: steps/s, a sign of starvation where it is far below what the split points explain. On one
      machine they explain little, for the same reason.

    Clients train for some seconds, and the step at which the time is over counts, with its time. Speeds are medians
    over turns, and ``spread`` is the distance between the quartiles of ``total / one``.
    """
    config = read_config(setup.model)
    base = SharedBase(setup.model)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    splits = spread_splits(int(config.num_hidden_layers), max(COUNTS))
    with ExitStack() as stack:
        stack.callback(stream.stop)
        processes = [stack.enter_context(Apart(Client, setup.model, split)) for split in splits]
        sides = list(itertools.product(SERVERS, COUNTS))
        paces: dict[tuple[str, int], list[Pace]] = {side: [] for side in sides}
        for turn in range(TURNS):
            for server, size in sides[:: -1 if turn % 2 else 1]:
                tokens = SERVERS[server](base, stream, splits[:size])
                paces[server, size].append(train_at_once(processes[:size], stream.endpoint, tokens))
    for server, size in sides:
        total, one = (Sample([pace.tokens for pace in paces[server, count]]) for count in (size, COUNTS[0]))
        ratio = total / one
        yield {
            "server": server,
            "clients": size,
            "splits": ", ".join(map(str, splits[:size])),
            "tokens_per_s": total.median,
            "total / one": ratio.median,
            "spread": ratio.spread,
            "slowest / fastest": Sample([min(pace.steps) / max(pace.steps) for pace in paces[server, size]]).median,
        }


def spread_splits(blocks: int, count: int) -> list[int]:
    """Split points of ``count`` clients, in an order in which the first few are spread over the model as well.

    They are the fractions 1/2, 1/4, 3/4, 1/8, 5/8, ... of the model (van der Corput), as far as it has blocks.
    """
    splits = []
    for index in range(1, count + 1):
        digits = f"{index:b}"[::-1]
        splits.append(min(max(round(blocks * int(digits, 2) / 2 ** len(digits)), 1), blocks - 1))
    return splits


def train_at_once(processes: Sequence[Apart], endpoint: Endpoint, tokens: Sequence[str]) -> Pace:
    """Let clients train at the same time, once all of them have taken a first step."""
    threads = max(all_cores() // len(processes), 1)
    for ready in [p.start("open", endpoint, token, threads) for p, token in zip(processes, tokens, strict=True)]:
        ready.result()
    results = [future.result() for future in [p.start("train", SECONDS) for p in processes]]
    for closed in [p.start("close") for p in processes]:
        closed.result()
    steps = [count / seconds for count, seconds in results]
    return Pace(sum(steps) * SHAPE[0] * SHAPE[1], steps)


class Client:
    """A client process.

    Parameters
    ----------
    path : str
        ``model.path``.
    split : int
        Its split point.
    """

    def __init__(self, path: str, split: int) -> None:
        return_freed_memory()
        self._model, _ = load_client(path, split, "float32", "cpu", {})
        self._model.train()
        names = [name for name, _ in self._model.linears()]
        self._optimizer = AdapterOptimizer(inject(self._model, specs(names), ""), TrainConfig())
        self._vocabulary = int(read_config(path).vocab_size)

    def open(self, endpoint: Endpoint, token: str, threads: int) -> None:
        """Connect, and take a first step."""
        torch.set_num_threads(threads)
        batches = spread_batches(*SHAPE, self._vocabulary)
        self._trainer = ClientTrainer(self._model, self._optimizer, batches, first_step=0)
        self._link = StreamLink(endpoint, token).__enter__()
        train_client(self._trainer, self._link, 1)

    def train(self, seconds: float) -> tuple[int, float]:
        """Train for so long; returns the number of steps, and the seconds that they took."""
        started, before = time.perf_counter(), self._trainer.global_step
        step = partial(train_client, self._trainer, self._link, 1)
        while time.perf_counter() - started < seconds:
            step()
        return self._trainer.global_step - before, time.perf_counter() - started

    def close(self) -> None:
        """End the stream."""
        self._link.__exit__(None, None, None)
