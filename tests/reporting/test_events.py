"""The event log: what is written can be read while it grows, and reads well."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hsplitlora_flwr.reporting import EVENTS_FILE, EventLog, event_text, read_events
from hsplitlora_flwr.reporting.events import format_bytes, plan_rows

CLIENT = {
    "client": "0",
    "examples": 120,
    "budget_bytes": 950_000_000,
    "split": 10,
    "blocks": 30,
    "ranks": {"mean": 14.2, "min": 4, "max": 32},
    "checkpointing": "none",
    "predicted_bytes": 931_000_000,
    "left_out": "",
}
LEFT_OUT = CLIENT | {"client": "node-17", "budget_bytes": 40_000_000, "left_out": "needs 512.3 MB more"}


def step(number: int, **fields: object) -> dict[str, object]:
    values = {"round": 1, "rounds": 2, "client": "0", "steps": 12, "loss": 2.5, "tokens": 9, "all_tokens": 20}
    return values | {"step": number} | fields


def test_events_come_back_in_order_with_kind_and_time(tmp_path):
    before = time.time()
    log = EventLog(tmp_path / "new" / "folder")
    log.emit("status", text="loading - now")
    log.emit("failed", error="no memory")

    events, offset = read_events(tmp_path / "new" / "folder" / EVENTS_FILE, 0)

    assert [event["kind"] for event in events] == ["status", "failed"]
    assert events[0]["text"] == "loading - now"
    assert before <= events[0]["time"] <= events[1]["time"] <= time.time()
    assert offset == (tmp_path / "new" / "folder" / EVENTS_FILE).stat().st_size


def test_a_reader_sees_every_event_once_while_the_log_grows(tmp_path):
    log, path = EventLog(tmp_path), tmp_path / EVENTS_FILE
    assert read_events(path, 0) == ([], 0)
    seen, offset = [], 0
    for i in range(5):
        log.emit("status", text=str(i))
        events, offset = read_events(path, offset)
        seen += [event["text"] for event in events]
    assert seen == ["0", "1", "2", "3", "4"]
    assert read_events(path, offset) == ([], offset)


def test_a_half_written_line_waits_for_its_end(tmp_path):
    path = tmp_path / EVENTS_FILE
    whole, late = json.dumps({"kind": "status", "text": "one"}), json.dumps({"kind": "status", "text": "zwölf"})
    data = (whole + "\n" + late + "\n").encode()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        first, offset = read_events(path, 0)
        path.write_bytes(data)
        rest, end = read_events(path, offset)
        assert [event["text"] for event in first + rest] == ["one", "zwölf"]
        assert end == len(data)


def test_a_line_that_is_no_event_is_passed_over(tmp_path):
    path = tmp_path / EVENTS_FILE
    path.write_text(
        '{"kind": "sta{"kind": "status", "text": "a"}\n17\n{"text": "b"}\n{"kind": "status", "text": "c"}\n'
    )
    assert [event["text"] for event in read_events(path, 0)[0]] == ["c"]


def test_threads_do_not_mix_their_lines(tmp_path):
    log = EventLog(tmp_path)

    def work(name: str) -> None:
        for i in range(100):
            log.emit("step", **step(i + 1, client=name, text=name * 200))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = (tmp_path / EVENTS_FILE).read_text().splitlines()
    assert len(lines) == 400
    for name in "abcd":
        assert [e["step"] for e in map(json.loads, lines) if e["client"] == name] == list(range(1, 101))


def test_a_field_that_is_no_json_is_refused_and_leaves_the_log_whole(tmp_path):
    log = EventLog(tmp_path)
    log.emit("status", text="before")
    with pytest.raises(TypeError):
        log.emit("status", text=object())
    log.emit("status", text="after")
    assert [event["text"] for event in read_events(tmp_path / EVENTS_FILE, 0)[0]] == ["before", "after"]


def test_the_flwr_logger_hears_every_line_of_an_event(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        EventLog(tmp_path).emit("planned", round=1, reason="", clients=[CLIENT, LEFT_OUT])
        EventLog(tmp_path).emit("failed", error="100% lost")
    assert caplog.messages[0] == "plan of round 1"
    assert caplog.messages[1].startswith("client ")
    assert caplog.messages[-1] == "failed: 100% lost"
    assert caplog.records[-1].levelno == logging.ERROR


def test_steps_are_all_written_but_seldom_logged(tmp_path, caplog, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = EventLog(tmp_path)
    with caplog.at_level(logging.INFO, logger="flwr"):
        for number in range(1, 13):
            log.emit("step", **step(number))
            now += 1.0
    assert len(read_events(tmp_path / EVENTS_FILE, 0)[0]) == 12
    assert [message.split("step ")[1].split(" ")[0] for message in caplog.messages] == ["1", "6", "11"]


def test_a_plan_reads_as_an_aligned_table():
    text = event_text({"kind": "planned", "round": 3, "reason": "budgets changed", "clients": [CLIENT, LEFT_OUT]})
    assert text == (
        "plan of round 3: budgets changed\n"
        "client   examples   budget  split             ranks             checkpointing  predicted\n"
        "0             120  0.95 GB  blocks 0-9 of 30  4-32 (mean 14.2)  none           0.93 GB\n"
        "node-17       120  40.0 MB  left out: needs 512.3 MB more"
    )


def test_a_plan_is_ordered_as_people_count():
    clients = [CLIENT | {"client": name} for name in ("10", "2", "1")]
    assert [row[0] for row in plan_rows({"clients": clients})] == ["1", "2", "10"]


def test_one_block_is_not_a_range():
    assert plan_rows({"clients": [CLIENT | {"split": 1}]})[0][3] == "block 0 of 30"


def test_a_client_that_trains_nothing_is_told_of():
    rows = plan_rows({"clients": [CLIENT | {"trains": trains} for trains in (False, True)]})
    assert [row[3] for row in rows] == ["blocks 0-9 of 30, forward alone", "blocks 0-9 of 30"]


def test_one_rank_everywhere_is_not_a_range():
    rows = plan_rows({"clients": [CLIENT | {"ranks": {"mean": 8.0, "min": 8, "max": 8}}]})
    assert rows[0][4] == "8 (mean 8.0)"


def test_a_plan_with_nobody_in_it_still_reads():
    assert "left out: needs 512.3 MB more" in (
        event_text({"kind": "planned", "round": 1, "reason": "", "clients": [LEFT_OUT]}) or ""
    )


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"kind": "status", "text": "loading"}, "loading"),
        ({"kind": "phase", "text": "planning"}, "planning"),
        (
            {"kind": "evaluated", "round": 0, "perplexity": 15.403, "tokens": 1200, "seconds": 3.21},
            "before training: perplexity 15.40 (1200 tokens in 3.2 s)",
        ),
        (
            {"kind": "evaluated", "round": 2, "perplexity": 5.44, "tokens": 1200, "seconds": 3.21},
            "round 2: perplexity 5.44 (1200 tokens in 3.2 s)",
        ),
        ({"kind": "step"} | step(5), "round 1 of 2, client 0: step 5 of 12, loss 2.500"),
        (
            {
                "kind": "client_finished",
                "round": 1,
                "client": "2",
                "seconds": 12.34,
                "loss_first": 3.1,
                "loss_last": 2.2,
                "measured_bytes": 910e6,
                "predicted_bytes": 930e6,
            },
            "round 1, client 2: loss 3.100 → 2.200 in 12.3 s, 0.91 GB (predicted 0.93 GB)",
        ),
        ({"kind": "client_failed", "round": 1, "client": "2", "error": "gone"}, "round 1, client 2 failed: gone"),
        (
            {"kind": "round_finished", "round": 1, "seconds": 60.0, "update_norm": 0.51234},
            "round 1 finished in 60.0 s, update norm 0.5123",
        ),
        (
            {
                "kind": "finished",
                "folder": "/runs/1",
                "results": ["adapter/x"],
                "perplexity_before": 15.4,
                "perplexity_after": 3.4,
            },
            "finished: perplexity 15.40 → 3.40, results in /runs/1",
        ),
        (
            {
                "kind": "finished",
                "folder": "/runs/1",
                "results": [],
                "perplexity_before": 15.4,
                "perplexity_after": 3.4,
                "clients": 1,
                "known_clients": 3,
            },
            "finished: perplexity 15.40 → 3.40, 1 of 3 clients in the last round, results in /runs/1",
        ),
        ({"kind": "failed", "error": "no memory"}, "failed: no memory"),
        ({"kind": "of a later version"}, None),
    ],
)
def test_an_event_as_text(event, text):
    assert event_text(event) == text


def test_bytes_are_told_in_the_units_of_budgets():
    assert [format_bytes(count) for count in (0, 99_900_000, 100_000_000, 1.6e9)] == [
        "0.0 MB",
        "99.9 MB",
        "0.10 GB",
        "1.60 GB",
    ]


class Ears:
    """Notes what it hears, and fails at the kind of event that it is told to."""

    def __init__(self, fails_at=None):
        self.heard, self.fails_at = [], fails_at

    def handle(self, event):
        if event["kind"] == self.fails_at:
            raise RuntimeError("no network")
        self.heard.append(event)


def test_listeners_hear_what_a_reader_reads_in_its_order(tmp_path):
    one, other = Ears(), Ears()
    log = EventLog(tmp_path, [one, other])
    log.emit("status", text="one")
    log.emit("planned", round=1, reason="", clients=[CLIENT])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: log.emit("step", **step(number)), range(40)))
    events, _ = read_events(tmp_path / EVENTS_FILE)
    assert one.heard == other.heard == events and len(events) == 42


def test_a_listener_that_fails_hears_no_more_and_the_others_do(tmp_path, caplog):
    deaf, other = Ears(fails_at="status"), Ears()
    log = EventLog(tmp_path, [deaf, other])
    log.emit("status", text="one")
    log.emit("failed", error="two")
    assert [event["kind"] for event in other.heard] == ["status", "failed"] and deaf.heard == []
    assert "a listener failed" in caplog.text and "no network" in caplog.text
    assert len(read_events(tmp_path / EVENTS_FILE)[0]) == 2


def test_a_listener_may_say_something_itself(tmp_path):
    class Echo:
        def handle(self, event):
            if event["kind"] == "step":
                log.emit("status", text="heard")

    log = EventLog(tmp_path, [Echo()])
    log.emit("step", **step(1))
    assert [event["kind"] for event in read_events(tmp_path / EVENTS_FILE)[0]] == ["step", "status"]
