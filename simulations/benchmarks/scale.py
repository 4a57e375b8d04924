"""``scale``: whole rounds with many clients."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hsplitlora_flwr.client_app import app
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.reporting.summary import SUMMARY_FILE
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.training.memory import resting_bytes
from simulations.benchmarks.common import Apart, Row, Sample, Setup

CLIENTS = {10: (10, 3), 100: (100, 3), 500: (500, 3), 1000: (50, 12)}
"""How many there are, how many of them a round has, and how many rounds are taken."""
BLOCKS, HIDDEN = 4, 32
"""Of the tiny model."""
MEMORY_GB = (20, 30, 40)
SETTINGS: dict[str, int | str] = {
    "server.order": "arrival",  # nodes take part one after another
    "train.rounds_per_message": 1,
    "data.partition": "iid",
    "data.eval_rows": 10,
    "data.max_length": 32,
    "lora.ranks": "0,2,4",
    "train.steps": 2,
    "train.batch_size": 2,
}


class Round(NamedTuple):
    """Seconds of a round, seconds of CPU of both processes and of the server's, the server's memory and the size of its
    summary, in bytes."""

    seconds: float
    cpu: float
    server_cpu: float
    memory: int
    summary: int


def scale(setup: Setup) -> Iterator[Row]:
    """Rounds of the strategy with 10, 100 and 500 clients of a tiny model, over the stream, and 12 with 50 of 1,000;
    each against the first.

    The server is a process of its own. So are the clients, one for all of them: the client app takes their messages one
    after another, through a grid in place of Flower's. Hence a round does not gain from clients that train at once, and
    what Flower and its simulation engine take is not part of it. The model is a random Llama of 4 blocks over bytes;
    describing, scoring, planning, training and aggregation are as in any run. The clients' process takes what it has
    imported out of garbage collection, which else is most of a client's time.

    - ``server_mb``: memory of the server's process after a round, with what is free given back; ``server / round 1``
      is that over the first round's. Goal: flat within 5 %.
    - ``summary_kb``: what the run's summary has then, which is written several times a round. Goal: flat.
    - ``s_per_client``: time of the round over the number of its clients.
    - ``cpu_s_per_client``: the same in CPU time of both processes, which other work on the machine moves less;
      ``/ fewest`` is its median over all rounds, over that with the fewest clients. Goal: constant within 10 %.
    - ``server_cpu_s_per_client``: the server's part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        fewest = 0.0
        for known, (clients, count) in CLIENTS.items():
            with Apart(Federation, folder, known, clients, count) as federation:
                rounds: list[Round] = federation.call("run")
            cpu = [each.cpu / clients for each in rounds]
            fewest = fewest or Sample(cpu).median
            for number, each in enumerate(rounds, 1):
                yield {
                    "known": known,
                    "clients": clients,
                    "round": number,
                    "server_mb": each.memory / 1e6,
                    "server / round 1": each.memory / rounds[0].memory,
                    "summary_kb": each.summary / 1e3,
                    "s_per_client": each.seconds / clients,
                    "cpu_s_per_client": cpu[number - 1],
                    "cpu_s_per_client / fewest": Sample(cpu).median / fewest,
                    "server_cpu_s_per_client": each.server_cpu / clients,
                }


def make_model(folder: Path) -> None:
    """Save a random tiny Llama over bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{symbol: index for index, symbol in enumerate(symbols, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Federation:
    """The server's process.

    Parameters
    ----------
    model : str
        Folder of the tiny model.
    known, clients, rounds : int
        How many there are, how many of them a round has, and how many rounds there are.
    """

    def __init__(self, model: str, known: int, clients: int, rounds: int) -> None:
        run = {"model.path": model, "clients.count": known, "clients.per_round": clients, "train.rounds": rounds}
        self._config = Config.from_run_config({**SETTINGS, **run})

    def run(self) -> list[Round]:
        """Run all rounds."""
        _begin_task()
        config = self._config
        with tempfile.TemporaryDirectory() as folder, Apart(Nodes, config.clients.count, folder) as nodes:
            strategy = _Measured(config, load_text(config.data, config.run.seed).held_out, Path(folder))
            strategy.nodes = _AppGrid(nodes, config.clients.count)
            strategy.start(strategy.nodes)
        return strategy.rounds


class _Measured(HSplitLoRA):
    """Notes what every round took."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rounds: list[Round] = []
        self.nodes: _AppGrid

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        started, before = time.perf_counter(), self.nodes.cpu()
        metrics = super().train_round(grid, server_round)
        seconds, after = time.perf_counter() - started, self.nodes.cpu()
        server, clients = (end - start for start, end in zip(before, after, strict=True))
        summary = (self.folder / SUMMARY_FILE).stat().st_size
        self.rounds.append(Round(seconds, server + clients, server, resting_bytes(), summary))
        return metrics


class _AppGrid(Grid):
    """Takes messages to :class:`Nodes`, one after another."""

    def __init__(self, nodes: Apart, count: int) -> None:
        self._nodes, self._count = nodes, count
        self._waiting: dict[str, Message] = {}
        self._ids = map(str, itertools.count())

    def cpu(self) -> tuple[float, float]:
        """Seconds of CPU of this process and of that of the nodes, so far."""
        return time.process_time(), self._nodes.call("cpu")

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._count + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = {next(self._ids): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if message_id in self._waiting:
                reply: Message = self._nodes.call("answer", self._waiting.pop(message_id))
                reply.metadata.__dict__["_reply_to_message_id"] = message_id
                yield reply

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


class Nodes:
    """The clients' process.

    Parameters
    ----------
    count : int
        How many there are.
    folder : str
        Their disk.
    """

    def __init__(self, count: int, folder: str) -> None:
        _begin_task()
        gc.freeze()
        torch.set_num_threads(1)
        self._contexts = {
            node: Context(1, node, _node_config(node, count, folder), RecordDict(), {}) for node in range(1, count + 1)
        }

    def cpu(self) -> float:
        """Seconds of CPU of this process so far."""
        return time.process_time()

    def answer(self, message: Message) -> Message:
        """What the client app replies, or the error that it raised."""
        node = message.metadata.dst_node_id
        try:
            reply = app(message, self._contexts[node])
        except Exception as error:  # as an engine reports it
            reply = Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


def _begin_task() -> None:
    """Say what an engine says to the process of a task before it runs."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0


def _node_config(node: int, count: int, folder: str) -> dict[str, Any]:
    gigabytes = float(MEMORY_GB[node % len(MEMORY_GB)])
    return {"partition-id": node - 1, "num-partitions": count, "memory-gb": gigabytes, "state-dir": folder}
