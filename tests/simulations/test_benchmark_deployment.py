"""What comes before a client's first step, and the time between two."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.benchmarks import deployment as module
from simulations.benchmarks.common import Setup
from simulations.benchmarks.deployment import seconds_besides_steps, seconds_of_a_step, start


def test_the_parts_of_a_start(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr(module, "STARTS", 1)
    rows = list(start(Setup(str(tiny_folder))))
    seconds = {str(row["part"]): float(row["seconds"]) for row in rows}
    parts = ["process", "import flwr", "import torch", "import hsplitlora_flwr", "load", "stream"]
    assert list(seconds) == [*parts, "in all"]
    assert all(each > 0 for each in seconds.values())
    assert seconds["in all"] == pytest.approx(sum(seconds[part] for part in parts))


def step(round_: int, client: str, time: float) -> dict[str, object]:
    return {"kind": "step", "round": round_, "client": client, "time": time}


def test_steps_count_while_all_clients_train() -> None:
    slow, quick = (0.0, 10.0, 13.0, 16.0), (9.0, 10.0, 11.0, 12.0, 13.0)
    events = [step(1, "slow", time) for time in slow] + [step(1, "quick", time) for time in quick]
    # from 9, when both have begun, to 13, when the first is through: two steps of slow and four of quick
    assert seconds_of_a_step([{"kind": "status", "time": 0.0}, *events]) == 2 * 4 / 6
    more = [step(2, client, 20.0 + 3 * number) for client in "ab" for number in range(9)]
    assert seconds_of_a_step([*events, *more]) == (2 * 4 + 2 * 24) / (6 + 16)


def test_steps_that_never_meet() -> None:
    apart = [step(1, "a", 1.0), step(1, "a", 2.0), step(1, "b", 3.0), step(1, "b", 4.0)]
    with pytest.raises(ValueError, match="more steps would help"):
        seconds_of_a_step(apart)


def test_what_a_round_takes_besides_its_steps() -> None:
    events: list[dict[str, object]] = [{"kind": "status", "time": 1.0}]
    for number, begin in ((1, 10.0), (2, 20.0), (3, 30.0)):
        events += [step(number, "ab"[at % 2], begin + 1.5 + at) for at in range(4)]
        events.append({"kind": "round_finished", "round": number, "time": begin + 5.0})
        events.append({"kind": "evaluated", "round": number, "time": begin + 7.0})
    first, later = seconds_besides_steps(events)
    assert first == 14.0
    assert later == [25.0 - 17.0 - 4.0, 35.0 - 27.0 - 4.0]  # four steps of a second
