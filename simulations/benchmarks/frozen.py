"""``frozen``: what a client costs that trains its part, and one that computes forward alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.planning import CostModel, Workload
from hsplitlora_flwr.training.allowance import Allowance
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.memory import PeakMemory, process_bytes, return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from simulations.benchmarks.common import RANK, SHAPES, STEPS, Apart, Row, Setup, specs, spread_batches

SHAPE = SHAPES[0]


@dataclass(frozen=True)
class Figures:
    """Of a client process; seconds and bytes are of a step."""

    process_bytes: int
    peak_bytes: int
    cpu_seconds: float
    seconds: float
    up: float
    down: float


@dataclass(frozen=True)
class ClientRun:
    """One client process."""

    path: str
    split: int
    trains: bool
    endpoint: Endpoint
    token: str

    def measure(self) -> Figures:
        """Train as a client app does, in this process."""
        return_freed_memory()
        config = read_config(self.path)
        own = process_bytes(config)
        with PeakMemory() as memory:
            model, _ = load_client(self.path, self.split, "float32", "cpu", {})
            layers = specs(name for name, _ in model.linears()) if self.trains else {}
            trainer = ClientTrainer(
                model.train(),
                AdapterOptimizer(inject(model, layers, ""), TrainConfig()),
                spread_batches(*SHAPE, int(config.vocab_size)),
                first_step=0,
                forward_only=not self.trains,
            )
            with StreamLink(self.endpoint, self.token) as link:
                started, computed = time.perf_counter(), time.process_time()
                train_client(trainer, link, STEPS)
                seconds, computed = time.perf_counter() - started, time.process_time() - computed
        return Figures(
            own, memory.bytes, computed / STEPS, seconds / STEPS, link.bytes_up / STEPS, link.bytes_down / STEPS
        )


def frozen(setup: Setup) -> Iterator[Row]:
    """A client with adapters of rank 8 on all of its linear layers, and one without any, for several split points.

    Both train the server's half, in this process, over the TLS stream, 4 steps of 8 x 64 tokens. ``cpu_seconds`` is the
    processor time of the client process in a step, its stream included, and ``seconds`` the time of a step, in which a
    client that trains waits for the server. Bytes are those of frames, memory is the peak of the process, beside what
    the cost model predicts.
    """
    config = read_config(setup.model)
    base = SharedBase(setup.model)
    cost = CostModel(config, base.family, Workload(*SHAPE), adapter_rank=RANK)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    blocks = int(config.num_hidden_layers)
    splits = sorted({blocks // 6, blocks // 3, 2 * blocks // 3} - {0})
    try:
        for split, trains in product(splits, (True, False)):
            part = base.server_part(split).train()
            above = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
            token = stream.admit(ServerTrainer(part, OwnHalf(above), allowance=Allowance(forward_only=not trains)))
            with Apart(ClientRun, setup.model, split, trains, stream.endpoint, token) as client:
                found: Figures = client.call("measure")
            ranks = {layer.name: RANK for layer in cost.layers if trains and layer.block < split}
            yield {
                "split": split,
                "adapters": f"rank {RANK}" if trains else "none",
                "cpu_seconds": found.cpu_seconds,
                "seconds": found.seconds,
                "gflop": cost.client_flops(split, ranks) / 1e9,
                "up_kb": found.up / 1e3,
                "down_kb": found.down / 1e3,
                "update_kb": 4 * cost.adapter_parameters(ranks) / 1e3,
                "process_mb": found.process_bytes / 1e6,
                "predicted_mb": cost.client_bytes(split, ranks, found.process_bytes, updated=False) / 1e6,
                "measured_mb": found.peak_bytes / 1e6,
            }
    finally:
        stream.stop()
