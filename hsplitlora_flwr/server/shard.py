"""The server shard: the frozen base, the server's half of a round, and the port for the clients' streams."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import RecordDict
from torch import Tensor

from hsplitlora_flwr.config import Config, TransportConfig
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.messages import EVALUATE, PROBE, TRAIN, Task
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.models.parts import BodyModel, ServerModel
from hsplitlora_flwr.models.placement import check_device, check_gpu_memory, pick_devices
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.planning.round import passes_at_once, takes_all
from hsplitlora_flwr.server.sessions import Sessions
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.allowance import Allowance, Refused
from hsplitlora_flwr.training.half import OwnHalf, Seat, SharedHalf
from hsplitlora_flwr.training.memory import trim_heap
from hsplitlora_flwr.training.multi_adapter import MultiAdapterPass
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import CorePool, ServerEvaluator, ServerTrainer, StepReport, differentiate
from hsplitlora_flwr.training.turns import Turns
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from hsplitlora_flwr.transport.codecs import WireError
from hsplitlora_flwr.transport.frames import Failure, Frame
from hsplitlora_flwr.transport.link import TRANSPORTS, Handler, LastingPort, Port
from hsplitlora_flwr.transport.messages import read_frames

log = logging.getLogger(__name__)

Worker = ServerTrainer | ServerEvaluator
"""The server's half of a client's task."""


@dataclass(frozen=True)
class _Served:
    """A client's task on the server: what answers its frames, how many a message may hold, and how long each may be."""

    worker: Worker
    handler: Handler
    frames: int
    frame_bytes: int


class Shard:
    """One base model and one port, for all clients of a run.

    Parameters
    ----------
    config : Config
        Which model, where it goes, and which port to open.
    sessions : Sessions, optional
        Of the clients, where their messages are to last; by default each is one task.

    Raises
    ------
    StreamError, CertificateError
        If the port cannot be opened or the certificate cannot be used; before the model is loaded.
    """

    def __init__(self, config: Config, sessions: Sessions | None = None) -> None:
        self._config = config
        self._stream = None if config.transport.kind == "messages" else open_stream(config.transport)
        self._sessions = sessions or Sessions(1)
        if isinstance(self._stream, LastingPort):
            self._sessions.over(self._stream)
        self._served: dict[str, _Served] = {}
        devices = pick_devices(config.model.device)
        self.base = SharedBase(config.model.path, config.model.dtype, devices, config.model.quantise)
        self._takes_all, self._passes = takes_all(config), passes_at_once(config)
        self._together = MultiAdapterPass(self.base)
        self._half: SharedHalf | None = None
        self._norms: dict[str, float] = {}  # of clients' last gradients on it
        self._until = math.inf  # when no step of the round is to begin any more
        self._cores = CorePool(self._passes)

    def begin_round(self) -> None:
        """The clients begin to train: the time of the round runs from now on."""
        self._until = time.monotonic() + (self._config.clients.deadline or math.inf)

    def share_half(
        self,
        splits: Mapping[str, int],
        specs: Mapping[str, AdapterSpec],
        seed: str,
        start: Mapping[str, Factors],
        kept: Mapping[str, Tensor],
        passed_over: Callable[[str], None],
    ) -> None:
        """Make the half that the clients of this round train together.

        Parameters
        ----------
        splits : Mapping[str, int]
            Split points by client, in the order of their steps.
        specs, seed, start
            Of its adapters, as for :func:`hsplitlora_flwr.lora.layers.inject`.
        kept : Mapping[str, Tensor]
            What of them goes on from the last round, with its optimizer; see :meth:`half_tensors`.
        passed_over : Callable[[str], None]
            Is told about a client that did not come in time for its step.
        """
        server, method = self._config.server, METHODS[self._config.method.name]
        turns = Turns(list(splits), server.order, server.patience, passed_over)
        part = self._part(min(splits.values()))
        train, freeze_a = self._config.train, method.freeze_a
        self._half = SharedHalf(part, specs, seed, start, train, turns, kept, freeze_a=freeze_a, norms=self._norms)

    def admit(
        self,
        task: Task,
        start: Mapping[str, Factors],
        report: Callable[[StepReport], None],
        longest: int,
        width: int = 0,
        reply_bytes: int = 0,
    ) -> Task:
        """Set up the server's half of a client's task.

        Parameters
        ----------
        task : Task
            What the client is to do.
        start : Mapping[str, Factors]
            Adapters of the whole model to go on from.
        report : Callable[[StepReport], None]
            Called after every training step.
        longest : int
            Tokens of an example at most, as the plan of the round has it.
        width : int
            Directions of ``split.bottleneck`` in which its activations come; 0 for all of them.
        reply_bytes : int
            Longest reply, where it comes over the stream.

        Returns
        -------
        Task
            The same task, with the stream's address and the client's token where there is a stream.
        """
        allowance = allowance_of(task, longest)
        bottleneck = Bottleneck.read(self._config.split.bottleneck, task.split, width) if width else None
        worker = self._worker(task, start, report, allowance, bottleneck)
        handler = watched(task.client, worker)
        limit = allowance.frame_bytes(int(worker.model.decoder.config.hidden_size))
        self._served[task.client] = _Served(worker, handler, allowance.in_flight, limit)
        if self._stream is None:
            return task
        if not self._waits_by_itself(task):
            handler = self._cores.share(handler)
        if not self._sessions.last:
            return task.over_stream(*self._stream.serve(handler, limit, worker.close, f"client {task.client}"))
        session = self._sessions.admit(task.client, task.round)
        session.begin(handler, limit, reply_bytes, worker.close)
        assert session.ticket is not None
        return task.over_stream(*session.ticket, lasting=True)

    def _worker(
        self,
        task: Task,
        start: Mapping[str, Factors],
        report: Callable[[StepReport], None],
        allowance: Allowance,
        bottleneck: Bottleneck | None,
    ) -> Worker:
        """What answers a client's frames."""
        model, down = self._part(task.split), self._config.transport.down
        if task.kind == EVALUATE:
            return ServerEvaluator(model, down, allowance, bottleneck)
        if task.server_checkpointing:
            checkpoint_blocks(model)
        seat, through = self._seat(task, model, start), differentiate
        if self._joins(task):
            assert isinstance(model, ServerModel)
            self._together.enter(model, checkpointing=task.server_checkpointing)
            through = self._together
        threads = all_cores if self._waits_by_itself(task) else self._threads
        up = (lambda: time.monotonic() >= self._until) if task.kind == TRAIN else (lambda: False)
        scorer = Scorer(model, end=task.first_step + task.scored_steps, adapted=task.kind != PROBE)
        return ServerTrainer(model.train(), seat, report, threads, down, through, allowance, bottleneck, up, scorer)

    def _seat(self, task: Task, model: ServerModel | BodyModel, start: Mapping[str, Factors]) -> Seat:
        """The client's place at the half of all, or at one of its own."""
        if self._half and task.kind == TRAIN:
            self._half.attach(model)
            return self._half.seat(task.client)
        adapters = inject(model, task.specs, task.seed, start, freeze_a=task.method.freeze_a)
        return OwnHalf(AdapterOptimizer(adapters, self._config.train))

    def _joins(self, task: Task) -> bool:
        """Whether the client's passes are those of all clients that wait."""
        return self._takes_all and task.kind == TRAIN

    def _waits_by_itself(self, task: Task) -> bool:
        """Clients wait for each other where adapters are batched, and for their turn at a shared half."""
        return task.kind == TRAIN and (self._takes_all or self._half is not None)

    def trainer(self, client: str) -> ServerTrainer:
        """The server's half of a client's training."""
        worker = self._served[client].worker
        assert isinstance(worker, ServerTrainer)
        return worker

    def adapters(self) -> dict[str, Factors]:
        """``(B, A)`` of the half that all train, by absolute layer name; empty where each client has one of its own."""
        return self._half.adapters() if self._half else {}

    def half_tensors(self) -> dict[str, Tensor]:
        """What another round's half goes on from; see :meth:`hsplitlora_flwr.training.half.SharedHalf.tensors`."""
        return self._half.tensors() if self._half else {}

    def adapters_of(self, client: str) -> dict[str, Factors]:
        """The same of a client's own half; empty where it has none."""
        return {} if self._half or client not in self._served else extract(self.trainer(client).model)

    def steps_of_others(self, clients: Collection[str]) -> dict[str, int]:
        """Steps by which others than these have moved the half that all train."""
        taken = self._half.steps if self._half else {}
        return {client: steps for client, steps in taken.items() if client not in clients}

    def read(self, client: str, records: RecordDict) -> list[Frame]:
        """The frames of a client's message.

        Raises
        ------
        FrameError
            If they are damaged, or more or longer than its task allows; none are where the method does not split.
        """
        served = self._served.get(client)
        return read_frames(records, served.frames, served.frame_bytes) if served else read_frames(records, 0, 0)

    def may_answer(self, client: str, frames: Sequence[Frame]) -> bool:
        """Whether frames that came in a message can be answered now, without waiting for another client's step."""
        return self._served[client].worker.may_answer(frames)

    def leave(self, client: str) -> None:
        """A client sends no more: nobody is to wait for it."""
        if client in self._served:
            self._served[client].worker.close()

    def expel(self, client: str) -> None:
        """A client failed: its stream ends too."""
        self.leave(client)
        self._sessions.expel(client)

    def answer(self, client: str, frames: list[Frame]) -> list[Frame]:
        """The answers to frames that came in a message; a failure instead when they cannot be answered."""
        try:
            return [self._served[client].handler(frame) for frame in frames]
        except Exception as error:  # the client must learn why, whatever it is
            self.leave(client)
            failure = Failure.of(error)
            log.warning("client %s is refused: %s", client, failure.error)
            return [failure]

    def dismiss_all(self) -> None:
        """End the round: forget adapters and optimizers, and end the streams of clients that do not wait for a task."""
        for client in self._served:  # who waits for its turn waits in vain
            self.leave(client)
        self._served.clear()
        self._half = None
        self._together = MultiAdapterPass(self.base)
        trim_heap()  # every client's thread has left freed activations behind
        self._sessions.rest()
        if self._stream and not self._sessions.last:
            self._stream.dismiss_all()

    def stop(self) -> None:
        """Close the port."""
        self._sessions.keep(())
        if self._stream:
            self._stream.stop()
        self._cores.close()

    def _part(self, split: int) -> ServerModel | BodyModel:
        return self.base.body_part(split) if self._config.split.labels == "client" else self.base.server_part(split)

    def _threads(self) -> int:
        """Threads for each client of the round.

        They are the same at every frame, however many clients compute at that moment: a sum over other threads is
        rounded otherwise, and the same run would end in other bits.
        """
        at_once = max(min(len(self._served), self._passes), 1) if self._stream else 1
        return max(all_cores() // at_once, 1)


def watched(client: str, worker: Worker) -> Handler:
    """``worker``; what goes wrong in it for other reasons than the frame is logged with its traceback."""

    def handler(frame: Frame) -> Frame:
        try:
            return worker(frame)
        except (Refused, WireError, FloatingPointError):
            raise  # the text says it all
        except Exception:
            log.exception("client %s: a frame could not be answered", client)
            raise

    return handler


def allowance_of(task: Task, longest: int) -> Allowance:
    """What a task allows its client; ``longest`` as in :meth:`Shard.admit`."""
    config, train = task.config, task.config.train
    if task.kind == EVALUATE:
        examples = config.evaluation.client_rows
        return Allowance(
            examples=examples,
            examples_at_once=(at_once := min(config.evaluation.batch_size, examples)),
            tokens=longest,
            in_flight=math.ceil(examples / at_once),
            up=config.transport.up,
        )
    at_once = min(train.micro_batch_size or train.batch_size, train.batch_size)
    micro_batches = math.ceil(train.batch_size / at_once)
    return Allowance(
        first_step=task.first_step,
        steps=task.steps,
        examples=train.batch_size,
        examples_at_once=at_once,
        tokens=longest,
        # in messages the micro-batches of a step travel together
        in_flight=micro_batches
        if config.transport.kind in ("messages", "auto")
        else min(config.transport.in_flight, micro_batches),
        up=config.transport.up,
        forward_only=task.forward_only,
        partial=config.clients.late == "count",
    )


def open_stream(transport: TransportConfig) -> Port:
    """The port of the transport that the settings name, open."""
    return TRANSPORTS[transport.kind].open(transport)


def check_server(config: Config) -> None:
    """See that this machine has the device and the port that the server asks for; both are free after.

    Raises
    ------
    ConfigError, StreamError, CertificateError
        If it has not, or the certificate cannot be used.
    """
    check_device(config.model.device)
    check_gpu_memory("plan.server_gpu_memory_gb", config.plan.server_gpu_memory_gb, config.model.device)
    if config.transport.kind != "messages" and not METHODS[config.method.name].central:
        open_stream(config.transport).stop()
