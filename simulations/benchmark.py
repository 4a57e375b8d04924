"""Benchmarks of single parts: ``python -m simulations.benchmark NAME... [--model MODEL] [--out FILE]``.

A benchmark yields rows of figures, units in their names. All rows of the named benchmarks are shown as tables and, with
``--out``, written as JSON together with the machine, the versions and the date.

- ``memory``: peak memory of a client process against the prediction of the cost model, over split points and batches.
- ``overlap``: time of a step over slow links with micro-batches in flight, against compute alone and wire alone.
- ``probe``: time and memory that scoring the weights adds to a step, on either side of the cut.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.delta import Change
from hsplitlora_flwr.lora.layers import AdapterSpec, inject, shape_of
from hsplitlora_flwr.models.loading import load_causal_lm, read_config, split_model
from hsplitlora_flwr.models.split import IGNORED, ClientModel, ServerModel
from hsplitlora_flwr.planning import CostModel, Workload, scoring
from hsplitlora_flwr.planning.trace import LiveBytes
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.memory import PeakMemory, process_bytes, return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer, SharedBase
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.stream import Endpoint, StreamLink, StreamServer
from simulations.shaping import SlowLink, shaped

Row = Mapping[str, float | str]
Benchmark = Callable[[str], Iterator[Row]]
"""Takes ``model.path``, yields rows with the same keys."""

SHAPES = ((8, 64), (4, 128))
"""(batch size, sequence length)."""
RANK = 8
STEPS = 4
LABELLED = 8  # last tokens of a row; the head's share is not what is measured, and large
LINKS = ((SlowLink(100, 20), "float32"), (SlowLink(100, 20), "bfloat16"), (SlowLink(5, 20), "float32"))
"""(link, numbers on the wire)."""
MICRO_BATCHES = ((1, 1), (4, 1), (4, 2), (4, 4))
"""(micro-batches of a step, in flight)."""
TURNS = 4


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


def memory(path: str) -> Iterator[Row]:
    """Predicted and measured peak of a client in a process of its own, which trains against a server in this one."""
    config = read_config(path)
    base = SharedBase(path)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    last = int(config.num_hidden_layers) - 1
    splits = sorted({1, (last + 1) // 6, (last + 1) // 3, 2 * (last + 1) // 3, last} - {0})
    runs = [(split, shape, False) for split in splits for shape in SHAPES] + [(last, SHAPES[0], True)]
    try:
        for split, (rows, length), updated in runs:
            cost = CostModel(config, base.family, Workload(rows, length))
            part = base.server_part(split).train()
            above = inject(part, specs(name for name, _ in part.linears()), "")
            token = stream.admit(ServerTrainer(part, AdapterOptimizer(above, TrainConfig())))
            layers = {la.name: (la.out_features, la.in_features) for la in cost.layers if la.block < split}
            run = ClientRun(path, split, rows, length, layers, updated, stream.endpoint, token)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                own, measured = process.submit(run.measure).result()
            predicted = cost.client_bytes(split, dict.fromkeys(layers, RANK), own, updated=updated)
            yield {
                "split": split,
                "batch": f"{rows} x {length}",
                "update": "dense" if updated else "none",
                "process_mb": own / 1e6,
                "predicted_mb": predicted / 1e6,
                "measured_mb": measured / 1e6,
                "predicted / measured": predicted / measured,
            }
    finally:
        stream.stop()


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


def overlap(path: str) -> Iterator[Row]:
    """A step over shaped links, client and server in two processes, each on half of the cores of this machine.

    A row compares a step, ``step_s``, with what it would take if only one of its two parts took time:

    - ``compute_s``: the same exchange over the plain loopback with float32 numbers, TLS and all, so with as many
      micro-batches in flight. What the two sides compute at the same time counts once, as it does on two machines.
    - ``wire_s``: the same exchange between sides that compute in no time; see :func:`wire_seconds`.

    Figures are medians over turns that all exchanges take one after another, so that they meet the same machine, and
    ``spread_s`` is the slowest of these steps less the fastest.
    """
    base = SharedBase(path)
    split = max(int(base.model.config.num_hidden_layers) // 3, 1)
    part = base.server_part(split).train()
    optimizer = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
    threads = max((os.cpu_count() or 1) // 2, 1)
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
            token = stream.admit(ServerTrainer(part, optimizer, threads=lambda: threads, down=each.wire))
            endpoint = replace(stream.endpoint, address=near[each.link]) if each.link else stream.endpoint
            streams.append((each, endpoint, token))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(ExchangeRun(path, split, threads, streams).measure).result()
    figures = dict(zip(loopback + slow, measured, strict=True))
    for each in slow:
        seconds, up, down = figures[each]
        alone, _, _ = figures[replace(each, link=None, wire="float32")]
        compute_s, step_s = statistics.median(alone), statistics.median(seconds)
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
            "spread_s": max(seconds) - min(seconds),
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


def probe(path: str) -> Iterator[Row]:
    """A step that scores the weights against a training step with adapters on all of them: it keeps the same inputs."""
    rows, length = SHAPES[0]
    model = load_causal_lm(path)
    blocks = int(model.config.num_hidden_layers)
    split = max(blocks // 3, 1)
    batch = next(spread_batches(rows, length, int(model.config.vocab_size)))
    for side in (0, 1):
        trained, scored = (split_model(model, split)[side].train() for _ in range(2))
        shapes = [shape_of(linear) for _, linear in scored.linears()]
        inject(trained, specs(name for name, _ in trained.linears()), "")
        seconds = _median_seconds([partial(_step, trained, batch), partial(_scoring_step, scored, batch)])
        peaks = [_peak_bytes(trained, _step, batch), _peak_bytes(scored, _scoring_step, batch)]
        yield {
            "side": ("client", "server")[side],
            "blocks": (split, blocks - split)[side],
            "training_s": seconds[0],
            "probe_s": seconds[1],
            "extra time": seconds[1] / seconds[0] - 1,
            "training_peak_mb": peaks[0] / 1e6,
            "probe_peak_mb": peaks[1] / 1e6,
            "extra memory / largest matrix": (peaks[1] - peaks[0]) / (4 * max(m * n for m, n in shapes)),
        }


def _step(part: ClientModel | ServerModel, batch: Batch) -> None:
    """A forward and a backward pass."""
    if isinstance(part, ClientModel):
        cut = part(batch.input_ids, batch.attention_mask)
        cut.backward(torch.ones_like(cut))
    else:
        cut = torch.ones(*batch.input_ids.shape, int(part.decoder.config.hidden_size), requires_grad=True)
        part(cut, batch.attention_mask, batch.labels).loss.backward()


def _scoring_step(part: ClientModel | ServerModel, batch: Batch) -> None:
    with scoring(part):
        _step(part, batch)


def _median_seconds(steps: Sequence[Callable[[], None]], repeats: int = 7) -> list[float]:
    """Steps take turns, so that all meet the same machine; the first turn only warms up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for times, step in zip(seconds, steps, strict=True):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]


def _peak_bytes(
    part: ClientModel | ServerModel, step: Callable[[ClientModel | ServerModel, Batch], None], batch: Batch
) -> int:
    """Most bytes of tensors in a step, weights and accumulated gradients apart."""
    parameters = list(part.parameters())
    live = LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    with live:
        step(part, batch)
    return live.peak


def specs(names: Iterable[str]) -> dict[str, AdapterSpec]:
    """An adapter of rank 8 for every layer."""
    return {name: AdapterSpec(RANK, 2.0 * RANK) for name in names}


def spread_batches(rows: int, length: int, vocabulary: int) -> Iterator[Batch]:
    """Batches of one padded and otherwise full rows, whose ids are spread evenly over the vocabulary.

    The embeddings are mapped from a file, and only the pages that some token has used take memory. A long run uses
    them all; a few of these batches do so, too.
    """
    count = rows * length
    stride = -(-vocabulary // count)
    step = 0
    while True:
        ids = (torch.arange(count) * stride + step * stride // STEPS) % vocabulary
        ids = ids.reshape(rows, length)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        labels = ids.masked_fill((torch.arange(length) < length - LABELLED) | (mask == 0), IGNORED)
        yield Batch(ids, mask, labels)
        step += 1


BENCHMARKS: dict[str, Benchmark] = {"memory": memory, "overlap": overlap, "probe": probe}


def environment() -> dict[str, Any]:
    """The machine, the versions and the date: what figures depend on."""
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = next(iter(names), model)
    packages = ("torch", "transformers", "grpcio", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmark", description="Benchmarks of single parts.")
    parser.add_argument("names", nargs="+", choices=sorted(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--model", default="smollm2-135m", help="model.path (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args(arguments)
    console = Console()
    results: dict[str, list[Row]] = {}
    for name in options.names:
        results[name] = []
        for row in BENCHMARKS[name](options.model):
            results[name].append(row)
            console.print(", ".join(f"{key} {shown(value)}" for key, value in row.items()), style="dim", soft_wrap=True)
        console.print(table(name, results[name]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": options.model, "environment": environment(), "benchmarks": results}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"figures in {options.out}", soft_wrap=True)
    return 0


def table(title: str, rows: Sequence[Row]) -> Table:
    """Rows as a table."""
    result = Table(title=title)
    for key in rows[0]:
        result.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        result.add_row(*map(shown, row.values()))
    return result


def shown(value: float | str) -> str:
    """A figure as text, numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
