"""``memory``: a client process against the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.planning import CostModel, Workload
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.memory import PeakMemory, process_bytes, return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from simulations.benchmarks.common import RANK, SHAPES, STEPS, Apart, Row, Setup, specs, spread_batches

UNAVOIDABLE = ("weights", "adapters", "activations")
"""Of :meth:`hsplitlora_flwr.planning.CostModel.memory_parts`: what training cannot do without."""


@dataclass(frozen=True)
class ClientRun:
    """One client process of the benchmark ``memory``."""

    path: str
    split: int
    rows: int
    length: int
    layers: Mapping[str, tuple[int, int]]
    """``(out, in)`` of the client's linear layers, by absolute name."""
    updated: bool
    """Whether it gets an accumulated update, dense for every layer."""
    endpoint: Endpoint
    token: str

    def measure(self) -> tuple[int, int]:
        """Train as a client app does; returns the process's own bytes and the measured peak, in this process."""
        return_freed_memory()
        config = read_config(self.path)
        own = process_bytes(config)
        changes = {n: Change(matrix=torch.full(shape, 1e-6)) for n, shape in self.layers.items() if self.updated}
        with PeakMemory() as memory:
            model, _ = load_client(self.path, self.split, "float32", "cpu", changes)
            changes.clear()
            optimizer = AdapterOptimizer(inject(model, specs(self.layers), ""), TrainConfig())
            model.train()
            batches = spread_batches(self.rows, self.length, int(config.vocab_size))
            with StreamLink(self.endpoint, self.token) as link:
                train_client(ClientTrainer(model, optimizer, batches, first_step=0), link, STEPS)
        return own, memory.bytes


def memory(setup: Setup) -> Iterator[Row]:
    """Peak memory of a client process, which trains against a server in this one, against two figures.

    - ``predicted_mb``: what the cost model predicts for it.
    - ``unavoidable_mb``: its weights, its adapters with gradients and optimizer states, and the activations that
      autograd keeps, as the cost model has them. ``measured / unavoidable`` is the measured peak less the process's own
      memory, over that; goal: at most 1.10.

    Rows are split points and batches; one has an accumulated update, dense for every layer, which is merged.
    """
    config = read_config(setup.model)
    base = SharedBase(setup.model)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    last = int(config.num_hidden_layers) - 1
    splits = sorted({1, (last + 1) // 6, (last + 1) // 3, 2 * (last + 1) // 3, last} - {0})
    runs = [(split, shape, False) for split in splits for shape in SHAPES] + [(last, SHAPES[0], True)]
    try:
        for split, (rows, length), updated in runs:
            cost = CostModel(config, base.family, Workload(rows, length))
            part = base.server_part(split).train()
            above = inject(part, specs(name for name, _ in part.linears()), "")
            token = stream.admit(ServerTrainer(part, OwnHalf(AdapterOptimizer(above, TrainConfig()))))
            layers = {la.name: (la.out_features, la.in_features) for la in cost.layers if la.block < split}
            with Apart(ClientRun, setup.model, split, rows, length, layers, updated, stream.endpoint, token) as client:
                own, measured = client.call("measure")
            parts = cost.memory_parts(split, dict.fromkeys(layers, RANK), own, updated=updated)
            predicted, unavoidable = sum(parts.values()), sum(parts[name] for name in UNAVOIDABLE)
            yield {
                "split": split,
                "batch": f"{rows} x {length}",
                "update": "dense" if updated else "none",
                "process_mb": own / 1e6,
                "unavoidable_mb": unavoidable / 1e6,
                "predicted_mb": predicted / 1e6,
                "measured_mb": measured / 1e6,
                "predicted / measured": predicted / measured,
                "measured / unavoidable": (measured - own) / unavoidable,
            }
    finally:
        stream.stop()
