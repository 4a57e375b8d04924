"""Frames inside Flower messages, and the conversation with nodes that carries them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplitlora_flwr.transport import messages
from hsplitlora_flwr.transport.frames import Finish, FrameError, Loss, Pong
from hsplitlora_flwr.transport.messages import add_frames, converse, frame_bytes, has_frames, read_frames
from tests.grid import LocalGrid


def test_frames_come_out_as_they_went_in() -> None:
    records = add_frames(RecordDict(), [Loss(2.5), Pong(torch.arange(5, dtype=torch.uint8))])
    assert has_frames(records)
    loss, pong = read_frames(records)
    assert isinstance(loss, Loss) and loss.total == 2.5
    assert isinstance(pong, Pong) and pong.payload.tolist() == [0, 1, 2, 3, 4]
    parts = records.config_records["frames"]["frames"]
    assert frame_bytes(records) == sum(len(part) for part in parts)
    assert read_frames(RecordDict()) == [] and frame_bytes(RecordDict()) == 0


def test_damaged_frames_are_refused() -> None:
    with pytest.raises(FrameError):
        read_frames(RecordDict({"frames": ConfigRecord({"frames": [b"HSPL and so on"]})}))


def test_frames_are_counted_and_measured_before_any_is_read() -> None:
    def noise(*sizes: int) -> RecordDict:
        return RecordDict({"frames": ConfigRecord({"frames": [bytes(size) for size in sizes]})})

    with pytest.raises(FrameError, match="a message with 1,000 frames; at most 2 are accepted here"):
        read_frames(noise(*[9] * 1000), 2, 100)
    with pytest.raises(FrameError, match="a message with a frame of 101 bytes; at most 100 are accepted here"):
        read_frames(noise(9, 101), 2, 100)
    good = add_frames(RecordDict(), [Loss(2.5), Loss(2.5)])
    assert len(read_frames(good, 2, frame_bytes(good) // 2)) == 2
    assert read_frames(RecordDict(), 2, 100) == []


def counting_app() -> ClientApp:
    """Counts down what it is sent; a node that is sent -1 fails."""
    app = ClientApp()

    @app.query()
    def count(message: Message, context: Context) -> Message:
        [frame] = read_frames(message.content)
        assert isinstance(frame, Finish) and frame.previous_grad_norm_sq >= 0, "cannot count that"
        return Message(add_frames(RecordDict(), [Finish(frame.previous_grad_norm_sq - 1)]), reply_to=message)

    return app


def test_nodes_are_answered_until_each_has_said_its_last() -> None:
    grid = LocalGrid(counting_app(), {1: {}, 2: {}, 3: {}})

    def message(node: int, number: float) -> Message:
        return Message(add_frames(RecordDict(), [Finish(number)]), node, "query")

    def answer(reply: Message) -> Message | None:
        [frame] = read_frames(reply.content)
        assert isinstance(frame, Finish)
        return (
            message(reply.metadata.src_node_id, frame.previous_grad_norm_sq)
            if frame.previous_grad_norm_sq > 0
            else None
        )

    last = dict(converse(grid, [message(1, 4.0), message(2, 1.0), message(3, -1.0)], answer, timeout=300))
    assert last.keys() == {1, 2, 3}
    assert last[3].has_error() and not last[1].has_error()
    sent = [message.metadata.dst_node_id for message in grid.sent]
    assert [sent.count(node) for node in (1, 2, 3)] == [4, 1, 1]


def test_nodes_that_stay_silent_are_given_up() -> None:
    grid = LocalGrid(counting_app(), {1: {}, 2: {}})
    answers = grid.pull_messages
    grid.pull_messages = lambda ids: [r for r in answers(ids) if r.metadata.src_node_id == 1]  # type: ignore[method-assign]
    messages = [Message(add_frames(RecordDict(), [Finish(1.0)]), node, "query") for node in (1, 2)]
    assert [node for node, _ in converse(grid, messages, lambda reply: None, timeout=0.3)] == [1]


def test_looks_for_replies_grow_rarer_while_none_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def pull(ids: Iterable[str]) -> Iterable[Message]:
        looks.append(now)
        return answered(ids) if now > 60 and looks[-2] <= 60 else []

    grid = LocalGrid(counting_app(), {1: {}, 2: {}})
    answered, grid.pull_messages = grid.pull_messages, pull  # type: ignore[method-assign]
    monkeypatch.setattr(messages, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    asked = [Message(add_frames(RecordDict(), [Finish(1.0)]), 1, "query")]
    heard = converse(grid, asked, lambda reply: Message(reply.content, 2, "query"), timeout=70)
    assert list(heard) == []
    gaps = [later - earlier for earlier, later in pairwise(looks)]
    assert gaps[:20] == pytest.approx([0.1] * 20) and max(gaps) == pytest.approx(2.0)
    assert all(gap <= max(0.1, 0.05 * look) + 1e-9 for gap, look in zip(gaps, looks, strict=False))
    after_the_reply = next(gap for gap, look in zip(gaps, looks, strict=False) if look > 60)
    assert after_the_reply == pytest.approx(0.1), "whoever has answered may do so again at once"


def test_what_the_superlink_says_of_a_node_that_is_gone_is_that_node_s_reply() -> None:
    grid = LocalGrid(ClientApp(), {7: {}})
    asked = Message(RecordDict(), 7, "query")

    def gone(ids: Iterable[str]) -> Iterable[Message]:
        reply = Message(Error(5, "the node is gone"), reply_to=asked)
        reply.metadata.__dict__.update(_src_node_id=1, _reply_to_message_id=next(iter(ids)))
        return [reply]

    grid.pull_messages = gone  # type: ignore[method-assign]
    [(node, reply)] = converse(grid, [asked], lambda reply: None, timeout=60)
    assert node == 7 and reply.error.reason == "the node is gone"
