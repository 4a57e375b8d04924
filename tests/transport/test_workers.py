"""A simulation goes on with the workers that live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.transport import messages as messages_module
from hsplitlora_flwr.transport.messages import converse
from hsplitlora_flwr.transport.workers import WAKE, DeadWorkers, reason_of
from tests.grid import LocalGrid

DIED = (
    "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: ClientAppActor\n\tactor_id: {}\nThe actor is dead because its worker process has died. Worker exit "
    "type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file.'>"
)
OUT_OF_MEMORY = (
    "<class 'ray.exceptions.OutOfMemoryError'>:<'1 worker(s) were killed due to the node running low on memory. Memory "
    "on the node (IP: 10.0.0.2, ID: 98) was 22.83GB / 23.54GB (0.970), which exceeds the memory usage threshold of "
    "0.95; Object store memory usage: [- objects spillable: 0]; Top 10 memory users: PID MEM(GB) COMMAND, 12 0.40 x'>"
)
APP_FAILED = (
    "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run() (pid=1, ip=10.0.0.2)\n"
    "Traceback (most recent call last):\nflwr.clientapp.client_app.ClientAppException: \n"
    "Exception ValueError occurred. Message: no such block'>"
)


def app_of(trained: list[int]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    @app.query("wake")
    def wake(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


class Workers(LocalGrid):
    """Gives messages to workers as Flower's simulation does: the one that became idle last gets the next.

    A worker that lives has done its work when replies are looked for again; a dead one fails at once, and if it is
    ``quick`` it takes the next message before another worker can.
    """

    quick = False

    def __init__(self, app: ClientApp, nodes: int, idle: Sequence[str], dead: Iterable[str] = ()) -> None:
        super().__init__(app, {node: {} for node in range(1, nodes + 1)})
        self.idle, self.dead, self.killers = list(idle), set(dead), set[int]()
        self._queue: list[Message] = []
        self._busy: list[tuple[str, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self._queue += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = []
        for worker, message in self._busy:
            self.idle.append(worker)
            replies.append(self.answer(message))
        self._busy, failed = [], []
        while self._queue and self.idle:
            message, worker = self._queue.pop(0), self.idle.pop()
            if message.metadata.dst_node_id in self.killers:
                self.killers.discard(message.metadata.dst_node_id)
                self.dead.add(worker)
            if worker in self.dead:
                (self.idle if self.quick else failed).append(worker)
                replies.append(Message(Error(code=0, reason=DIED.format(worker)), reply_to=message))
            else:
                self._busy.append((worker, message))
        self.idle += failed
        return reversed(replies)  # Flower gives them in any order


def exchange(grid: Workers, dead: DeadWorkers, nodes: Iterable[int]) -> dict[int, bool]:
    """Whether each node failed."""
    asked = [Message(RecordDict(), node, "train") for node in nodes]
    return {node: reply.has_error() for node, reply in converse(grid, asked, lambda _: None, 30.0, dead)}


@pytest.mark.parametrize("quick", [False, True])
def test_after_a_death_all_clients_but_one_train_and_then_all(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module.time, "sleep", lambda seconds: None)
    trained: list[int] = []
    grid, dead = Workers(app_of(trained), 5, ["a", "b"]), DeadWorkers()
    grid.killers, grid.quick = {2}, quick
    assert exchange(grid, dead, range(1, 6)) == {1: False, 2: True, 3: False, 4: False, 5: False}
    assert not any(exchange(grid, dead, range(1, 6)).values())
    assert sorted(trained) == sorted([1, 3, 4, 5, *range(1, 6)]), "nobody trained twice"


@pytest.mark.parametrize("idle", [["a", "dead"], ["dead", "a"], ["b", "a", "dead"]])
def test_a_living_worker_is_found_for_a_single_message(idle: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module.time, "sleep", lambda seconds: None)
    trained: list[int] = []
    grid, dead = Workers(app_of(trained), 3, idle, dead=["dead"]), DeadWorkers()
    exchange(Workers(app_of([]), 1, ["dead"], dead=["dead"]), dead, [1])  # it is known
    assert exchange(grid, dead, [2]) == {2: False}
    assert trained == [2]


def test_where_all_are_dead_the_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module.time, "sleep", lambda seconds: None)
    grid, dead = Workers(app_of([]), 2, ["a", "b"], dead=["a", "b"]), DeadWorkers()
    assert exchange(grid, dead, [1, 2]) == {1: True, 2: True}
    assert exchange(grid, dead, [1, 2]) == {1: True, 2: True}
    assert {message.metadata.message_type for message in grid.sent[4:]} == {WAKE}


def test_an_error_of_the_app_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    message, dead = Message(RecordDict(), 1, "train"), DeadWorkers()
    reply = Message(Error(code=2, reason=APP_FAILED), reply_to=message)
    assert not dead.took(reply) and not dead.took(reply)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (DIED.format("4d"), "its worker process died; most often the system killed it for lack of memory"),
        (OUT_OF_MEMORY, "memory of its machine ran out (22.83GB / 23.54GB in use)"),
        (APP_FAILED, "no such block"),
        ("x" * 10**6, "x" * 1000 + " ..."),
        ("", "no reason given"),
    ],
)
def test_a_reason_is_told_in_a_line(reason: str, told: str) -> None:
    reply = Message(Error(code=0, reason=reason), reply_to=Message(RecordDict(), 1, "train"))
    assert told in reason_of(reply) and len(reason_of(reply).splitlines()) == 1
