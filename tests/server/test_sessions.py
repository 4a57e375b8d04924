"""Messages that last: whole runs in which one takes a client through all rounds, and what ends one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from hsplitlora_flwr.cli.in_process import InProcessGrid
from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.client.turn import Turn
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages import (
    EVALUATE,
    PROBE,
    TRAIN,
    Task,
    pack_content,
    to_arrays,
    unpack_content,
)
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.server import session_grid, sessions
from hsplitlora_flwr.server.clients import ClientFailedError, Clients
from hsplitlora_flwr.server.session_grid import SessionGrid
from hsplitlora_flwr.server.sessions import Session, Sessions
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.training.process import SharedProcess
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.frames import Activation, Failure, Finish, Finished, Pong, Released, Reply, Request
from hsplitlora_flwr.transport.link import Endpoint, Guest, Ticket
from hsplitlora_flwr.transport.stream import StreamError, StreamLink, StreamServer
from simulations.relay import Relay
from tests.grid import LocalGrid
from tests.server.test_strategy import run, settings
from tests.transport.test_stream import every_thread_ends, until

assert every_thread_ends, "a fixture of this module too"

COUNT, ROUNDS = 4, 3


class Recorded(InProcessGrid):
    """Notes what Flower carried."""

    def __init__(self, folder: Path, count: int = COUNT) -> None:
        process = SharedProcess()
        nodes: dict[int, dict[str, Any]] = {
            10 + index: {"partition-id": index, "num-partitions": count, "memory-gb": 9.0, "state-dir": str(folder)}
            for index in range(count)
        }
        super().__init__(split_client_app(process=process), nodes)
        self.process, self.sent = process, list[tuple[int, str]]()

    def push(self, message: Message) -> str:
        self.sent.append((message.metadata.dst_node_id, message.metadata.message_type))
        return super().push(message)

    def types(self) -> list[str]:
        return [kind for _, kind in self.sent]


def whole_run(tiny_folder: Path, folder: Path, **changes: Any) -> tuple[dict[str, Any], Recorded]:
    """Clients are drawn, one fails in the second round, plans change, and the sites' own text is measured."""
    values = {
        "clients.count": COUNT,
        "clients.per_round": 3,
        "clients.process_mb": 1000.0,
        "plan.server_process_mb": 1000.0,
        "plan.drift": 0.0,
        "evaluation.client_rows": 2,
        "train.rounds": ROUNDS,
        "train.steps": 2,
        "server.order": "fixed",
    }
    config = settings(tiny_folder, folder, **values | changes)
    with Recorded(folder / "nodes") as grid:
        held_out = load_text(config.data, config.run.seed).held_out
        HSplitLoRA(config, held_out, folder, grid.process).start(grid)
    return json.loads((folder / "summary.json").read_text()), grid


@pytest.fixture
def a_client_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Turn._load

    def fails(self: Turn, task: Task, *arguments: Any) -> Any:
        if (task.kind, task.round, task.client) == (TRAIN, 2, "2"):
            raise RuntimeError("out of memory")
        return load(self, task, *arguments)

    monkeypatch.setattr(Turn, "_load", fails)


def test_one_message_for_all_rounds_trains_what_a_message_for_every_task_does(
    tiny_folder: Path, tmp_path: Path, a_client_fails: None
) -> None:
    ends = {}
    for rounds in (1, 0):
        summary, grid = whole_run(tiny_folder, tmp_path / str(rounds), **{"train.rounds_per_message": rounds})
        ends[rounds] = load_file(tmp_path / str(rounds) / "adapter" / "adapter_model.safetensors"), summary, grid
    (expected, summary, every), (_, lasting, few) = ends.values()
    assert len(summary["plans"]) == ROUNDS
    [failure] = [e for e in map(json.loads, (tmp_path / "0" / "events.jsonl").open()) if e["kind"] == "client_failed"]
    assert (failure["round"], failure["client"], failure["error"]) == (2, "2", "RuntimeError: out of memory")
    for tensors, said, _ in ends.values():
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert [sorted(c["client"] for c in each["clients"]) for each in said["rounds"]] == [
            sorted(c["client"] for c in each["clients"]) for each in summary["rounds"]
        ]
    assert [row["client_perplexity"] for row in lasting["rounds"]] == [
        row["client_perplexity"] for row in summary["rounds"]
    ]
    assert lasting["importance"] == summary["importance"]
    assert any(row["drift"] > 0 for row in lasting["importance_drift"]), "rounds after the first measured it"
    # whoever is drawn, or failed, since its message ended is reached by a new one
    assert few.types().count(EVALUATE) == 0 and few.types().count(PROBE) == every.types().count(PROBE) == 3
    assert 0 < few.types().count(TRAIN) < every.types().count(TRAIN)
    assert not list((tmp_path / "0" / "nodes").rglob("*.safetensors")), "nothing of the run stays on a node"


def test_a_grid_that_answers_in_the_server_s_thread_gets_a_message_for_every_task(
    tiny_folder: Path, tmp_path: Path
) -> None:
    grid = LocalGrid(split_client_app(), {1: {"partition-id": 0, "num-partitions": 1, "memory-gb": 20.0}})
    changes = {"train.rounds": 2, "train.steps": 1, "clients.count": 1, "data.eval_rows": 4}
    changes["train.rounds_per_message"] = 0
    summary = run(settings(tiny_folder, tmp_path, **changes), tmp_path, grid)
    assert summary["status"] == "finished"
    assert [message.metadata.message_type for message in grid.sent].count(TRAIN) == 2


# ---------------------------------------------------------------------- parts


def test_a_message_s_content_travels_as_bytes() -> None:
    pair: Factors = torch.randn(3, 2), torch.randn(2, 5)
    records = RecordDict(
        {
            "text": ConfigRecord({"name": "ada", "count": 3, "share": 0.5, "yes": True, "names": ["a", "b"]}),
            "metrics": MetricRecord({"loss": 1.25, "losses": [1.0, 2.0], "tokens": 7}),
            "tensors": to_arrays({"b": pair[0], "a": pair[1].to(torch.bfloat16)}),
            "none": to_arrays({}),
        }
    )
    packed = pack_content(records)
    back = unpack_content(packed)
    assert back == records
    for damaged in (packed[:-1], packed[:20], packed[1:], torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(Exception):  # noqa: B017 (of any kind, which the server is ready for)
            unpack_content(damaged)


class FakePort:
    """Lets in whoever is kept, and does nothing."""

    def __init__(self) -> None:
        self.guests: dict[str, Guest] = {}
        self.dismissed: list[str] = []

    def keep(self, guest: Guest, name: str) -> Ticket:
        token = f"token {len(self.guests)}"
        self.guests[token] = guest
        return Ticket(Endpoint("nowhere"), token)

    def dismiss(self, ticket: Ticket) -> None:
        self.dismissed.append(ticket.token)

    def serve(self, *_: Any) -> Ticket:
        raise NotImplementedError

    def dismiss_all(self) -> None: ...

    def stop(self) -> None: ...


class Silent(LocalGrid):
    """Flower, whose nodes answer when they are told to."""

    def __init__(self) -> None:
        super().__init__(ClientApp(), {1: {}, 2: {}})
        self.answers: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.answers.pop(each) for each in list(message_ids) if each in self.answers]

    def fails(self, message_id: str, reason: str) -> None:
        self.answers[message_id] = Message(Error(8, reason), reply_to=self._waiting[message_id])


class Case:
    """Two nodes that have a message each."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sessions, self.port, self.flower = Sessions(0, self.said.append), FakePort(), Silent()
        self.sessions.over(self.port)
        self.grid = SessionGrid(self.flower, self.sessions)
        self.one, self.two = (self.sessions.admit(name, 1) for name in "12")
        self.ids = [self.push(node, session) for node, session in ((1, self.one), (2, self.two))]

    def push(self, node: int, session: Session, kind: str = TRAIN) -> str:
        assert session.ticket is not None
        stream = ConfigRecord({"token": session.ticket.token})
        [message_id] = self.grid.push_messages([Message(RecordDict({"stream": stream}), node, kind)])
        return message_id

    def pull(self, *message_ids: str) -> list[Message]:
        return list(self.grid.pull_messages(message_ids or self.ids))


@pytest.fixture
def case() -> Case:
    return Case()


def waits(session: Session, content: RecordDict | None = None) -> None:
    """Let a client hand in what it did; its thread is spared."""
    session.opened()
    session._reply, session.waiting = content or RecordDict(), True


def test_what_comes_over_a_stream_is_a_reply_like_others(case: Case) -> None:
    assert case.pull() == []
    waits(case.one, RecordDict({"metrics": MetricRecord({"loss": 1.0})}))
    [reply] = case.pull()
    assert reply.metadata.src_node_id == 1 and reply.metadata.message_type == TRAIN
    assert reply.content.metric_records["metrics"]["loss"] == 1.0
    assert case.pull() == [], "once"
    before = len(case.flower.sent)
    case.push(1, case.one, EVALUATE)
    assert len(case.flower.sent) == before
    assert isinstance(case.one._following, Request) and case.one._following.kind == EVALUATE
    case.push(2, case.sessions.admit("2", 2))
    assert len(case.flower.sent) == before + 1, "who is busy has a message of Flower's"


def test_who_is_lost_has_failed_at_once_and_is_not_sent_to_until_flower_knows(case: Case) -> None:
    waits(case.one)
    case.pull()
    again = case.push(1, case.one)
    case.one.ended(lost=True)
    [reply] = case.pull(again)
    assert "did not come back (transport.grace)" in str(reply.error.reason)
    assert list(case.grid.get_node_ids()) == [2]
    case.one.ended_at -= 2 * session_grid.LOST_SECONDS
    assert list(case.grid.get_node_ids()) == [1, 2], "or has had its time"
    case.one.ended_at += 2 * session_grid.LOST_SECONDS
    case.flower.fails(case.ids[0], "no heartbeat")
    assert case.pull(again) == []
    assert list(case.grid.get_node_ids()) == [1, 2]


def test_what_flower_says_of_a_message_that_lasts_is_said_of_what_is_under_way(case: Case) -> None:
    waits(case.one)
    case.pull()
    again = case.push(1, case.one)
    case.flower.fails(case.ids[0], "the node is gone")
    case.grid._looked = 0.0
    [reply] = case.pull(again)
    assert reply.error.reason == "the node is gone" and reply.metadata.src_node_id == 1
    assert case.one.over and case.port.dismissed == ["token 0"], "an orphan is told"
    assert isinstance(case.one(Finish(0.0)) if case.one._handler else Failure(""), Failure)


def test_where_nodes_have_no_process_for_their_message_none_keeps_its_own(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(case.one)
    assert len(case.pull()) == 1 and case.one.waiting
    monkeypatch.setattr(session_grid, "START_SECONDS", -1.0)
    case.pull()
    assert not case.sessions.last and isinstance(case.one._following, Released)
    waits(case.two)
    assert len(case.pull()) == 1
    case.pull()
    assert isinstance(case.two._following, Released), "nor does who comes later"
    assert len(case.said) == 1 and "train.rounds_per_message=1" in case.said[0]


def test_a_dead_worker_ends_it_too(case: Case) -> None:
    waits(case.one)
    case.flower.fails(case.ids[1], "<class 'ray.exceptions.ActorDiedError'>: the actor died")
    assert len(case.pull()) == 2
    assert not case.sessions.last and case.one.over


def test_who_has_no_part_in_a_round_is_let_go_and_nothing_is_kept_of_it(case: Case) -> None:
    waits(case.one)
    waits(case.two)
    case.pull()
    case.sessions.keep(["2"])
    assert isinstance(case.one._following, Released) and case.two.waiting
    assert list(case.sessions._held) == ["token 1"]
    assert case.sessions.admit("2", 2) is case.two
    assert case.sessions.admit("1", 2) is not case.one


def test_a_message_lasts_for_so_many_rounds() -> None:
    some = Sessions(2)
    some.over(FakePort())
    first = some.admit("ada", 3)
    waits(first)
    assert some.admit("ada", 4) is first
    assert some.admit("ada", 5) is not first and isinstance(first._following, Released)


@pytest.mark.parametrize("content", [torch.zeros(9, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)])
def test_a_reply_that_cannot_be_read_costs_its_client(case: Case, content: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="its reply cannot be read"):
        case.one(Reply(content))
    assert not case.one.waiting
    with pytest.raises(ValueError, match="no task is under way"):
        case.one(Finish(0.0))


def test_a_reply_is_no_longer_than_its_task_asks_for(case: Case) -> None:
    case.one.begin(lambda frame: frame, 1000, 2 * sessions.DESCRIPTION_BYTES, lambda: None)
    assert (case.one.limit(Finish), case.one.limit(Reply)) == (1000, 2 * sessions.DESCRIPTION_BYTES)
    case.one.rest()
    assert (case.one.limit(Finish), case.one.limit(Reply)) == (0, sessions.DESCRIPTION_BYTES)


# ---------------------------------------------------------------------- over real sockets


def test_tasks_and_replies_come_over_one_stream_until_it_is_lost(every_thread_ends: None) -> None:
    identity = make_identity("shard")
    server = StreamServer("127.0.0.1", 0, identity=identity, grace=0.3)
    with Relay(int(server.endpoint.address.rpartition(":")[2])) as relay:
        some = Sessions()
        some.over(server)
        session = some.admit("ada", 1)
        left = threading.Event()
        session.begin(lambda frame: Finished(), 1000, 0, left.set)
        assert session.ticket is not None and not session.begun
        endpoint = Endpoint(f"127.0.0.1:{relay.port}", identity.pin, identity.name)
        content = RecordDict({"metrics": MetricRecord({"loss": 1.0})})
        with StreamLink(endpoint, session.ticket.token, grace=0.3) as link:
            link.send(Finish(0.0))
            assert isinstance(link.receive(), Finished) and session.begun
            for _ in range(2):
                link.send(Reply(pack_content(content)))
                assert until(lambda: session.waiting)
                assert session.take_reply() == content
                relay.cut()  # in the middle of waiting
                assert session.send(Message(content, 1, TRAIN))
                request = link.receive()
                assert isinstance(request, Request) and unpack_content(request.content) == content
            link.send(Reply(pack_content(content)))
            assert until(lambda: session.waiting)
            relay.refuse()
            assert left.wait(60) and session.lost and session.over and not session.waiting
            with pytest.raises(StreamError, match="did not come back"):
                link.receive()
    server.stop()


def test_what_is_longer_than_the_task_asks_for_is_refused_before_it_is_read() -> None:
    server = StreamServer("127.0.0.1", 0, identity=None)
    some = Sessions()
    some.over(server)
    for limits, frame in (((1000, 0), Activation), ((0, 0), Reply)):
        session = some.admit(frame.__name__, 1)
        session.begin(lambda frame: Finished(), *limits, lambda: None)
        assert session.ticket is not None
        long = Pong(torch.zeros(sessions.DESCRIPTION_BYTES + 2000, dtype=torch.uint8))
        sent = Reply(long.payload) if frame is Reply else long
        with StreamLink(server.endpoint, session.ticket.token) as link:
            link.send(sent)
            with pytest.raises(StreamError, match="bytes; at most"):
                link.receive()
        assert until(partial(getattr, session, "over"))
    server.stop()


# ---------------------------------------------------------------------- rounds that have an end


@pytest.fixture
def one_is_slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Once a client has taken so many steps, the time of its round is over; the others are done by then."""

    def make(steps: int) -> None:
        def is_up(self: ServerTrainer, *arguments: Any, **more: Any) -> None:
            make_trainer(self, *arguments, **more)
            if self._allowance.first_step == 3 and not made:  # the first one's second round
                made.append(self)
                self._time_is_up = lambda: self.steps >= steps

        made: list[ServerTrainer] = []
        monkeypatch.setattr(ServerTrainer, "__init__", is_up)

    make_trainer = ServerTrainer.__init__
    return make


DEADLINE = {"clients.deadline": 600.0, "plan.probe_every": 0, "train.steps": 3, "data.eval_rows": 4}


@pytest.mark.parametrize(
    ("changes", "steps", "says"),
    [
        ({}, 2, "client 0 had time for 2 steps, which count (clients.deadline)"),
        ({"train.micro_batch_size": 1, "transport.in_flight": 3}, 1, "client 0 had time for 1 steps, which count"),
        ({"transport.kind": "messages"}, 2, "client 0 had time for 2 steps, which count"),
        ({"lora.clients": "none", "transport.in_flight": 2}, 1, "client 0 had time for 1 steps, which count"),
        ({"split.labels": "client"}, 1, "client 0 had time for 1 steps, which count"),
        ({"clients.late": "drop"}, 2, "the time of the round was over after 2 of its steps (clients.deadline)"),
        ({}, 0, "the time of the round was over after 0 of its steps (clients.deadline)"),
    ],
    ids=str,
)
def test_what_a_slow_client_did_until_the_deadline_counts_or_not(
    changes: dict[str, Any],
    steps: int,
    says: str,
    tiny_folder: Path,
    tmp_path: Path,
    one_is_slow: Callable[[int], None],
) -> None:
    one_is_slow(steps)
    summary = run(settings(tiny_folder, tmp_path, **DEADLINE | changes), tmp_path)
    rows = {row["client"]: len(row["losses"]) for row in summary["rounds"][1]["clients"]}
    counts = steps and "drop" not in changes.values()
    assert rows == ({"0": steps} if counts else {}) | {"1": 3, "2": 3}
    assert says in (tmp_path / "events.jsonl").read_text()
    assert summary["status"] == "finished"


def test_who_says_nothing_is_given_up_half_as_long_again_after_the_deadline(case: Case, tmp_path: Path) -> None:
    config = Config.from_run_config({"clients.deadline": 0.02})
    clients = Clients(config, RunReport(tmp_path, config.to_run_config()))
    asked = [Message(RecordDict(), 1, TRAIN)]
    with pytest.raises(ClientFailedError, match=r"no reply within 0.03 s \(clients.deadline\)"):
        clients.exchange(case.flower, asked, 1, deadline=config.clients.deadline)


@pytest.mark.parametrize("repeats", [0, 1])
def test_a_round_that_too_few_finish_is_repeated_or_ends_the_run(
    repeats: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, failed = Turn._load, list[int]()

    def fails(self: Turn, task: Task, *arguments: Any) -> Any:
        if (task.kind, task.round, task.client) == (TRAIN, 2, "1") and len(failed) < 1:
            failed.append(task.round)
            raise RuntimeError("out of memory")
        return load(self, task, *arguments)

    changes = {"clients.min": 3, "clients.repeats": repeats, "train.steps": 1, "data.eval_rows": 4}
    expected = run(settings(tiny_folder, tmp_path / "whole", **changes), tmp_path / "whole")
    monkeypatch.setattr(Turn, "_load", fails)
    config = settings(tiny_folder, tmp_path / "run", **changes)
    if not repeats:
        with pytest.raises(ClientFailedError, match=r"2 clients are left, and clients.min=3: client 1 failed"):
            run(config, tmp_path / "run")
        return
    summary = run(config, tmp_path / "run")
    assert "round 2 is repeated (1 more): 2 clients are left" in (tmp_path / "run" / "events.jsonl").read_text()
    assert [round_["perplexity"] for round_ in summary["rounds"]] == [
        round_["perplexity"] for round_ in expected["rounds"]
    ]
    found, whole = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole"))
    assert found.keys() == whole.keys() and all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
