"""The console, fed with events: what a user reads in a terminal and in a file."""

import io
import re

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


def planned(round_: int, clients: str = "01") -> dict[str, object]:
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
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, force_interactive=True, width=100, color_system=None)
    return RunConsole(console), output


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
    # and 29 of the 40 steps of the run to go.
    assert lines == ["round 1/2  steps 11/20  loss 2.950 (mean of 2 clients)  200 tokens/s  0:00:14 left"]


def test_the_time_left_counts_the_rounds_to_come(plain):
    console, output = plain
    console.handle(planned(1, "0"))
    console.handle(step(0.0, 1))
    console.handle(step(10.0, 2))
    line = output.getvalue().splitlines()[-1]
    assert line == "round 1/2  steps 2/10  loss 2.800 (mean of 1 clients)  10 tokens/s  0:03:00 left"
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
    assert "client 0 4/10 loss 2.600 100 tokens/s 0:00:06 left" in lines
    assert "client 1 4/10 loss 3.600 100 tokens/s 0:00:06 left" in lines


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
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.getvalue().splitlines() if "│" in line]
    assert rows[0] == ["0", "120", "0.95 GB", "blocks 0-9 of 30", "4-32 (mean 14.2)", "none", "0.93 GB"]
    assert " ".join(row[3] for row in rows[2:]) == "left out: needs 512.3 MB more [of memory]"


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
