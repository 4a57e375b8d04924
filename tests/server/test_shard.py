"""What a task allows its client, and what the shard answers."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.messages import EVALUATE, PROBE, TRAIN, Task
from hsplitlora_flwr.server.shard import allowance_of, check_server, watched
from hsplitlora_flwr.training.allowance import Allowance, Refused
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.frames import Finish, Frame
from hsplitlora_flwr.transport.stream import StreamError


def task(kind: str, **settings: Any) -> Task:
    config = Config.from_run_config({"train.batch_size": 8, "transport.up": "int8", **settings})
    return Task(config, kind, "0", round=3, split=2, specs={}, first_step=20, steps=10)


@pytest.mark.parametrize(
    ("kind", "settings", "allowed"),
    [
        (TRAIN, {}, Allowance(20, 10, 8, 8, 50, 1, "int8")),
        (TRAIN, {"train.micro_batch_size": 3}, Allowance(20, 10, 8, 3, 50, 1, "int8")),
        (TRAIN, {"train.micro_batch_size": 3, "transport.in_flight": 9}, Allowance(20, 10, 8, 3, 50, 3, "int8")),
        # what messages carry together
        (TRAIN, {"train.micro_batch_size": 3, "transport.kind": "auto"}, Allowance(20, 10, 8, 3, 50, 3, "int8")),
        (PROBE, {"train.micro_batch_size": 3}, Allowance(20, 10, 8, 3, 50, 1, "int8")),
        (
            EVALUATE,
            {"evaluation.client_rows": 30},
            Allowance(examples=30, examples_at_once=16, tokens=50, in_flight=2, up="int8"),
        ),
        (
            EVALUATE,
            {"evaluation.client_rows": 5},
            Allowance(examples=5, examples_at_once=5, tokens=50, in_flight=1, up="int8"),
        ),
    ],
)
def test_what_a_task_allows(kind: str, settings: dict[str, Any], allowed: Allowance) -> None:
    assert allowance_of(task(kind, **settings), longest=50) == allowed


def test_a_frame_has_the_bytes_of_its_rows() -> None:
    assert Allowance(examples_at_once=2, tokens=3).frame_bytes(32) == 2 * 3 * (32 * 8 + 4 + 8 + 8) + 2**16


@pytest.mark.parametrize(("error", "trace"), [(Refused("step 7 came"), False), (RuntimeError("out of memory"), True)])
def test_the_traceback_is_logged_of_what_no_frame_explains(
    error: Exception, trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(frame: Frame) -> Frame:
        raise error

    with pytest.raises(type(error)):
        watched("ada", cast(ServerTrainer, fails))(Finish(0.0))
    assert ("client ada: a frame could not be answered" in caplog.text) == trace
    assert ("Traceback" in caplog.text and str(error) in caplog.text) == trace


def test_a_port_in_use_and_a_device_that_is_not_here_are_told_before_a_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = {"transport.address": "127.0.0.1", "transport.port": other.getsockname()[1], "model.device": "cpu"}
        with pytest.raises(StreamError, match=r"transport\.port=\d+: the port cannot be opened"):
            check_server(Config.from_run_config(taken))
        check_server(Config.from_run_config(taken | {"transport.kind": "messages"}))
    free = Config.from_run_config(taken)
    check_server(free)
    check_server(free)  # and it is left free
