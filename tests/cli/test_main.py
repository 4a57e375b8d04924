"""The command ``hsplitlora``: what it offers, how fast it answers, and what it says of what it cannot do."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest

from hsplitlora_flwr.cli import __main__ as cli
from hsplitlora_flwr.cli.interrupts import ENDING


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert all(f"  {name}" in text and command.text in text for name, command in cli.COMMANDS.items())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert callable(import_module(f"hsplitlora_flwr.cli.{cli.COMMANDS[name].module}").command)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["trian", "train.rounds=4"])
    assert end.value.code == 2
    assert "'trian'" in (told := capsys.readouterr().err) and "'run'" in told


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pln", "hsplitlora plan"),
        ("train.rounds=4", "hsplitlora run train.rounds=4"),
        ("model=x", "hsplitlora run model=x"),
    ],
)
def test_what_may_be_meant_is_said(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([typed])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: there is no command {typed!r}; did you mean `{meant}`?\n"


def test_what_follows_the_command_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def command() -> None:
        seen.append(sys.argv)

    importer: Callable[[str], object] = lambda name: SimpleNamespace(command=command, name=name)  # noqa: E731
    monkeypatch.setattr(cli, "import_module", importer)
    monkeypatch.setattr(sys, "argv", ["hsplitlora"])
    cli.main(["plan", "--help", "clients.memory_gb=[1,2]"])
    cli.main(["plan"], "python -m simulations.{}")
    assert seen == [["hsplitlora plan", "--help", "clients.memory_gb=[1,2]"], ["python -m simulations.plan"]]


def test_ctrl_c_while_a_command_loads_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(name: str) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "import_module", pressed)
    monkeypatch.setattr(sys, "argv", ["hsplitlora", "doctor"])
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is without nohup
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_command_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["plan"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: this command needs hydra: pip install 'hsplitlora-flwr[simulation]'\n"


def test_the_launcher_is_imported_without_what_takes_seconds() -> None:
    code = "import sys, hsplitlora_flwr.cli.__main__, hsplitlora_flwr.cli.run\n"
    code += "print({'torch', 'transformers', 'flwr', 'ray', 'peft', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
