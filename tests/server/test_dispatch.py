"""What the server does with replies of a client before its last: whatever they are, they cost that client alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.messages import TRAIN, TURN, Description, Task
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.server.clients import Clients
from hsplitlora_flwr.server.dispatch import Dispatch
from hsplitlora_flwr.server.model import FederatedModel
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.transport.frames import Failure, Finish, Finished, Frame
from hsplitlora_flwr.transport.messages import add_frames, read_frames
from tests.grid import LocalGrid

NODE = 7
OUTCOME = RecordDict({"losses": MetricRecord({"losses": [1.0]})})


@dataclass
class FakeShard:
    """Answers every frame, and notes whose they were."""

    seen: list[str] = field(default_factory=list)
    error: str = ""

    def admit(self, task: Task, *_: Any) -> Task:
        return task

    def read(self, client: str, records: RecordDict) -> list[Frame]:
        return read_frames(records)

    def answer(self, client: str, frames: list[Frame]) -> list[Frame]:
        self.seen += [client] * len(frames)
        return [Failure(self.error) if self.error else Finished() for _ in frames]


def description(name: str = "ada", **claims: Any) -> Description:
    return Description(name, 10, 10**9, 10**6, 20, **claims)


@pytest.fixture
def shard() -> FakeShard:
    return FakeShard()


@pytest.fixture
def dispatch(shard: FakeShard, tmp_path: Path) -> Dispatch:
    """With a task under way."""
    LocalGrid(ClientApp(), {})  # says who sends, as messages want to know
    config = Config()
    report = RunReport(tmp_path, config.to_run_config())
    clients = Clients(config, report)
    clients.descriptions = {NODE: description()}
    model = FederatedModel(config, cast(SharedBase, None))
    made = Dispatch(config, clients, cast(Shard, shard), model, [], report)
    made.task(NODE, TRAIN, 1, ClientPlan(2, {}, 0), 3)
    return made


def reply(records: RecordDict) -> Message:
    message = Message(RecordDict(), NODE, TRAIN)
    message.metadata.__dict__["_message_id"] = "1"
    made = Message(records, reply_to=message)
    made.metadata.__dict__["_src_node_id"] = NODE
    return made


def failure(message: Message | None) -> str:
    assert message is not None and message.metadata.message_type == TURN
    (frame,) = read_frames(message.content)
    assert isinstance(frame, Failure)
    return frame.error


def frames(*content: Any, key: str = "frames") -> RecordDict:
    return RecordDict({"frames": ConfigRecord({key: list(content)})})


def test_frames_are_answered_until_the_outcome_comes(dispatch: Dispatch, shard: FakeShard) -> None:
    finish = add_frames(RecordDict(), [Finish(1.0)])
    answer = dispatch.answer(reply(finish))
    assert answer is not None and isinstance(read_frames(answer.content)[0], Finished)
    assert dispatch.answer(reply(RecordDict({**finish, **OUTCOME}))) is None
    assert dispatch.answer(reply(OUTCOME)) is None
    assert shard.seen == ["ada", "ada"]


BAD: dict[str, RecordDict] = {
    "damaged": frames(b"HSPL and so on"),
    "text": frames("HSPL"),
    "numbers": frames(1, 2),
    "none": frames(),
    "no such key": frames(b"", key="more"),
    "not a list": RecordDict({"frames": ConfigRecord({"frames": b"HSPL"})}),
    "another record": RecordDict({"frames": MetricRecord({"frames": 1.0})}),
    "nothing": RecordDict(),
    "something else": RecordDict({"news": ConfigRecord({"a": 1})}),
    "no description": RecordDict({"description": ConfigRecord({"held": "["})}),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_cannot_be_answered_is_its_client_s_failure(
    kind: str, dispatch: Dispatch, shard: FakeShard, caplog: pytest.LogCaptureFixture
) -> None:
    assert failure(dispatch.answer(reply(BAD[kind])))
    assert "client ada: its reply cannot be answered" in caplog.text
    for more in (BAD[kind], add_frames(RecordDict(), [Finish(1.0)]), description().to_records()):
        assert dispatch.answer(reply(more)) is None, "what comes after it was told is its last reply"
    assert not shard.seen


def test_any_exception_is_its_client_s_failure(dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        RecursionError("deep"),
        EOFError("short"),
        KeyError("name"),
        RuntimeError("odd"),
        MemoryError("large"),
    ):

        def fails(*_: Any, error: Exception = error) -> list[Frame]:
            raise error

        monkeypatch.setattr(dispatch._shard, "answer", fails)
        dispatch.task(NODE, TRAIN, 1, ClientPlan(2, {}, 0), 3)  # another round
        assert type(error).__name__ in failure(dispatch.answer(reply(add_frames(RecordDict(), [Finish(1.0)]))))


def test_a_client_that_was_refused_is_not_heard_again_in_its_round(dispatch: Dispatch, shard: FakeShard) -> None:
    finish, shard.error = add_frames(RecordDict(), [Finish(1.0)]), "step 7 came where step 6 is due"
    assert failure(dispatch.answer(reply(finish))) == shard.error
    assert dispatch.answer(reply(finish)) is None and len(shard.seen) == 1
    dispatch.task(NODE, TRAIN, 2, ClientPlan(2, {}, 0), 3)
    assert failure(dispatch.answer(reply(finish))) == shard.error, "in the next round it is"


def test_a_client_that_lacks_the_update_gets_its_task_once_more(dispatch: Dispatch) -> None:
    again = dispatch.answer(reply(description(version=3).to_records()))
    assert again is not None and again.metadata.message_type == TRAIN
    assert failure(dispatch.answer(reply(description().to_records()))) == "its update cannot be brought up to date"


def test_frames_are_those_of_the_client_that_the_task_went_to(dispatch: Dispatch, shard: FakeShard) -> None:
    dispatch._clients.descriptions = {NODE: description("bob")}  # whatever it may have said since
    dispatch.answer(reply(add_frames(RecordDict(), [Finish(1.0)])))
    assert shard.seen == ["ada"]
