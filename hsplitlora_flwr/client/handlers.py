"""The Flower ``ClientApp``: a client describes itself, scores its weights, and trains its part on data that stay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.client.budget import load_memory_budget, partition_of
from hsplitlora_flwr.client.node import LoadBudget, LoadData, Means, Node
from hsplitlora_flwr.client.session import Session
from hsplitlora_flwr.client.store import NodeStore
from hsplitlora_flwr.client.turn import Line, Turn
from hsplitlora_flwr.config import Config, ConfigError, DataConfig
from hsplitlora_flwr.data.partition import cached_partition
from hsplitlora_flwr.data.sources import Example, load_text, read_rows
from hsplitlora_flwr.messages import DESCRIBE, FORGET, PROBE, TURN
from hsplitlora_flwr.training.cut import CutTransform
from hsplitlora_flwr.training.process import OwnProcess
from hsplitlora_flwr.transport.workers import WAKE


def load_own_text(context: Context, config: Config) -> Sequence[Example]:
    """The file that ``data-path`` of the node's configuration names, else the node's share of the configured data set.

    A share goes by ``partition-id`` and ``num-partitions`` of the node, as simulations set them.

    Raises
    ------
    DataError, ConfigError
        If the file is missing or malformed, or the node says neither.
    """
    own = context.node_config.get("data-path")
    if own is not None:
        return read_rows(str(own), config.data)
    if config.data.is_own and not config.data.path:
        raise ConfigError(
            "data.path is empty, so every node needs a file of its own: --node-config 'data-path=\"FILE\"'"
        )
    index, count = partition_of(context)
    return _partitions(config.data, count, config.run.seed)[index]


def split_client_app(
    load_data: LoadData = load_own_text,
    load_budget: LoadBudget = load_memory_budget,
    process: OwnProcess | None = None,
    *,
    cut_transform: CutTransform | None = None,
) -> ClientApp:
    """A Flower ``ClientApp`` that takes part in split fine-tuning.

    Parameters
    ----------
    load_data : Callable[[Context, Config], Sequence[Example]]
        Gives this client its examples; they do not leave it.
    load_budget : Callable[[Context, Config], int]
        Gives this client's memory budget in bytes.
    process : OwnProcess, optional
        The process that it runs in; one of its own by default, as Flower's engines give it.
    cut_transform : CutTransform, optional
        What is done to the cut activation before it leaves this client; the server is told its name.
    """
    app = ClientApp()
    means = Means(load_data, load_budget, process or OwnProcess(), cut_transform)

    @app.query(_action(DESCRIBE))
    def describe(message: Message, context: Context) -> Message:
        """Answer with this node's budget, amount of data, and version of the update."""
        return Message(Node(means, context).introduce(message.content), reply_to=message)

    @app.train(_action(PROBE))
    def probe(message: Message, context: Context) -> Message:
        """Score the weights that this client holds, on a few batches."""
        return Session(Node(means, context), message).run()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train this client's adapters."""
        return Session(Node(means, context), message).run()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Measure the model on examples that this client keeps out of training."""
        return Session(Node(means, context), message).run()

    @app.train(_action(TURN))
    def turn(message: Message, context: Context) -> Message:
        """Go on with a task over messages."""
        with Line() as line:
            return Message(Turn(Node(means, context), message.content, line).go_on(), reply_to=message)

    @app.query(_action(FORGET))
    def forget(message: Message, context: Context) -> Message:
        """Remove what this node kept of the run."""
        NodeStore(context).forget()
        return Message(RecordDict(), reply_to=message)

    @app.query(_action(WAKE))
    def wake(message: Message, context: Context) -> Message:
        """Answer nothing: the reply shows that this process lives."""
        return Message(RecordDict(), reply_to=message)

    return app


@lru_cache(maxsize=1)
def _partitions(data: DataConfig, count: int, seed: int) -> list[list[Example]]:
    """Every client's examples; a worker process of a simulation serves many clients and reads the files once."""
    examples = load_text(data, seed).train
    return [[examples[row] for row in rows] for rows in cached_partition(examples, data, count, seed)]


def _action(message_type: str) -> str:
    return message_type.partition(".")[2]
