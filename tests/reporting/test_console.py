"""The console, fed with events: what a user reads in a terminal and in a file."""

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from hsplitlora_flwr.reporting import RunConsole

PLAN = {
    "examples": 120,
    "budget_bytes": 950_000_000,
    "split": 10,
    "blocks": 30,
    "ranks": {"mean": 14.2, "min": 4, "max": 32},
    "checkpointing": "none",
    "predicted_bytes": 931_000_000,
    "left_out": "",
}
FINISHED = {
    "kind": "finished",
    "folder": "/runs/1",
    "results": ["adapter/x"],
    "perplexity_before": 15.4,
    "perplexity_after": 3.4,
}


def planned(round_: int, clients: Sequence[str] = "01") -> dict[str, object]:
    members = [PLAN | {"client": name} for name in clients]
    left_out = PLAN | {"client": "9", "left_out": "needs 512.3 MB more [of memory]"}
    return {"kind": "planned", "round": round_, "reason": "", "clients": [*members, left_out]}


def step(time: float, number: int, client: str = "0", round_: int = 1) -> dict[str, object]:
    return {
        "kind": "step",
        "time": time,
        "round": round_,
        "rounds": 2,
        "client": client,
        "step": number,
        "steps": 10,
        "loss": 3.0 - number / 10 + int(client),
        "tokens": 50,
        "all_tokens": 100,
    }


def evaluated(round_: int, perplexity: float) -> dict[str, object]:
    return {"kind": "evaluated", "round": round_, "perplexity": perplexity, "tokens": 100, "seconds": 1.0}


@pytest.fixture
def plain() -> tuple[RunConsole, io.StringIO]:
    """A console that is no terminal."""
    output = io.StringIO()
    return RunConsole(Console(file=output)), output


@pytest.fixture
def terminal() -> tuple[RunConsole, io.StringIO]:
    """A console that is a terminal."""
    return on_a_terminal(100, 25)


def on_a_terminal(width: int, height: int) -> tuple[RunConsole, io.StringIO]:
    output = io.StringIO()
    options = {"force_terminal": True, "force_interactive": True, "color_system": None}
    console = Console(file=output, width=width, height=height, **options)
    return RunConsole(console), output


def plainly(output: io.StringIO) -> str:
    """What was written, without the codes that move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", output.getvalue())


def finished_client(client: str, seconds: float = 10.0) -> dict[str, object]:
    return {
        "kind": "client_finished",
        "round": 1,
        "client": client,
        "seconds": seconds,
        "loss_first": 3.0,
        "loss_last": 2.0,
        "measured_bytes": 1.2e9,
        "predicted_bytes": 1.3e9,
    }


def bars(output: io.StringIO) -> list[str]:
    """The lines that the terminal shows now: the last frame, without the codes that move the cursor."""
    frame = re.split(r"\x1b\[2K", output.getvalue())
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in "".join(frame[-8:]).splitlines()]


def test_perplexity_is_told_against_the_one_before(plain):
    console, output = plain
    for event in (evaluated(0, 15.403), evaluated(1, 5.44), evaluated(2, 4.1)):
        console.handle(event)
    assert output.getvalue().splitlines() == [
        "before training  perplexity 15.40",
        "round 1  perplexity 15.40 → 5.44",
        "round 2  perplexity 5.44 → 4.10",
    ]


def test_a_file_gets_progress_every_five_seconds(plain):
    console, output = plain
    console.handle(planned(1))
    before = len(output.getvalue().splitlines())
    for i in range(10):  # two clients, a step of each a second: 1..10 s
        console.handle(step(1000.0 + i, i + 1, "0"))
        console.handle(step(1000.0 + i, i + 1, "1"))
    lines = output.getvalue().splitlines()[before:]
    # At 5 s the first client has 6 steps, the second 5: after the first step of all, 10 steps of 100 tokens in 5 s,
    # and 29 of the 40 steps of the run to go. Means of three steps are 2.5 and 3.6.
    assert lines == ["round 1/2  steps 11/20  loss 3.050 (mean of 2 clients)  200 tokens/s  0:00:14 left"]


def test_the_time_left_counts_the_rounds_to_come(plain):
    console, output = plain
    console.handle(planned(1, "0"))
    console.handle(step(0.0, 1))
    console.handle(step(10.0, 2))
    line = output.getvalue().splitlines()[-1]
    assert line == "round 1/2  steps 2/10  loss 2.850 (mean of 1 clients)  10 tokens/s  0:03:00 left"
    console.handle({"kind": "round_finished", "round": 1, "seconds": 100.0, "update_norm": 1.0})
    console.handle(step(100.0, 1, round_=2))
    console.handle(step(110.0, 2, round_=2))
    # 11 steps in 110 s since the first one, 8 to go
    assert output.getvalue().splitlines()[-1].endswith("0:01:20 left")


def test_a_failed_client_does_not_hold_the_time_left_up(plain):
    console, output = plain
    console.handle(planned(1))
    console.handle(step(0.0, 1, "0"))
    console.handle(step(0.0, 1, "1"))
    console.handle({"kind": "client_failed", "round": 1, "client": "1", "error": "gone"})
    console.handle(step(10.0, 2, "0"))
    assert "round 1, client 1 failed: gone" in output.getvalue()
    assert "steps 12/20" in output.getvalue().splitlines()[-1]


def test_a_long_line_is_not_broken_in_a_file(plain):
    console, output = plain
    console.handle({"kind": "status", "text": "word " * 60})
    console.handle(planned(1))
    assert output.getvalue().splitlines()[0] == "word " * 60
    assert "left out: needs 512.3 MB more [of memory]" in output.getvalue().splitlines()[-1]


@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_the_results_come_last(kind, request):
    console, output = request.getfixturevalue(kind)
    console.handle(step(0.0, 1))
    console.handle(FINISHED)
    tail = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).splitlines()[-5:]
    assert tail[0].strip() == "finished  perplexity 15.40 → 3.40"
    assert tail[1] == "results in /runs/1"
    assert [line.split()[0] for line in tail[2:]] == ["adapter/", "report.html", "summary.json"]


@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_the_cause_of_a_failure_comes_last(kind, request):
    console, output = request.getfixturevalue(kind)
    console.handle({"kind": "status", "text": "working"})
    console.handle({"kind": "failed", "error": "line one\nRuntimeError: [bold]no memory[/bold]"})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert text.endswith("failed: line one\nRuntimeError: [bold]no memory[/bold]\n")


def test_a_terminal_shows_a_bar_for_every_client_and_one_for_the_run(terminal):
    console, output = terminal
    with console:
        console.handle(planned(1))
        for i in range(4):
            console.handle(step(1000.0 + i, i + 1, "0"))
            console.handle(step(1000.0 + i, i + 1, "1"))
        console._live._live.refresh()  # the frame that a tick of the clock would draw
        lines = [" ".join(re.sub("[━╸╺]", "", line).split()) for line in bars(output)]
    assert "round 1 of 2 8/40 233 tokens/s 0:00:14 left" in lines
    assert "client 0 4/10 loss 2.700 100 tokens/s 0:00:06 left" in lines
    assert "client 1 4/10 loss 3.700 100 tokens/s 0:00:06 left" in lines


def test_a_client_that_has_not_started_has_its_bar_too(terminal):
    console, output = terminal
    with console:
        console.handle(planned(1))
        console.handle(step(1000.0, 1, "1"))
        console._live._live.refresh()
        lines = [" ".join(re.sub("[━╸╺]", "", line).split()) for line in bars(output)]
    assert "client 0 0/10 waiting -:--:-- left" in lines


def test_a_terminal_shows_the_plan_as_a_table(terminal):
    console, output = terminal
    with console:
        console.handle(planned(1))
    lines = [" ".join(line.split()) for line in plainly(output).splitlines()]
    assert lines[lines.index("plan of round 1") :][1:3] == [
        "client examples budget split ranks memory",
        "0 120 0.95 GB blocks 0-9 of 30 4-32 (mean 14.2) 0.93 GB",
    ]
    assert "left out: needs 512.3 MB more [of memory]" in " ".join(lines)


def test_the_bars_go_when_the_console_closes(terminal):
    console, output = terminal
    with pytest.raises(KeyboardInterrupt), console:
        console.handle(step(0.0, 1))
        raise KeyboardInterrupt
    assert output.getvalue().count("\x1b[?25l") == output.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_an_unknown_event_is_passed_over(plain):
    console, output = plain
    console.handle({"kind": "of a later version", "time": 0.0})
    assert output.getvalue() == ""


def test_what_goes_on_is_named_where_it_moves_and_does_not_stay(terminal):
    console, output = terminal
    with console:
        console.handle({"kind": "phase", "text": "measuring the perplexity"})
        console._live._live.refresh()
        assert any("measuring the perplexity  0:00:00" in line for line in bars(output))
        console.handle({"kind": "status", "text": "a fact"})
        console._live._live.refresh()
        assert any("measuring the perplexity" in line for line in bars(output))  # it still goes on
    left = output.getvalue().rpartition("\x1b[?25l")[2]
    assert left.count("a fact") == 1 and "measuring" not in left.rpartition("\x1b[2K")[2]


def test_in_a_file_what_goes_on_is_a_line(plain):
    console, output = plain
    console.handle({"kind": "phase", "text": "measuring the perplexity"})
    assert output.getvalue() == "measuring the perplexity\n"


def test_between_the_last_step_and_the_sum_something_is_waited_for(terminal):
    console, output = terminal
    with console:
        console.handle(planned(1, "0"))
        console.handle(step(0.0, 9))
        console._live._live.refresh()
        assert not any("send their adapters" in line for line in bars(output))
        console.handle(step(1.0, 10))
        console._live._live.refresh()
        assert any("clients send their adapters" in line for line in bars(output))


@pytest.mark.parametrize("checkpointing", ["none", "server"])
def test_a_plan_fits_80_columns(checkpointing):
    console, output = on_a_terminal(80, 24)
    with console:
        clients = [PLAN | {"client": name, "split": 15, "checkpointing": checkpointing} for name in ("0", "10")]
        console.handle({"kind": "planned", "round": 1, "reason": "", "clients": clients})
        console.handle(finished_client("10", 112.3))
    lines = [line.rstrip() for line in plainly(output).splitlines()]
    assert "blocks 0-14 of 30" in next(line for line in lines if line.startswith("10 "))
    assert ("checkpointing" in next(line for line in lines if line.startswith("client"))) == (checkpointing != "none")
    assert max(map(len, lines)) <= 80


def test_a_line_is_broken_between_words_and_a_path_never():
    console, output = on_a_terminal(80, 24)
    path = "/runs/" + "long/" * 20
    with console:
        console.handle({"kind": "status", "text": f"{'word ' * 20}results in {path}"})
    lines = plainly(output).splitlines()
    assert any(line.strip() == path for line in lines) and "word word" in lines[0]


def test_of_forty_clients_on_24_lines_the_slowest_and_a_sum_are_shown():
    console, output = on_a_terminal(80, 24)
    with console:
        console.handle(planned(1, [str(number) for number in range(40)]))
        for number in range(30):
            console.handle(step(0.0, 1, str(number)) | {"loss": 2.0})
            console.handle(step(2.0 if number in (3, 17) else 1.0, 2, str(number)) | {"loss": 2.0})
        for number in range(20, 30):
            console.handle(step(3.0, 10, str(number)) | {"loss": 2.0})
        console._live._live.refresh()
        frame = [" ".join(re.sub("[━╸╺]", "", line).split()) for line in bars(output)]
        for number in range(40):
            console.handle(finished_client(str(number), 99.0 if number == 17 else 10.0))
        console.handle({"kind": "round_finished", "round": 1, "seconds": 100.0, "update_norm": 1.0})
    shown = [line.split()[1] for line in frame if line.startswith("client ") and "/10" in line]
    assert len(shown) == 9 and {"3", "17"} <= set(shown) and not {str(n) for n in range(20, 40)} & set(shown)
    # 11 that train with 2 steps, 10 that are done and 10 that wait
    assert any(line.startswith("31 others 122/310 loss 2.000") for line in frame)
    # a bar of the round, nine of clients and the sum
    assert len([line for line in frame if re.search(r"\d/\d", line)]) == 11
    told = " ".join(plainly(output).split())
    assert "round 1, client" not in told
    assert "round 1, 40 clients: loss 3.000 → 2.000, client 17 took longest, 99.0 s, memory 1.20 GB at most" in told


def test_a_file_stays_plain_where_colours_are_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunConsole() as console:
        console.handle({"kind": "phase", "text": "loading"})
        console.handle(planned(1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading" and not any("\x1b[?25l" in line or "\x1b[2K" in line for line in lines)
