"""The tasks of a round: set up the server's half of each, send the client's, and answer its frames.

A task goes to its node in one message, with what the node lacks of the update and the adapters to start from. Until the
last reply, frames arrive where they travel in messages. If a node says that its copy of the update is not what the
server took it for, the task is sent again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flwr.app import Message, RecordDict
from torch import Tensor

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors, Update
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.messages import EVALUATE, HELD_BYTES, TRAIN, TURN, Description, Outcome, ReplyError, Task, reading
from hsplitlora_flwr.methods import METHODS, shares_half
from hsplitlora_flwr.models.fingerprint import part_digests
from hsplitlora_flwr.planning.cost import Layer
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.server.clients import Clients
from hsplitlora_flwr.server.model import FederatedModel, TrainedHalf
from hsplitlora_flwr.server.records import RoundFigures, step_row
from hsplitlora_flwr.server.replies import read_outcome, reply_bytes
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.training.memory import may_fragment
from hsplitlora_flwr.training.server import StepReport
from hsplitlora_flwr.transport.frames import Failure
from hsplitlora_flwr.transport.messages import add_frames, has_frames

log = logging.getLogger(__name__)

LASTING_SECONDS = 90 * 24 * 3600.0
"""Flower keeps a message so long that lasts for a run; others for its usual twelve hours."""


class Dispatch:
    """Sends tasks to the clients of a round and answers what they send before their last reply.

    Parameters
    ----------
    config : Config
    clients : Clients
        Who takes part.
    shard : Shard
        Trains the server's half.
    model : FederatedModel
        What adapters start from, and the accumulated update, of which every client gets what it lacks.
    layers : Iterable[Layer]
        All that the update may change.
    report : RunReport
        Is told about the steps.

    Attributes
    ----------
    figures : RoundFigures
        Of the round under way.
    """

    def __init__(
        self,
        config: Config,
        clients: Clients,
        shard: Shard,
        model: FederatedModel,
        layers: Iterable[Layer],
        report: RunReport,
    ) -> None:
        self.figures = RoundFigures()
        self._config, self._method = config, METHODS[config.method.name]
        self._clients, self._shard, self._model, self._report = clients, shard, model, report
        self._layers = list(layers)
        self._blocks = {layer.name: layer.block for layer in self._layers}
        self._tasks: dict[int, Task] = {}  # under way, without their tensors
        self._sent_again: set[int] = set()
        self._failed: set[int] = set()  # told so

    def begin_round(self) -> None:
        """Count from zero."""
        self.figures = RoundFigures()

    def begin_training(self, server_round: int, plans: Mapping[str, ClientPlan]) -> None:
        """Set up what the clients of a round train together, by name in the order of their steps."""
        shared = shares_half(self._config)
        specs = self._specs(self._half_ranks(plans.values()) if shared else {})
        self._model.begin_round(specs)
        self._shard.begin_round()
        if not shared:
            return
        owner = "all" if self._method.keeps_global_adapter else f"{server_round}/server"
        self._shard.share_half(
            {client: plan.split for client, plan in plans.items()},
            specs,
            f"{self._config.run.seed}/{owner}",
            self._model.start(specs),
            self._kept(),
            lambda client: self._report.status(
                f"client {client} did not come in time for its step (server.patience); the others go on"
            ),
        )

    def task(
        self, node: int, kind: str, server_round: int, plan: ClientPlan, steps: int, scored_steps: int = 0
    ) -> Message:
        """Set the server's half of one client's task up, if there is one, and write the message that starts the
        client's."""
        specs = self._specs(plan.ranks)
        start = self._model.start(specs)
        description = self._clients.descriptions[node]
        task = Task(
            config=self._config,
            kind=kind,
            client=description.name,
            round=server_round,
            split=plan.split,
            specs=specs,
            first_step=(server_round - 1) * self._config.train.steps,
            steps=steps,
            spacious=kind == TRAIN and may_fragment(description.budget, plan.predicted_bytes),
            checkpointing=plan.checkpointing,
            server_checkpointing=plan.server_checkpointing,
            forward_only=plan.forward_only,
            scored_steps=scored_steps,
        )
        if self._method.split:
            task = self._shard.admit(
                task,
                start,
                lambda step: self._report_step(task, step),
                description.longest,
                description.cut_width,
                HELD_BYTES + reply_bytes(task, self._layers),
            )
        self._tasks[node] = task.without_tensors()
        self._sent_again.discard(node)
        self._failed.discard(node)
        return self._message(node, task, start)

    def may_answer(self, reply: Message) -> bool:
        """Whether a client's frames can be answered now, or its step has to wait for its turn."""
        client = self._clients.name(reply.metadata.src_node_id)
        try:
            with reading("its reply"):
                if not has_frames(reply.content):
                    return True
                return self._shard.may_answer(client, self._shard.read(client, reply.content))
        except ReplyError:
            return True  # with what is wrong

    def answer(self, reply: Message) -> Message | None:
        """The next message to a client: answers to its frames, or its task again; None to its last reply.

        Whatever comes, the conversation ends: frames are those of the task, it goes out again once, and after word of
        a failure nothing more is heard.
        """
        node = reply.metadata.src_node_id
        if node in self._failed:
            return None
        try:
            with reading("its reply"):
                if Description.is_all_of(reply.content):  # its update is not what we thought
                    self._clients.take_description(node, Description.from_records(reply.content))
                    return self._again(node)
                client = self._tasks[node].client
                answers = self._shard.answer(client, self._shard.read(client, reply.content))
                if Outcome.is_in(reply.content):
                    return None
                if not answers:
                    raise ReplyError("its reply holds neither frames nor an outcome")
        except ReplyError as error:
            log.warning("client %s: its reply cannot be answered", self._tasks[node].client, exc_info=True)
            answers = [Failure(str(error))]
        if any(isinstance(answer, Failure) for answer in answers):
            self._failed.add(node)
        return Message(add_frames(RecordDict(), answers), node, TURN)

    def read(self, node: int, records: RecordDict) -> Outcome:
        """A client's outcome from the content of its last reply.

        Raises
        ------
        ReplyError
            If it is not what its task asked for.
        """
        task = self._tasks[node]
        if task.kind != EVALUATE and self._method.split:
            trainer = self._shard.trainer(task.client)
            if not trainer.finished:
                raise ReplyError("it replied before its last step")
            if not all(map(math.isfinite, trainer.scorer.scores().values())):
                raise ReplyError("what it sent makes the scores of the server's weights infinite; lower train.lr")
            if trainer.steps < task.steps:
                task = replace(task, steps=trainer.steps)
                self._report.status(
                    f"client {task.client} had time for {task.steps} steps, which count (clients.deadline)"
                )
        return read_outcome(records, task, self._layers, self._model.start(task.specs))

    def trained(self, outcomes: Mapping[int, Outcome]) -> tuple[list[Update], TrainedHalf]:
        """What the clients of a round made: their updates with those of their own halves, and the half that they share.

        Parameters
        ----------
        outcomes : Mapping[int, Outcome]
            By node, in the order of the updates.
        """
        tasks = [self._tasks[node] for node in outcomes]
        updates: list[Update] = [
            {**outcome.adapters, **self._shard.adapters_of(task.client)}
            for outcome, task in zip(outcomes.values(), tasks, strict=True)
        ]
        half = self._shard.adapters()
        trained_by = {name: [i for i, task in enumerate(tasks) if task.split <= self._blocks[name]] for name in half}
        return updates, TrainedHalf(half, self._shard.half_tensors(), trained_by)

    def scores(self, outcomes: Mapping[int, Outcome]) -> list[dict[str, float]]:
        """The importance that clients measured, by layer name, of both sides of the cut.

        Parameters
        ----------
        outcomes : Mapping[int, Outcome]
            By node, in the order of the scores.
        """
        clients = {node: self._tasks[node].client for node in outcomes}
        return [
            {**outcome.importance, **self._shard.trainer(clients[node]).scorer.scores()}
            for node, outcome in outcomes.items()
        ]

    def _kept(self) -> Mapping[str, Tensor]:
        """What the shared half goes on from, which a round changes that may have to be repeated."""
        kept = self._model.kept.tensors
        return {key: tensor.clone() for key, tensor in kept.items()} if self._config.clients.repeats else kept

    def _again(self, node: int) -> Message:
        if node in self._sent_again:
            raise ReplyError("its update cannot be brought up to date")
        self._sent_again.add(node)
        task = self._tasks[node]
        return self._message(node, task, self._model.start(task.specs))

    def _message(self, node: int, task: Task, start: Mapping[str, Factors]) -> Message:
        held = {name for name, block in self._blocks.items() if block < task.split}
        model = self._config.model
        task = replace(
            task,
            start={name: pair for name, pair in start.items() if name in held},
            base=part_digests(model.path, task.split, model.dtype, head=task.labels_stay),
        )
        if not task.from_base:
            task = replace(task, patch=self._model.accumulated.since(self._clients.descriptions[node].held, held))
            states = {name: state for name, state in self._model.accumulated.held().items() if name in held}
            self._clients.now_holds(node, states)
        self.figures.down[node] += task.nbytes
        return Message(task.to_records(), node, task.kind, ttl=LASTING_SECONDS if task.lasting else None)

    def _specs(self, ranks: Mapping[str, int]) -> dict[str, AdapterSpec]:
        alpha, dropout = self._config.alpha, self._config.lora.dropout
        return {name: AdapterSpec(rank, alpha(rank), dropout) for name, rank in ranks.items()}

    def _half_ranks(self, plans: Iterable[ClientPlan]) -> dict[str, int]:
        """Of the half that clients of these plans share: on every layer the highest rank that one of them has there."""
        ranks: dict[str, int] = {}
        for plan in plans:
            above = {name: rank for name, rank in plan.ranks.items() if self._blocks[name] >= plan.split}
            ranks |= {name: max(rank, ranks.get(name, 0)) for name, rank in above.items()}
        return ranks

    def _report_step(self, task: Task, step: StepReport) -> None:
        if task.kind == TRAIN:  # a probe trains nothing, so its steps are no progress
            self._report.step(**step_row(task.client, task.round, task.config.train, step))
